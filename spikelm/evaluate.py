"""What a student is worth: held-out losses, divergence from its teacher, firing rates, a greedy sample."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from operator import mul
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spikelm.errors import SpikelmError
from spikelm.neurons import TILIF

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spikelm.layers import SpikingLinear

Rows = Iterable[Mapping[str, Any]]

# Logits of one model held at a time, in elements (64 MiB in float32); one row of a batch may be larger.
LOGIT_ELEMENTS = 2**24


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Rows,
    *,
    teacher: nn.Module | None = None,
    batch_size: int = 16,
    bytes_per_token: float | None = None,
    max_contexts: int | None = None,
) -> dict[str, float | int | None]:
    """Held-out figures of a causal LM over packed rows {"input_ids": [context_length]}, first token not predicted.

    Returns ce (nats per predicted token), perplexity, bits_per_byte (None without bytes_per_token), kl_to_teacher
    KL(teacher||model) and reverse_kl KL(model||teacher) at the same positions (None without a teacher), tokens.
    Sums are kept in float64; modes of the models are restored. Raises SpikelmError for an empty dataset, rows of
    unequal length, token ids or a teacher's vocabulary that do not fit the model's, a result that is not finite.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    tokens = 0
    models = [model] if teacher is None else [model, teacher]
    with evaluation_mode(*models):
        for input_ids in _batches_of_logits(model, dataset, batch_size, max_contexts):
            logits = _predictions(model, input_ids)
            teacher_logits = None if teacher is None else _predictions(teacher, input_ids)
            if teacher_logits is not None and teacher_logits.shape != logits.shape:
                raise SpikelmError(
                    f"the teacher's vocabulary has {teacher_logits.shape[-1]} entries, the model's {logits.shape[-1]}:"
                    " the same vocabulary is needed to compare them"
                )
            targets = input_ids[:, 1:].reshape(-1).to(logits.device)
            sums += _loss_sums(logits, targets, teacher_logits)
            tokens += targets.numel()
    ce, forward, reverse = (sums / tokens).tolist()
    if not all(map(math.isfinite, (ce, forward, reverse))) or ce > 700:
        raise SpikelmError(f"evaluation gave ce {ce}, KL {forward}, reverse KL {reverse}: the model has diverged")
    return {
        "ce": ce,
        "perplexity": math.exp(ce),
        "bits_per_byte": None if bytes_per_token is None else ce / math.log(2) / bytes_per_token,
        "kl_to_teacher": None if teacher is None else forward,
        "reverse_kl": None if teacher is None else reverse,
        "tokens": tokens,
    }


def _batches_of_logits(
    model: nn.Module, dataset: Rows, batch_size: int, max_contexts: int | None
) -> Iterator[torch.Tensor]:
    """Batches cut down to LOGIT_ELEMENTS logits, but at least one row."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 1)
    for input_ids in batches(dataset, batch_size, max_contexts):
        yield from input_ids.split(max(1, LOGIT_ELEMENTS // (input_ids.shape[1] * vocabulary)))


def _predictions(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of the predicted tokens, [B * (L - 1), V], in the model's dtype."""
    device = next(model.parameters()).device
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is not None and int(input_ids.max()) >= vocabulary:
        raise SpikelmError(f"token id {int(input_ids.max())} is outside of the model's vocabulary of {vocabulary}")
    logits = model(input_ids=input_ids.to(device), use_cache=False).logits
    return logits[:, :-1].reshape(-1, logits.shape[-1])


