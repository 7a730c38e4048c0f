"""lm-evaluation-harness on any causal LM of transformers, spiking ones included: its own tasks, and local JSONL files.

A local task is a file of one object a line, read without a network:

    {"prompt": "Question: ...\\nAnswer:", "choices": [" yes", " no"], "answer": 0}     multiple choice
    {"sentence_good": "...", "sentence_bad": "..."}                                    a minimal pair, as in BLiMP

Other fields are ignored. The figures of a local task are those of lm-eval for a task of the same text.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikelm.data.sources import line_rows
from spikelm.errors import SpikelmError
from spikelm.evaluate import evaluation_mode

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 2048  # lm-eval's own, for models that name no limit
SUFFIX = ".jsonl"
METRICS = ("acc", "acc_norm")
FORMATS = '{"prompt": ..., "choices": [...], "answer": 0} or {"sentence_good": ..., "sentence_bad": ...}'
# What lm-eval says of the way it is called here, which no user chose.
EXPECTED = ("`pretrained` model kwarg", "already-initialized model", "Custom kwargs can be passed", "from None to")


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Any],
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of a causal LM on tasks of lm-evaluation-harness.

    Args:
        tasks: paths of local .jsonl files, names of lm-eval's own tasks, groups and tags (their data comes from the
            Hub), or what :func:`load_tasks` made of either.
        max_length: tokens that the model sees at once; None takes the configuration's number of positions, or 2048
            where it has none. What is longer loses its beginning, and is counted.
        limit: only so many examples of each task.
        num_fewshot: examples before the question; minimal pairs never have any, as in lm-eval.
        seed: of the choice of these examples; lm-eval seeds the global generators with it too.

    Returns:
        {"tasks": {name: {"metrics": {"acc": ...}, "stderr": {...}, "examples", "num_fewshot"}}, "max_length",
        "truncated": inputs that lost their beginning, "lm_eval": its version}. acc takes the choice of the highest
        log-likelihood, acc_norm the one of the highest per character.

    Raises:
        SpikelmError: lm-eval is not installed, an unknown task, data that cannot be loaded, a malformed line (named by
            its number), a choice longer than max_length, a tokenizer without bos and eos.
    """
    lm_eval, HFLM = _harness()
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise SpikelmError("the tokenizer has neither bos nor eos, with one of which lm-eval starts an empty context")
    for name, value in {"batch_size": batch_size, "limit": limit}.items():
        if value is not None and value < 1:
            raise SpikelmError(f"{name}={value}: at least 1 is accepted")
    if not 0 <= seed < 2**32:
        raise SpikelmError(f"seed={seed}: 0 to {2**32 - 1} are accepted")
    length = check_max_length(model.config, max_length)
    loaded = load_tasks(tasks)
    for task in loaded:
        _check_rows(task, tokenizer, length, num_fewshot, limit)
    with evaluation_mode(model), _messages() as messages, _shots_as_before(loaded):
        # lm-eval gives the tokenizer a padding token.
        harness = HFLM(pretrained=model, backend="causal", tokenizer=copy.deepcopy(tokenizer), max_length=length,
                       batch_size=batch_size)  # fmt: skip
        result = lm_eval.simple_evaluate(
            harness, tasks=loaded, task_manager=_manager(False), num_fewshot=num_fewshot, limit=limit,
            log_samples=False, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed,
        )  # fmt: skip
    return {
        "tasks": _figures(result),
        "max_length": length,
        "truncated": messages.truncated,
        "lm_eval": lm_eval.__version__,
    }


def load_tasks(tasks: Sequence[Any], target_delimiter: str | None = None) -> list[Any]:
    """lm-eval's task objects for paths of .jsonl files and names; what is a task already stays.

    target_delimiter stands between prompt and choice of local files. None is lm-eval's own way: a blank before a
    sentence of a pair, and before choices that all begin with one, which then does not count as a character of
    acc_norm; otherwise nothing. Raises SpikelmError as evaluate_tasks does, and for two tasks of one name.
    """
    _harness()
    if not tasks:
        raise SpikelmError(f"no task is given: paths of {SUFFIX} files and names of lm-eval's tasks are accepted")
    local = [task for task in tasks if isinstance(task, str | Path) and _is_file(task)]
    files = {task: local_task(task, target_delimiter) for task in local}
    if target_delimiter is not None and not files:
        raise SpikelmError(f"target_delimiter={target_delimiter!r} is of local {SUFFIX} files, of which none is given")
    loaded: list[Any] = []
    for task in tasks:
        if isinstance(task, str | Path):
            loaded += [files[task]] if task in files else _registered(str(task))
        else:
            loaded.append(task)
    names = [leaf.task_name for task in loaded for leaf in _leaves(task)]
    for name in names:
        if names.count(name) > 1:
            raise SpikelmError(f"two of the tasks are called {name!r}; their figures would be one")
    return loaded


