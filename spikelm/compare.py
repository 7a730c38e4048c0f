"""What several models are worth, in one table: perplexity, bits per byte, KL to a teacher, tasks of lm-eval."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from spikelm.data import bytes_per_token, check_tokenizer, load_contexts, load_teacher
from spikelm.data.sources import source_names
from spikelm.errors import SpikelmError
from spikelm.evaluate import evaluate
from spikelm.interop.lm_eval import check_max_length, evaluate_tasks, load_tasks, longest_context
from spikelm.limits import check_directory
from spikelm.run import versions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CONTEXT_LENGTH = 256
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Measures:
    """What is measured, the same for every model of a table.

    data: a text as spikelm.data.load_contexts takes it, or None. context_length: tokens of a context, None for 256 or
        what the models take if that is less. held_out: None measures the whole text, a fraction its last part, as the
        examples do. max_contexts: only the first ones, None for all.
    tasks, target_delimiter, max_length, limit, num_fewshot, seed: see spikelm.interop.lm_eval.
    batch_size: contexts, and requests of lm-eval, at a time.
    """

    data: str | Path | None = None
    context_length: int | None = None
    held_out: float | None = None
    max_contexts: int | None = None
    tasks: Sequence[Any] = ()
    target_delimiter: str | None = None
    max_length: int | None = None
    limit: int | None = None
    num_fewshot: int = 0
    seed: int = 0
    batch_size: int = 8

    def resolve(self, configs: Iterable[PretrainedConfig]) -> Measures:
        """A copy with a context length that all models take and the tasks loaded; SpikelmError for what cannot be."""
        if self.data is None and not self.tasks:
            raise SpikelmError("nothing is measured: data, tasks, or both are needed")
        if self.data is not None:
            source_names(self.data)
        limits = [limit for config in configs if (limit := longest_context(config)) is not None]
        longest = min(limits, default=None)
        length = self.context_length or min(CONTEXT_LENGTH, longest or CONTEXT_LENGTH)
        if longest is not None and length > longest:
            raise SpikelmError(f"context_length={length}: one of the models takes at most {longest} tokens")
        for name in ("context_length", "max_contexts", "limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SpikelmError(f"{name}={value}: at least 1 is accepted")
        tasks = load_tasks(self.tasks, self.target_delimiter) if self.tasks else ()
        return replace(self, context_length=length, tasks=tasks, target_delimiter=None)


def score_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    measures: Measures,
    teacher: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """One model's figures: {"parameters", "text": evaluate()'s figures or None, "tasks": evaluate_tasks()'s or None}.

    Raises SpikelmError for what evaluate and evaluate_tasks refuse.
    """
    measures = measures.resolve(each.config for each in (model, teacher) if each is not None)
    figures: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    figures["text"] = None if measures.data is None else _text_figures(model, tokenizer, measures, teacher)
    figures["tasks"] = None
    if measures.tasks:
        figures["tasks"] = evaluate_tasks(
            model,
            tokenizer,
            measures.tasks,
            max_length=measures.max_length,
            batch_size=measures.batch_size,
            limit=measures.limit,
            num_fewshot=measures.num_fewshot,
            seed=measures.seed,
        )
    return figures


def compare_models(
    names: Sequence[str],
    measures: Measures,
    *,
    teacher: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Figures of models in directories or on the Hub, one in memory at a time (and the teacher).

    Returns {"models": {name: score_model's figures}, "teacher", "settings", "versions"}, which comparison_table shows
    and JSON takes. What can be refused without loading weights is refused before the first model runs: SpikelmError.
    """
    if len({Path(name).resolve() if Path(name).is_dir() else name for name in names}) < len(names):
        raise SpikelmError(f"every model is given once; got {', '.join(names)}")
    check_device(device, dtype)
    opened = {name: check_model(name) for name in names}
    configs = [config for config, _ in opened.values()]
    if teacher is not None:
        if measures.data is None:
            raise SpikelmError("a teacher is compared with on a text: data is needed")
        teacher_config, teacher_tokenizer = check_model(teacher, "teacher")
        for name, (config, tokenizer) in opened.items():
            check_vocabularies(name, (config, tokenizer), teacher, (teacher_config, teacher_tokenizer))
        configs.append(teacher_config)
    resolved = measures.resolve(configs)
    if resolved.tasks:
        for config, _ in opened.values():
            check_max_length(config, resolved.max_length)
    reference = None if teacher is None else open_model(teacher, device, dtype, "teacher")[0]
    figures = {}
    for name in tqdm(names, desc="models", file=sys.stderr, disable=len(names) < 2):
        figures[name] = score_model(*open_model(name, device, dtype), resolved, reference)
    settings = asdict(replace(resolved, tasks=())) | {"device": device, "dtype": dtype}
    settings |= {
        "data": None if measures.data is None else str(measures.data),
        "tasks": [str(t) for t in measures.tasks],
    }
    settings["target_delimiter"] = measures.target_delimiter
    return {"models": figures, "teacher": teacher, "settings": settings, "versions": versions()}


