"""Preference optimisation (DPO, arXiv:2305.18290): the stage that SpikingMamba adds after distillation."""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from spikelm import distributed
from spikelm.data.preferences import pair_lengths, require_trl, tokenise_pairs
from spikelm.data.text import check_tokenizer
from spikelm.distill.arguments import check_rate, training_options
from spikelm.distill.callbacks import MetricsFile, StopAtStepEnd, last_metrics
from spikelm.distill.parallel import same_on_all
from spikelm.distill.robust import find_checkpoint, run_to_the_end
from spikelm.distill.trainer import collate
from spikelm.errors import SpikelmError
from spikelm.evaluate import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pairs = Iterable[Mapping[str, str]]

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

logger = logging.getLogger(__name__)


def train_preferences(
    student: nn.Module,
    reference: nn.Module | None,
    train_pairs: Pairs,
    held_out_pairs: Pairs,
    tokenizer: PreTrainedTokenizerBase,
    *,
    output_dir: str | Path,
    steps: int,
    batch_size: int,
    learning_rate: float = 5e-7,
    threshold_learning_rate: float | None = None,
    beta: float = 0.01,
    gradient_accumulation: int = 1,
    warmup_fraction: float = 0.1,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    schedule: str = "cosine",
    betas: tuple[float, float] = (0.9, 0.95),
    seed: int = 0,
    save_steps: int = 500,
    keep_checkpoints: int = 2,
    max_skipped_updates: int = 3,
    logging_steps: int = 10,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    max_length: int | None = None,
    resume: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Minimise -log sigmoid(beta (q(chosen) - q(rejected))), q = log p - log r, p the student, r the reference.

    Trains `student` in place, in train mode, with AdamW to `steps` updates, from the last whole checkpoint of
    output_dir if any; requires_grad is as the caller has set it. Dropout is off meanwhile, as in TRL. beta and
    learning_rate are ours: SpikingMamba gives none. The loss, and TRL's figures, are means over the pairs (or tokens)
    of the whole update, so that gradient accumulation equals one big batch. Needs TRL.

    Args:
        reference: the distilled student, frozen (its mode and requires_grad are set); None copies the student as given.
        train_pairs, held_out_pairs: rows {"prompt", "chosen", "rejected"} of text, see spikelm.data.preferences.
        tokenizer: without a pad token its eos pads (said in a logged warning); it is not changed.
        batch_size: pairs per forward pass, two sequences each.
        max_length: tokens of prompt and completion; a longer pair is an error. None for no limit.
        others: as in spikelm.distill.trainer.train, log.jsonl and checkpoints included.

    Returns:
        {"steps", "wall_s", "loss", TRL's "rewards/accuracies", "rewards/margins", "logps/chosen", ... of the last log
        line, "held_out": {"before", "after"}: preference_metrics, before as the student is given}.

    Under torchrun or accelerate launch all processes call this together, with equal models and pairs, and share every
    update (DDP; a sharded student is refused). Each has the trained student at the end; the first one writes, and
    measures the held-out pairs for all. A checkpoint does not tell how many processes made it.

    Ctrl-C finishes the step, saves a checkpoint and raises KeyboardInterrupt (one process only).
    """
    require_trl("preference optimisation and its trainer")
    distributed.start()
    if os.environ.get(distributed.LAUNCHED_FSDP) == "true":
        raise SpikelmError("train_preferences keeps the whole student on every process: launch it without --use_fsdp")
    output_dir = Path(output_dir)
    _check(student, reference, tokenizer, beta)
    options = training_options(
        student,
        output_dir=output_dir,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        threshold_learning_rate=threshold_learning_rate,
        gradient_accumulation=gradient_accumulation,
        warmup_fraction=warmup_fraction,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        schedule=schedule,
        betas=betas,
        seed=seed,
        save_steps=save_steps,
        keep_checkpoints=keep_checkpoints,
        max_skipped_updates=max_skipped_updates,
        logging_steps=logging_steps,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
    )
    train_tokens = _tokens("train_pairs", train_pairs, tokenizer, max_length)
    held_out = _tokens("held_out_pairs", held_out_pairs, tokenizer, max_length)
    checkpoint = find_checkpoint(output_dir, steps, resume)
    frozen = copy.deepcopy(student) if reference is None else reference
    frozen.eval().requires_grad_(False)
    if distributed.world_size() > 1:
        same_on_all(student)
        same_on_all(frozen)

    def measured() -> dict[str, float]:
        return distributed.on_first_rank(lambda: _metrics(student, frozen, held_out, beta, batch_size))

    before = measured()
    robust = {"threshold_learning_rate": threshold_learning_rate, "max_skipped_updates": max_skipped_updates}
    _run(student, frozen, train_tokens, tokenizer, options, beta, robust, checkpoint, callbacks)
    metrics = distributed.on_first_rank(lambda: last_metrics(output_dir / "log.jsonl"))
    after = measured()
    result = {"steps": steps, "wall_s": metrics.pop("wall_s"), **{k: v for k, v in metrics.items() if k != "step"}}
    return result | {"held_out": {"before": before, "after": after}}


def preference_metrics(
    model: nn.Module,
    reference: nn.Module,
    pairs: Pairs,
    tokenizer: PreTrainedTokenizerBase,
    *,
    beta: float,
    batch_size: int,
) -> dict[str, float]:
    """How often, and by how much, the implicit reward beta (log p - log r) prefers what was chosen.

    Returns accuracy (mean over pairs of 1, 0, or 1/2 for a tie, so that a copy of the reference has 0.5),
    standard_error = sqrt(variance / pairs) of it, margin (mean difference of the rewards, in nats) and pairs. Models
    are in eval mode meanwhile. SpikelmError when there is no pair or a log-probability is not finite.
    """
    _check(model, None, tokenizer, beta)
    if batch_size < 1:
        raise SpikelmError(f"batch_size must be at least 1, given {batch_size}")
    return _metrics(model, reference, _tokens("pairs", pairs, tokenizer, None), beta, batch_size)


def completion_log_probabilities(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of log p over the labels that are not -100, float64 [B]; batch: input_ids, labels, attention_mask [B, L]."""
    device = next(model.parameters()).device
    given = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    logits = model(**given, use_cache=False).logits[:, :-1]
    targets = batch["labels"][:, 1:].to(device)
    sums = []
    for row, target in zip(logits, targets, strict=True):  # one by one: no second tensor of the logits' size
        counted = target != -100
        chances = torch.log_softmax(row[counted].double(), dim=-1)
        sums.append(chances.gather(-1, target[counted, None]).sum())
    return torch.stack(sums)


@torch.no_grad()
def _metrics(model: nn.Module, reference: nn.Module, tokens: Any, beta: float, batch_size: int) -> dict[str, float]:
    margins: list[float] = []
    with evaluation_mode(model, reference):
        rows_of_all = list(tokens)
        for start in range(0, len(rows_of_all), batch_size):
            rows = rows_of_all[start : start + batch_size]
            # The longest row decides the padding, so both models see the same batch and a copy ties exactly.
            batch = collate([_sequence(row, name) for name in ("chosen_ids", "rejected_ids") for row in rows])
            batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
            ratios = (
                completion_log_probabilities(model, batch).cpu() - completion_log_probabilities(reference, batch).cpu()
            )
            chosen, rejected = ratios.chunk(2)
            margins += (beta * (chosen - rejected)).tolist()
    if not all(map(math.isfinite, margins)):
        raise SpikelmError("a log-probability of the pairs is not finite: the model or the reference has diverged")
    scores = [0.5 if margin == 0 else float(margin > 0) for margin in margins]
    accuracy = math.fsum(scores) / len(scores)
    variance = math.fsum((score - accuracy) ** 2 for score in scores) / len(scores)
    return {
        "accuracy": accuracy,
        "standard_error": math.sqrt(variance / len(scores)),
        "margin": math.fsum(margins) / len(margins),
        "pairs": len(margins),
    }


def _sequence(row: Mapping[str, list[int]], completion: str) -> dict[str, list[int]]:
    """Prompt and completion as a row for collate: labels -100 at the prompt."""
    prompt, answer = row["prompt_ids"], row[completion]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def _tokens(role: str, pairs: Pairs, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Any:
    try:
        tokens = tokenise_pairs(pairs, tokenizer)
    except SpikelmError as error:
        raise SpikelmError(f"{role}: {error}") from error
    if not len(tokens):
        raise SpikelmError(f"{role} holds no pairs")
    longest = max(pair_lengths(tokens))
    if max_length is not None and longest > max_length:
        raise SpikelmError(f"{role}: the longest pair has {longest} tokens, max_length={max_length} are accepted")
    return tokens


def _check(student: nn.Module, reference: nn.Module | None, tokenizer: PreTrainedTokenizerBase, beta: float) -> None:
    model: Any = student
    if reference is student:
        raise SpikelmError("reference and student are the same object: give a copy, or None")
    check_rate("beta", beta)
    check_tokenizer(tokenizer, model.config.vocab_size)
    other: Any = reference
    if other is not None and other.config.vocab_size != model.config.vocab_size:
        raise SpikelmError(
            f"the reference's vocabulary has {other.config.vocab_size} entries, the student's {model.config.vocab_size}"
        )
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:  # TRL multiplies with its weight and never calls it
        raise SpikelmError(f"the student's head is a {type(head).__name__}; a plain nn.Linear is accepted")


def _run(
    student: nn.Module,
    reference: nn.Module,
    tokens: Any,
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
    beta: float,
    robust: Mapping[str, Any],
    checkpoint: Path | None,
    callbacks: Sequence[TrainerCallback],
) -> None:
    """robust: attributes of RobustTrainer."""
    from trl import DPOConfig

    from spikelm.distill.preference_trainer import PreferenceTrainer

    stop = StopAtStepEnd()
    log = MetricsFile(Path(options["output_dir"]) / "log.jsonl")
    # Lengths are checked, so that nothing is to be cut off; TRL's own checkpointing would be a second one.
    fixed: dict[str, Any] = {"loss_type": ["sigmoid"], "max_length": None, "gradient_checkpointing": False}
    if distributed.world_size() > 1:
        fixed["ddp_find_unused_parameters"] = True  # a spiking layer may be silent
    arguments = DPOConfig(**options, **fixed, beta=beta)
    with _left_as_they_were(student, reference), warnings.catch_warnings():
        # TRL 1.16 asks for checkpointing by a name that transformers 5.23 has given up.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        trainer = PreferenceTrainer(
            student,
            reference,
            arguments,
            processing_class=_padding(tokenizer),
            train_dataset=tokens,
            callbacks=[*callbacks, log, stop],  # what they add to a log is written
        )
        for name, value in robust.items():
            setattr(trainer, name, value)
        run_to_the_end(trainer, checkpoint, stop)


def _padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that has a pad token: the trainer would set it on the caller's."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise SpikelmError("the tokenizer has neither a pad nor an eos token: set tokenizer.pad_token")
        if distributed.is_first():
            logger.warning("the tokenizer has no pad token: its eos token %s pads (masked)", tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _left_as_they_were(*models: Any) -> Iterator[None]:
    """Undo what the trainers write on models: a forward with a fused head, special tokens, no dropout, tags."""
    configurations = [c for model in models for c in (model.config, model.generation_config)]
    special = [(c, name, getattr(c, name)) for c in configurations for name in SPECIAL_TOKENS]
    tags = [(model, model.model_tags) for model in models]
    dropouts = [(m, m.p) for model in models for m in model.modules() if isinstance(m, nn.Dropout)]
    forwards = [(model, model.__dict__.get("forward")) for model in models]
    try:
        yield
    finally:
        for configuration, name, token in special:
            setattr(configuration, name, token)
        for model, before in tags:
            model.model_tags = before
        for module, p in dropouts:
            module.p = p
        for model, forward in forwards:
            model.__dict__.pop("_original_forward", None)  # accelerate's, where it has put autocast around forward
            model.__dict__.pop("forward", None)
            if forward is not None:
                model.forward = forward