def local_task(path: str | Path, target_delimiter: str | None = None) -> Any:
    """The task object of a .jsonl file, named as the file; see :func:`load_tasks`."""
    _harness()
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    rows, pairs = read_rows(path)
    if target_delimiter is None:
        spaced = all(choice[0] == " " and choice[1:2].strip() for row in rows for choice in row["choices"])
        if spaced:
            rows = [row | {"choices": [choice[1:] for choice in row["choices"]]} for row in rows]
        target_delimiter = " " if pairs or spaced else ""
    config = {
        "task": Path(path).stem,
        "custom_dataset": lambda **metadata: DatasetDict(test=Dataset.from_list(rows)),
        "test_split": "test",
        "fewshot_split": "test",  # lm-eval leaves the question itself out where this is the test split, and only there
        "output_type": "multiple_choice",
        # Functions, because a string is a template, and the text of a prompt may look like one.
        "doc_to_text": lambda row: row["prompt"],
        "doc_to_choice": lambda row: row["choices"],
        "doc_to_target": lambda row: row["answer"],
        "target_delimiter": target_delimiter,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
        "num_fewshot": 0 if pairs else None,
    }
    with _messages():
        return ConfigurableTask(config=config)


def read_rows(path: str | Path) -> tuple[list[dict[str, Any]], bool]:
    """(rows {"prompt", "choices", "answer"}, whether they are minimal pairs) of a local task's file.

    SpikelmError names the file, and the line of what is malformed.
    """
    path = Path(path)
    if path.suffix != SUFFIX or not path.is_file():
        raise SpikelmError(f"{path} is no task: {_accepted(path.parent)}")
    rows: list[dict[str, Any]] = []
    kinds: set[bool] = set()
    for number, row in line_rows(str(path)):
        pair = "sentence_good" in row
        kinds.add(pair)
        fault = _pair_fault(row) if pair else _choice_fault(row)
        if len(kinds) > 1:
            fault = "is of another kind than the lines before it"
        if fault:
            raise SpikelmError(f"{path} line {number} {fault}; accepted: {FORMATS}")
        rows.append(
            {"prompt": "", "choices": [row["sentence_good"], row["sentence_bad"]], "answer": 0}
            if pair
            else {"prompt": row["prompt"], "choices": list(row["choices"]), "answer": row["answer"]}
        )
    if not rows:
        raise SpikelmError(f"{path} is empty; accepted, one a line: {FORMATS}")
    return rows, kinds == {True}