def comparison_table(result: Mapping[str, Any], metrics: Sequence[str] | None = None) -> str:
    """A Markdown table of what compare_models found: models by row; tasks' metrics (None: all) and standard errors."""
    rows = [{"model": name} | _cells(figures, metrics) for name, figures in result["models"].items()]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def check_model(name: str, role: str = "model") -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """(configuration, tokenizer) of a model in a directory or on the Hub, whose weights stay where they are.

    SpikelmError, naming the role, where one is missing, or where it would need code of its own to be run.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise SpikelmError(f"{role} {name} holds no config.json; a directory written by save_pretrained is accepted")
    check_directory(name, role)
    found: list[Any] = []
    for what, auto in (("configuration", AutoConfig), ("tokenizer", AutoTokenizer)):
        try:
            found.append(auto.from_pretrained(name, trust_remote_code=False))
        except Exception as error:  # files, network, and each class in its own way; the cause stays chained
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SpikelmError(f"{role} {name} has no {what} that can be loaded: {reason}") from error
    config, tokenizer = found
    # Also keeps transformers from offering to run code that the model brings for want of its own.
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SpikelmError(f"{role} {name} is a {config.model_type}; a causal LM is accepted")
    try:
        check_tokenizer(tokenizer, config.vocab_size)
    except SpikelmError as error:
        raise SpikelmError(f"{role} {name}: {error}") from error
    return config, tokenizer


def check_vocabularies(name: str, model: tuple[Any, Any], teacher_name: str, teacher: tuple[Any, Any]) -> None:
    """SpikelmError unless both, as check_model opened them, have the same tokens under the same numbers."""
    sizes = [getattr(config, "vocab_size", None) for config, _ in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise SpikelmError(
            f"model {name} has a vocabulary of {sizes[0]}, teacher {teacher_name} one of {sizes[1]}: the same is needed"
        )
    if model[1].get_vocab() != teacher[1].get_vocab():
        raise SpikelmError(f"model {name} and teacher {teacher_name} have other tokens under the same numbers")


def open_model(
    name: str, device: str = "cpu", dtype: str = "float32", role: str = "model"
) -> tuple[Any, PreTrainedTokenizerBase]:
    """(model in eval mode, frozen; tokenizer) of a causal LM in a directory or on the Hub; SpikelmError otherwise."""
    check_device(device, dtype)
    check_model(name, role)
    model, tokenizer = load_teacher(name, role)
    placed: nn.Module = model
    return placed.to(device=torch.device(device), dtype=getattr(torch, dtype)), tokenizer


def check_device(device: str, dtype: str) -> None:
    """SpikelmError for a device that torch cannot use here, or another dtype than those of DTYPES."""
    if dtype not in DTYPES:
        raise SpikelmError(f"dtype={dtype!r}: {', '.join(DTYPES)} are accepted")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the second by a torch without CUDA
        reason = str(error).strip().splitlines()[0]
        raise SpikelmError(f"device={device!r} cannot be used here: {reason}") from error


def read_contexts(measures: Measures, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The contexts of a text that are measured, rows {"input_ids"}; measures.context_length is their length."""
    from datasets import concatenate_datasets

    assert measures.data is not None and measures.context_length is not None
    part = 0.5 if measures.held_out is None else measures.held_out
    first, last = load_contexts(measures.data, tokenizer, measures.context_length, held_out=part)
    rows: Any = last if measures.held_out is not None else concatenate_datasets([first, last])
    return rows if measures.max_contexts is None else rows.select(range(min(measures.max_contexts, len(rows))))


def _text_figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    measures: Measures,
    teacher: PreTrainedModel | None,
) -> dict[str, Any]:
    rows = read_contexts(measures, tokenizer)
    return evaluate(
        model,
        tqdm(rows, desc="contexts", file=sys.stderr),
        teacher=teacher,
        batch_size=measures.batch_size,
        bytes_per_token=bytes_per_token(rows, tokenizer),
    )


def _cells(figures: Mapping[str, Any], metrics: Sequence[str] | None) -> dict[str, str]:
    """A model's row by column."""
    cells = {"parameters": f"{figures['parameters']:,}"}
    text = figures["text"] or {}
    names = {"perplexity": "perplexity", "bits_per_byte": "bits per byte", "kl_to_teacher": "KL to teacher"}
    cells |= {title: f"{text[name]:.3f}" for name, title in names.items() if text.get(name) is not None}
    for task, found in (figures["tasks"] or {"tasks": {}})["tasks"].items():
        chosen = {name: value for name, value in found["metrics"].items() if metrics is None or name in metrics}
        for metric, value in chosen.items():
            error = found["stderr"].get(metric)
            cells[f"{task} {metric}"] = f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")
    return cells