def _loss_sums(logits: torch.Tensor, targets: torch.Tensor, teacher_logits: torch.Tensor | None) -> torch.Tensor:
    """Sums over tokens of (ce, KL(teacher||model), KL(model||teacher)), float64 [3]; both KL 0 without a teacher."""
    sums = torch.zeros(3, dtype=torch.float64)
    step = max(1, LOGIT_ELEMENTS // logits.shape[-1])
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        own = _log_probabilities(logits[part])
        sums[0] -= own.gather(-1, targets[part, None]).sum(dtype=torch.float64).cpu()
        if teacher_logits is not None:
            reference = _log_probabilities(teacher_logits[part].to(own.device))
            difference = reference - own
            sums[1] += (reference.exp() * difference).sum(-1).sum(dtype=torch.float64).cpu()
            sums[2] -= (own.exp() * difference).sum(-1).sum(dtype=torch.float64).cpu()
    return sums


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


class _SiteCounts:
    """Sums over all elements that reached one bank of neurons, in float64 on the CPU."""

    def __init__(self, owner: "SpikingLinear") -> None:
        self.owner = owner
        self.elements = self.channels = 0
        self.clipped = torch.zeros((), dtype=torch.float64)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """The forward pre-hook: encode the projection's input [*, C] again and count its frames [T, *, C]."""
        neuron = self.owner.neuron
        frames = neuron.encode(inputs[0])
        per_step = frames.abs().flatten(1).sum(1, dtype=torch.float64).cpu()
        positive = (frames > 0).sum(dtype=torch.float64).cpu()
        union = (frames != 0).any(0).sum(dtype=torch.float64).cpu()
        if self.elements == 0:
            self.channels = frames.shape[-1]
            self.per_step, self.positive, self.union = per_step, positive, union
        else:
            self.per_step += per_step
            self.positive += positive
            self.union += union
        self.elements += frames[0].numel()
        if isinstance(neuron, TILIF):
            beyond = inputs[0].float().abs() > neuron.D * neuron.v_threshold
            self.clipped += beyond.sum(dtype=torch.float64).cpu()

    def rates(self) -> dict[str, Any]:
        per_step = (self.per_step / self.elements).tolist()
        return {
            "sum_of_rates": math.fsum(per_step),
            "union_rate": self.union.item() / self.elements,
            "rate_per_step": per_step,
            "positive_rate": self.positive.item() / self.elements,
            "saturation": self.clipped.item() / self.elements if isinstance(self.owner.neuron, TILIF) else None,
            "channels": self.channels,
        }


@torch.no_grad()
def firing_statistics(
    model: nn.Module, dataset: Rows, *, batch_size: int = 16, max_contexts: int | None = 64
) -> dict[str, Any]:
    """Firing rates of every bank of neurons of a spiking model over packed rows {"input_ids": [context_length]}.

    Returns {"sites": {name: rates}, ...}; per site, averaged over tokens and channels: rate_per_step [T] is mean |s_t|,
    sum_of_rates its sum over t, union_rate the share that fires in any step, positive_rate the sum over t of the share
    of +1 (so sum_of_rates - positive_rate is that of -1 for ternary spikes), saturation the share of inputs with
    |x| > D V (None for neurons other than TILIF, whose steps are its D frames), channels. Over all sites: sum_of_rates
    and union_rate weigh sites equally, sum_of_rates_weighted and union_rate_weighted weigh each by its channels.
    Raises SpikelmError for a model without spiking sites or a site that the forward pass never reaches.
    """
    from spikelm.convert import spike_sites

    counts = {name: _SiteCounts(owner) for name, owner in spike_sites(model).items()}
    if not counts:
        raise SpikelmError("the model has no spiking projections: spikify(model, recipe) makes them")
    handles = [count.owner.register_forward_pre_hook(count) for count in counts.values()]
    try:
        with evaluation_mode(model):
            device = next(model.parameters()).device
            for input_ids in batches(dataset, batch_size, max_contexts):
                model(input_ids=input_ids.to(device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    for name, count in counts.items():
        if count.elements == 0:
            raise SpikelmError(f"no input ever reached the spiking projection {name!r}: its rates are not known")
    sites = {name: count.rates() for name, count in counts.items()}
    channels = [site["channels"] for site in sites.values()]
    summary: dict[str, Any] = {"sites": sites}
    for rate in ("sum_of_rates", "union_rate"):
        values = [site[rate] for site in sites.values()]
        summary[rate] = math.fsum(values) / len(values)
        summary[f"{rate}_weighted"] = math.fsum(map(mul, values, channels)) / sum(channels)
    return summary


@torch.no_grad()
def population_statistics(
    model: nn.Module, dataset: Rows, *, batch_size: int = 16, max_contexts: int | None = 64
) -> dict[str, Any]:
    """Firing rates of every population of a BiSpikCLM over packed rows {"input_ids": [context_length]}.

    Returns {"sites": {name: {"firing_rate", "rate_per_step" [T]}}, "firing_rate", "map_density"}: spikes per neuron,
    token and step, of each population and as their plain mean; of an attention map's population per pair of a query
    and a key no later, which is its density: "map_density" by layer. Raises SpikelmError for a model without any.
    """
    from spikelm.layers.spiking_attention import SpikingSelfAttention, StatelessBinaryIF

    neurons = {name: part for name, part in model.named_modules() if isinstance(part, StatelessBinaryIF)}
    maps = {f"{name}.map_neuron" for name, part in model.named_modules() if isinstance(part, SpikingSelfAttention)}
    if not neurons:
        raise SpikelmError("the model has no populations of StatelessBinaryIF: population_statistics takes a BiSpikCLM")
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(neurons, 0)

    def record(name: str, spikes: torch.Tensor) -> None:
        length = spikes.shape[-1]
        fired = spikes.tril() if name in maps else spikes
        sums[name] = sums.get(name, 0) + fired.flatten(1).sum(1, dtype=torch.float64).cpu()
        places = spikes[0].numel()
        counts[name] += places * (length + 1) // (2 * length) if name in maps else places

    handles = [
        neuron.register_forward_hook(lambda module, inputs, spikes, name=name: record(name, spikes))
        for name, neuron in neurons.items()
    ]
    try:
        with evaluation_mode(model):
            device = next(model.parameters()).device
            for input_ids in batches(dataset, batch_size, max_contexts):  # maps exist where they are asked for
                model(input_ids=input_ids.to(device), use_cache=False, logits_to_keep=1, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    rates = {name: sums[name] / counts[name] for name in neurons}
    means = {name: rate.mean().item() for name, rate in rates.items()}
    return {
        "sites": {name: {"firing_rate": means[name], "rate_per_step": rates[name].tolist()} for name in means},
        "firing_rate": math.fsum(means.values()) / len(means),
        "map_density": [mean for name, mean in means.items() if name in maps],
    }


@torch.no_grad()
def generate_sample(model: Any, tokenizer: "PreTrainedTokenizerBase", prompt: str, max_new_tokens: int) -> str:
    """The prompt with its greedy continuation; a bos token comes first when the tokenizer has one, as in training."""
    from transformers import GenerationConfig

    ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise SpikelmError("the prompt is empty and the tokenizer has no bos token to start from")
    if max_new_tokens < 1:
        raise SpikelmError(f"max_new_tokens={max_new_tokens}: at least 1 is accepted")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=padding,
    )
    input_ids = torch.tensor([ids], device=model.device)
    with evaluation_mode(model):
        output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=settings)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def batches(dataset: Rows, batch_size: int, max_contexts: int | None = None) -> Iterator[torch.Tensor]:
    """Token ids [B, L] of the first `max_contexts` rows (all when None), at most `batch_size` at a time."""
    if batch_size < 1:
        raise SpikelmError(f"batch_size={batch_size}: at least 1 is accepted")
    if max_contexts is not None and max_contexts < 1:
        raise SpikelmError(f"max_contexts={max_contexts}: at least 1, or None for all, is accepted")
    rows: Iterator[Sequence[int]] = (row["input_ids"] for row in islice(dataset, max_contexts))
    empty = True
    while part := list(islice(rows, batch_size)):
        lengths = {len(row) for row in part}
        if len(lengths) > 1 or min(lengths) < 2:
            raise SpikelmError(f"contexts of one length of at least 2 tokens are accepted, found {sorted(lengths)}")
        empty = False
        yield torch.as_tensor(part, dtype=torch.long)
    if empty:
        raise SpikelmError("the dataset holds no context to evaluate on")


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """All modules in eval mode inside, each in its own mode again after."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
