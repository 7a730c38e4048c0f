"""SpikingBert as a transformers model (SpikingBERT, arXiv 2308.10873; its 1/1.58-bit form, arXiv 2405.02543)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.models.bert.modeling_bert import BertEmbeddings, BertPooler
from transformers.utils import ModelOutput, can_return_tuple

from spikelm.equilibrium import Solution, equilibrium
from spikelm.errors import SpikelmError
from spikelm.layers.bit_linear import BitLinear, check_packed
from spikelm.layers.equilibrium_if import EquilibriumIF
from spikelm.models.spikingbert.configuration_spikingbert import MODES, SpikingBertConfig
from spikelm.models.spikingbert.readings import MeasuredRates, Rates, Spikes, real_mean


@dataclass
class SpikingBertOutput(ModelOutput):
    """What SpikingBertModel returns; rates are within [0, 1].

    Attributes:
        last_hidden_state: rates of the last layer [B, L, d].
        pooler_output: [B, d], tanh of a projection of the first token's rates.
        hidden_states: rates of the input population and of every layer, each [B, L, d], if asked for.
        attention_scores: query k^T / sqrt(d_h) at those rates, before mask and softmax, per layer [B, H, L, L], if
            asked for.
        firing_rates: in mode "spiking", population -> mean rate over real tokens and channels, scalar.
        rate_gaps: in mode "spiking" where F was evaluated (for gradients or scores), population -> mean |asr - F|.
        solutions: with feedback, of the solver by "forward" (mode "rate") and, once the gradient is formed, "backward".
            These three in training, or if asked for.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attention_scores: tuple[torch.Tensor, ...] | None = None
    firing_rates: dict[str, torch.Tensor] | None = None
    rate_gaps: dict[str, torch.Tensor] | None = None
    solutions: dict[str, Solution] | None = None


@dataclass
class SpikingBertClassifierOutput(ModelOutput):
    """Logits [B, num_labels], where labels were given their mean cross-entropy, and what SpikingBertOutput has."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attention_scores: tuple[torch.Tensor, ...] | None = None
    firing_rates: dict[str, torch.Tensor] | None = None
    rate_gaps: dict[str, torch.Tensor] | None = None
    solutions: dict[str, Solution] | None = None


class SpikingBertLayer(nn.Module):
    """One encoder layer; SN is an IF population, x spikes [T, B, L, d] or rates [B, L, d]::

    k, v = SN(key(x)), SN(value(x))
    c = SN(softmax(query(x) k^T / sqrt(d_h) + mask) v)
    h = SN(LN(attention_output(c) + x))
    x' = SN(LN(output(SN(gelu(intermediate(h)))) + h))
    """

    def __init__(self, config: SpikingBertConfig) -> None:
        super().__init__()
        size, wide = config.hidden_size, config.intermediate_size
        self.num_heads = config.num_attention_heads
        self.query, self.key, self.value = (projection(config, size, size) for _ in range(3))
        self.attention_output = projection(config, size, size)
        self.intermediate, self.output = projection(config, size, wide), projection(config, wide, size)
        self.attention_norm, self.output_norm = (nn.LayerNorm(size, eps=config.layer_norm_eps) for _ in range(2))
        self.activation = ACT2FN[config.hidden_act]
        self.key_neuron, self.value_neuron, self.context_neuron = (population(config) for _ in range(3))
        self.attention_neuron, self.intermediate_neuron, self.output_neuron = (population(config) for _ in range(3))

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, reading: Rates, scores: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """x [*, L, d] -> x' [*, L, d]; mask [B, 1, 1, L] joins the scores; the scores are appended where asked for."""
        queries = self._heads(self.query(x))
        keys = self._heads(reading.behind(self.key, self.key_neuron, x))
        values = self._heads(reading.behind(self.value, self.value_neuron, x))
        overlap = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)  # * h l l
        if scores is not None:
            scores.append(overlap)
        mixed = (overlap + mask).softmax(-1) @ values
        context = reading(self.context_neuron, mixed.transpose(-2, -3).flatten(-2))
        hidden = reading(self.attention_neuron, self.attention_norm(self.attention_output(context) + x))
        wide = reading(self.intermediate_neuron, self.activation(self.intermediate(hidden)))
        return reading(self.output_neuron, self.output_norm(self.output(wide) + hidden))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)  # * h l d


class Feedback(BitLinear):
    """The last layer's way back. It starts at 0, so that a solver converges from the first step on. [ours]"""


def projection(config: SpikingBertConfig, inputs: int, outputs: int, kind: type[BitLinear] = BitLinear) -> BitLinear:
    """A projection with the configuration's weights; in its packed form where the configuration says so."""
    layer = kind(inputs, outputs, weights=config.weights, per_row=config.per_row)
    if config.packed:
        layer.pack()
    return layer