def longest_context(config: PretrainedConfig) -> int | None:
    """Tokens that a model of this configuration takes at most; None without a limit, as for recurrent models."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    # A Llamba keeps its Llama's number of positions, which binds it as little as any recurrent model.
    return None if getattr(model_class, "_is_stateful", False) else _positions(config)


def check_max_length(config: PretrainedConfig, max_length: int | None) -> int:
    """The tokens that lm-eval shows a model at once; SpikelmError for more than it takes."""
    if max_length is None:
        return _positions(config) or DEFAULT_MAX_LENGTH
    longest = longest_context(config)
    if max_length < 2 or (longest is not None and max_length > longest):
        raise SpikelmError(f"max_length={max_length}: 2 to {longest or 'any number'} is what this model takes")
    return max_length


def _positions(config: PretrainedConfig) -> int | None:
    names = ("max_position_embeddings", "n_positions")
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _pair_fault(row: Mapping[str, Any]) -> str | None:
    for name in ("sentence_good", "sentence_bad"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"has no text in {name!r}"
    return None


def _choice_fault(row: Mapping[str, Any]) -> str | None:
    missing = [name for name in ("prompt", "choices", "answer") if name not in row]
    if missing:
        return f"has no {missing[0]!r}"
    prompt, choices, answer = row["prompt"], row["choices"], row["answer"]
    if not isinstance(prompt, str) or (prompt and not prompt.strip()):
        return f"has the prompt {prompt!r}, which is no text"
    if not isinstance(choices, list) or len(choices) < 2:
        return "has no list of at least two choices"
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        return "has a choice without text"
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        return f"has the answer {answer!r}, which is no index of its {len(choices)} choices (the first is 0)"
    return None


def _is_file(task: str | Path) -> bool:
    return isinstance(task, Path) or task.endswith(SUFFIX) or Path(task).is_file()


def _accepted(directory: Path) -> str:
    found = sorted(path.name for path in directory.glob(f"*{SUFFIX}")) if directory.is_dir() else []
    here = f"{', '.join(found[:8])}{', ...' if len(found) > 8 else ''}" if found else "none"
    return f"a {SUFFIX} file (in {directory}: {here}) or the name of a task of lm-eval is accepted"


def _registered(name: str) -> list[Any]:
    """The tasks, or the group, that lm-eval has under a name, with their data."""
    manager = _manager(True)
    if name not in manager.all_tasks:
        close = difflib.get_close_matches(name, manager.all_tasks, n=5)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise SpikelmError(f"{name} is no task: {_accepted(Path())}{hint}")
    try:
        with _messages():
            loaded = manager.load([name])
    except Exception as error:  # the network, the Hub's client and the readers of file formats; the cause stays chained
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SpikelmError(
            f"task {name}: its data cannot be loaded ({reason}); lm-eval's own tasks take it from the Hub or its "
            f"cache, a local {SUFFIX} file needs neither"
        ) from error
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _leaves(task: Any) -> list[Any]:
    """The tasks of a group, or the task itself."""
    return list(task.get_all_tasks()) if hasattr(task, "get_all_tasks") else [task]


def _check_rows(
    task: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, num_fewshot: int, limit: int | None
) -> None:
    """Refuses in a local task what lm-eval would stop at: too few examples, a choice too long to be cut."""
    if getattr(getattr(task, "config", None), "custom_dataset", None) is None:
        return
    name, rows = task.task_name, task.eval_docs
    if task.config.num_fewshot is None and not 0 <= num_fewshot < len(rows):
        raise SpikelmError(
            f"num_fewshot={num_fewshot}: task {name} has 0 to {len(rows) - 1} examples beside a question"
        )
    for number, row in enumerate(itertools.islice(rows, limit), 1):
        for choice in row["choices"]:
            tokens = len(tokenizer(choice, add_special_tokens=False, verbose=False)["input_ids"])
            if tokens >= max_length:
                raise SpikelmError(
                    f"task {name}, example {number}: a choice has {tokens} tokens, which does not fit into "
                    f"max_length={max_length}"
                )


def _figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's results by task and group; a metric of the filter "none" goes by its own name."""
    figures: dict[str, Any] = {}
    for name, found in result["results"].items():
        metrics: dict[str, float] = {}
        stderr: dict[str, float] = {}
        for key, value in found.items():
            metric, comma, chosen = key.partition(",")
            if comma and isinstance(value, int | float) and math.isfinite(value):  # no error of a single example
                where = stderr if metric.endswith("_stderr") else metrics
                metric = metric.removesuffix("_stderr")
                where[metric if chosen == "none" else f"{metric},{chosen}"] = float(value)
        examples = result["n-samples"].get(name, {}).get("effective")
        shots = result["n-shot"].get(name)
        figures[name] = {"metrics": metrics, "stderr": stderr, "examples": examples, "num_fewshot": shots}
    return figures


@cache
def _manager(own_tasks: bool) -> Any:
    """lm-eval's index of tasks, with its own ones or empty; reading these takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=own_tasks)


def _harness() -> tuple[Any, Any]:
    """(lm_eval, its class for models of transformers)."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise SpikelmError(f'tasks need lm-evaluation-harness ({error}): pip install "spikelm[eval]"') from error
    return lm_eval, HFLM


@contextmanager
def _shots_as_before(tasks: list[Any]) -> Iterator[None]:
    """lm-eval writes num_fewshot into a task, and a 0 that it finds there outweighs what the next call asks for."""
    leaves = [leaf for task in tasks for leaf in _leaves(task)]
    before = [leaf.config.num_fewshot for leaf in leaves]
    try:
        yield
    finally:
        for leaf, number in zip(leaves, before, strict=True):
            leaf.config.num_fewshot = number


class _Messages(logging.Handler):
    """Counts the inputs that lm-eval truncates; passes on to stderr, once each, what else it warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.truncated = 0
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "exceeds model's maximum length" in message:
            self.truncated += 1
        elif message not in self.said and not any(part in message for part in EXPECTED):
            self.said.add(message)
            print(f"lm-eval: {message}", file=sys.stderr)


@contextmanager
def _messages() -> Iterator[_Messages]:
    logger, handler = logging.getLogger("lm_eval"), _Messages()
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