def population(config: SpikingBertConfig) -> EquilibriumIF:
    """An IF population with the configuration's threshold and first membrane."""
    return EquilibriumIF(float(config.v_threshold), float(config.initial_membrane))


class SpikingBertPreTrainedModel(PreTrainedModel):
    """Initialisation and the flags transformers asks for."""

    config: SpikingBertConfig
    base_model_prefix = "bert"
    _no_split_modules = ["SpikingBertLayer"]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers; SpikelmError for a packed model whose bits the file lacks or has damaged."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, report = loaded
        if model.config.packed:
            unset = [name for name in report["missing_keys"] if name.endswith(("packed_weight", "weight_scale"))]
            if unset:
                raise SpikelmError(f"the checkpoint has no {sorted(unset)[0]}, and {len(unset) - 1} more are missing")
            check_packed(model)
            model.requires_grad_(False)
        return loaded if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BertEmbeddings):  # buffers that no checkpoint holds
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand(1, -1))
            init.zeros_(module.token_type_ids)
        elif isinstance(module, Feedback) and not module.packed:
            init.zeros_(module.weight)


class SpikingBertModel(SpikingBertPreTrainedModel):
    """The encoder. In mode "spiking" without training, T steps of spikes; else see SpikingBertConfig.mode."""

    def __init__(self, config: SpikingBertConfig) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.embeddings.dropout = nn.Dropout(0.0)  # dropout is on rates, see Rates
        self.input_neuron = population(config)
        size = config.hidden_size
        self.feedback = projection(config, size, size, Feedback) if config.feedback else None
        self.layers = nn.ModuleList(SpikingBertLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler = BertPooler(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        """Other word embeddings."""
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        T: int | None = None,
        mode: str | None = None,
        output_hidden_states: bool | None = None,
        output_attention_scores: bool = False,
        output_rates: bool | None = None,
    ) -> SpikingBertOutput:
        """Token ids [B, L] to rates.

        T, mode: instead of the configuration's.
        output_rates: whether firing_rates, rate_gaps and solutions are wanted; None, in training alone.
        """
        mode = self.config.mode if mode is None else mode
        if mode not in MODES:
            raise SpikelmError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
        current, real = self._input(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        spiking = mode == "spiking"
        if spiking:
            steps = self.config.T if T is None else T
            measured = self.simulate(current, real, (steps,))[steps]
        if spiking and not (torch.is_grad_enabled() or output_attention_scores):
            run = _Run([measured[neuron] for neuron in self.layer_populations()])
        else:
            dropout = self.config.hidden_dropout_prob if self.training else 0.0
            reading = MeasuredRates(measured, real) if spiking else Rates(dropout)
            run = self._equilibrium(current, real, reading, output_attention_scores)
        output = SpikingBertOutput(last_hidden_state=run.hidden[-1], pooler_output=self.pooler(run.hidden[-1]))
        if output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states:
            output.hidden_states = tuple(run.hidden)
        if output_attention_scores:
            output.attention_scores = tuple(run.scores)
        if not (self.training if output_rates is None else output_rates):
            return output
        if spiking:
            names = self.populations()
            output.firing_rates = {names[neuron]: real_mean(rate, real) for neuron, rate in measured.items()}
            if run.gaps:
                output.rate_gaps = {names[neuron]: gap for neuron, gap in run.gaps.items()}
        if self.feedback is not None:
            output.solutions = run.solutions
        return output

    def populations(self) -> dict[EquilibriumIF, str]:
        """Every IF population and its name, in the order of the computation."""
        return {part: name for name, part in self.named_modules() if isinstance(part, EquilibriumIF)}

    def layer_populations(self) -> list[EquilibriumIF]:
        """The populations whose rates are the hidden states: the input's, and each layer's last."""
        return [self.input_neuron, *(layer.output_neuron for layer in self.layers)]  # type: ignore[list-item]

    @torch.no_grad()
    def simulate(
        self, current: torch.Tensor, real: torch.Tensor, T: Sequence[int]
    ) -> dict[int, dict[EquilibriumIF, torch.Tensor]]:
        """Average spiking rates [B, L, C] of every population after each number of steps in T, from one run.

        Args:
            current: the input population's constant current [B, L, d].  real: bool [B, L].
        """
        if not T or any(isinstance(steps, bool) or not isinstance(steps, int) or steps < 1 for steps in T):
            raise SpikelmError(f"T must be integers >= 1; got {list(T)}")
        spikes, at_once = Spikes(self.config.fold_scale), 1 if self.feedback is not None else self.config.steps_at_once
        output, done, rates = torch.zeros_like(current), 0, {}
        for steps in sorted(set(T)):
            while done < steps:
                now = min(at_once, steps - done)
                entering = current if self.feedback is None else current + self.feedback(output)
                output = self._layers(entering.expand(now, *current.shape), real, spikes)[-1][-1]
                done += now
            rates[steps] = {neuron: (count / steps).to(current.dtype) for neuron, count in spikes.counts.items()}
        return rates

    def _input(
        self, input_ids: Any, attention_mask: Any, token_type_ids: Any, position_ids: Any, inputs_embeds: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The input population's current [B, L, d], and which tokens are real, bool [B, L]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise SpikelmError("give either input_ids or inputs_embeds")
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        if length > self.config.max_position_embeddings:
            raise SpikelmError(f"{length} tokens are beyond the {self.config.max_position_embeddings} positions")
        current = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        if attention_mask is None:
            return current, torch.ones(current.shape[:2], dtype=torch.bool, device=current.device)
        return current, attention_mask != 0

    def _layers(
        self, current: torch.Tensor, real: torch.Tensor, reading: Rates, scores: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """What the input population and every layer pass on, for the input's current [*, L, d]."""
        mask = current.new_zeros(real.shape).masked_fill(~real, torch.finfo(current.dtype).min)[:, None, None, :]
        hidden = [reading(self.input_neuron, current)]
        for layer in self.layers:
            hidden.append(layer(reading.between_layers(hidden[-1]), mask, reading, scores))
        return hidden

    def _equilibrium(self, current: torch.Tensor, real: torch.Tensor, reading: Rates, with_scores: bool) -> "_Run":
        """One pass; with feedback first the fixed point, with its implicit gradient."""
        run = _Run()
        if self.feedback is not None:
            feedback = self.feedback

            def step(output: torch.Tensor) -> torch.Tensor:
                return self._layers(current + feedback(output), real, reading)[-1]

            measured = reading.measured[self.layer_populations()[-1]] if isinstance(reading, MeasuredRates) else None
            start = torch.zeros_like(current)
            fixed = equilibrium(step, start, self.config.solver, value=measured, report=run.solutions.__setitem__)
            current = current + feedback(fixed)
        run.hidden = self._layers(current, real, reading, run.scores if with_scores else None)
        run.gaps = getattr(reading, "gaps", {})
        return run


@dataclass
class _Run:
    """What a pass leaves behind."""

    hidden: list[torch.Tensor] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    gaps: dict[EquilibriumIF, torch.Tensor] = field(default_factory=dict)
    solutions: dict[str, Solution] = field(default_factory=dict)


class SpikingBertForSequenceClassification(SpikingBertPreTrainedModel):
    """SpikingBertModel with a classifier of num_labels on the pooled rates; pooler and classifier are real."""

    def __init__(self, config: SpikingBertConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.bert = SpikingBertModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        T: int | None = None,
        mode: str | None = None,
        output_hidden_states: bool | None = None,
        output_attention_scores: bool = False,
        output_rates: bool | None = None,
    ) -> SpikingBertClassifierOutput:
        """Logits and, with labels [B] (classes), the mean cross-entropy; the rest as of SpikingBertModel."""
        if labels is not None:
            check_classes(labels, self.num_labels)
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            T=T,
            mode=mode,
            output_hidden_states=output_hidden_states,
            output_attention_scores=output_attention_scores,
            output_rates=output_rates,
        )
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None if labels is None else cross_entropy(logits, labels)
        shared = {name: value for name, value in outputs.items() if name not in ("last_hidden_state", "pooler_output")}
        return SpikingBertClassifierOutput(loss=loss, logits=logits, **shared)

    @torch.no_grad()
    def outputs_after(
        self, T: Sequence[int], input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> dict[int, SpikingBertClassifierOutput]:
        """From one run of max(T) steps, after each number of steps in T: logits, firing_rates and rate_gaps."""
        bert = self.bert
        current, real = bert._input(input_ids, attention_mask, None, None, None)
        names, last = bert.populations(), bert.layer_populations()[-1]
        outputs = {}
        for steps, rates in bert.simulate(current, real, T).items():
            reading = MeasuredRates(rates, real)
            entering = current if bert.feedback is None else current + bert.feedback(rates[last])
            bert._layers(entering, real, reading)
            outputs[steps] = SpikingBertClassifierOutput(
                logits=self.classifier(bert.pooler(rates[last])),
                firing_rates={names[neuron]: real_mean(rate, real) for neuron, rate in rates.items()},
                rate_gaps={names[neuron]: gap for neuron, gap in reading.gaps.items()},
            )
        return outputs


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the batch, in float32 at least."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return nn.functional.cross_entropy(logits.to(wide), labels.long())


def check_classes(labels: torch.Tensor, num_labels: int) -> None:
    """SpikelmError unless labels [B] are integers within 0..num_labels - 1."""
    if labels.is_floating_point() or labels.dim() != 1:
        raise SpikelmError(f"labels must be classes, integers [B]; got {labels.dtype} {tuple(labels.shape)}")
    if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < num_labels):
        wrong = next(int(label) for label in labels if not 0 <= int(label) < num_labels)
        raise SpikelmError(f"labels must be within 0..{num_labels - 1} (num_labels {num_labels}); got {wrong}")
