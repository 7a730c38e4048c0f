"""What the examples share: a teacher, its data, stages that are trained once, and the figures of what came out."""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from spikelm import distributed, plot
from spikelm.calibrate import calibrate
from spikelm.convert import Recipe, spike_sites, spikify
from spikelm.data import bytes_per_token, load_contexts, load_teacher, python_documentation, train_teacher
from spikelm.data.sources import source_names
from spikelm.distill.arguments import check_options
from spikelm.distill.callbacks import last_metrics
from spikelm.distill.objectives import Objective, batch_mask
from spikelm.distill.parallel import Parallel
from spikelm.distill.trainer import collate, train
from spikelm.errors import SpikelmError
from spikelm.evaluate import batches, evaluate, evaluation_mode, firing_statistics, generate_sample
from spikelm.files import remove, sha256
from spikelm.presets import from_dict
from spikelm.run import BAD_DOCUMENTS, RunDirectory, first_difference, stage_manifest


@dataclass(frozen=True)
class Optimisation:
    """One training run, see :func:`spikelm.distill.trainer.train`. The papers print few of these values."""

    steps: int = 0
    batch_size: int = 16
    learning_rate: float = 3e-3
    threshold_learning_rate: float | None = None
    gradient_accumulation: int = 1
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    save_steps: int = 500
    keep_checkpoints: int = 2
    max_skipped_updates: int = 3
    bf16: bool = False
    gradient_checkpointing: bool = False

    def check(self, name: str) -> None:
        """SpikelmError, saying that it is of the field ``name``, for a value that a training would refuse."""
        try:
            check_options(**asdict(self))
        except SpikelmError as error:
            raise SpikelmError(f"{name}: {error}") from error


@dataclass(frozen=True)
class Settings:
    """What every example's configuration begins with: the teacher, the text, and how students are measured.

    parallel: where several processes keep the models; no part of what a run is.
    max_bad_documents: so many documents that cannot be read are left out (`load_contexts`); no part of it either.
    """

    output_dir: str
    teacher: str = "embedded"
    data: str = "embedded"
    text_field: str | None = None
    streaming: bool = False
    max_tokens: int | None = None
    max_bad_documents: int = 10
    context_length: int = 128
    held_out: float = 0.05
    seed: int = 0
    evaluation_contexts: int | None = None
    prompt: str = "Once upon a time"
    sample_tokens: int = 60
    parallel: Parallel = Parallel()

    def check(self) -> None:
        """SpikelmError for what would be refused only once a teacher is trained or the data read."""
        names = source_names(self.data)
        counts = {"evaluation_contexts": self.evaluation_contexts, "sample_tokens": self.sample_tokens}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise SpikelmError(f"{name} must be at least 1, given {count}")
        if self.max_bad_documents < 0:
            raise SpikelmError(f"max_bad_documents must be at least 0, given {self.max_bad_documents}")
        if self.teacher != "embedded" or "embedded" not in names:
            return
        if len(names) > 1 or self.streaming:  # other contexts would be held out than the teacher has not seen
            raise SpikelmError("the embedded teacher takes data=embedded alone, without streaming, or other text")


@dataclass(frozen=True)
class EmbeddedLlama:
    """The Llama trained on the spot for teacher=embedded."""

    steps: int = 1200
    vocab_size: int = 512
    hidden_size: int = 64
    num_hidden_layers: int = 4
    intermediate_size: int = 176
    batch_size: int = 16
    learning_rate: float = 6e-3


@dataclass
class Experiment:
    """A run directory, the teacher on its device, and the packed text."""

    settings: Settings
    run: RunDirectory
    teacher: PreTrainedModel
    tokenizer: Any
    train_data: Any
    held_out: Any
    bytes_per_token: float

    @classmethod
    def open(cls, settings: Settings, run: RunDirectory, teacher: str | Path) -> Experiment:
        """Loads the teacher (a directory or Hub id) and reads the data; seeds every random generator after it."""
        model, tokenizer = load_teacher(teacher)
        longest = getattr(model.config, "max_position_embeddings", settings.context_length)
        if settings.context_length > longest:
            raise SpikelmError(f"context_length {settings.context_length} is beyond the teacher's {longest}")

        def read() -> Any:
            bad: list[dict[str, Any]] = []
            contexts = load_contexts(
                settings.data, tokenizer, settings.context_length, held_out=settings.held_out,
                text_field=settings.text_field, streaming=settings.streaming, max_tokens=settings.max_tokens,
                max_bad_documents=settings.max_bad_documents, bad_documents=bad,
            )  # fmt: skip
            if bad or run.path(BAD_DOCUMENTS).exists():
                run.write_json(BAD_DOCUMENTS, bad)
            return contexts

        train_data, held_out = read() if settings.streaming else packed_once(run, read, settings, tokenizer)
        device: Any = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device)
        set_seed(settings.seed)  # so that a run that finds its teacher there starts like the run that trained it
        return cls(settings, run, model, tokenizer, train_data, held_out, bytes_per_token(held_out, tokenizer))

    def evaluate(self, model: PreTrainedModel) -> dict[str, Any]:
        """Held-out figures of a model against the teacher, and a greedy text; by the first process, for all."""

        def figures() -> dict[str, Any]:
            found = evaluate(
                model,
                self.held_out,
                teacher=self.teacher,
                bytes_per_token=self.bytes_per_token,
                max_contexts=self.settings.evaluation_contexts,
            )
            sample = generate_sample(model, self.tokenizer, self.settings.prompt, self.settings.sample_tokens)
            return found | {"sample": sample}

        return distributed.on_first_rank(figures)

    def train(
        self,
        name: str,
        student: PreTrainedModel,
        teacher: nn.Module,
        objective: Objective,
        optimisation: Optimisation,
        dataset: Any = None,
        **more: Any,
    ) -> dict[str, Any]:
        """One training run, resumed where an earlier one stopped; checkpoints and log in training/<name>.

        dataset: other rows than train_data.  more: further arguments of `spikelm.distill.trainer.train`.
        """
        return train(
            student,
            teacher,
            self.train_data if dataset is None else dataset,
            objective,
            output_dir=self.run.path("training") / name,
            seed=self.settings.seed,
            parallel=self.settings.parallel,
            **asdict(optimisation),
            **more,
        )

    def stage(
        self, name: str, build: Callable[[], tuple[PreTrainedModel, dict[str, Any]]], asked: bool = True
    ) -> PreTrainedModel | None:
        """The model of a finished stage; builds and saves it where it is asked for and not there; None if neither."""
        return (
            trained_stage(self.run, name, build, self.load, self.tokenizer) if asked or self.run.is_done(name) else None
        )

    def load(self, name: str) -> PreTrainedModel:
        """The model of a finished stage."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.run.path(name))
        return model.to(self.teacher.device).eval()

    def spiking_copy(
        self, dense: PreTrainedModel, recipe: Recipe, contexts: int, max_sum_of_rates: float | None = None
    ) -> PreTrainedModel:
        """A copy of the dense model with neurons, their thresholds calibrated on the first training contexts."""
        student = copy.deepcopy(dense).requires_grad_(True)
        spikify(student, recipe)
        rows = batches(list(self.train_data.take(contexts)), 4)
        inputs = ({"input_ids": ids.to(dense.device), "logits_to_keep": 1} for ids in rows)
        tokens = contexts * self.settings.context_length
        calibrate(student, inputs, tokens_per_site=tokens, max_sum_of_rates=max_sum_of_rates)
        return student

    def held_out_terms(
        self, objective: Objective, student: nn.Module, contexts: int = 64, batch_size: int = 16
    ) -> dict[str, float]:
        """The objective's terms on the first held-out contexts, in eval mode: without training-only paths."""
        return distributed.on_first_rank(lambda: self._held_out_terms(objective, student, contexts, batch_size))

    @torch.no_grad()
    def _held_out_terms(
        self, objective: Objective, student: nn.Module, contexts: int, batch_size: int
    ) -> dict[str, float]:
        sums: dict[str, float] = {}
        tokens = 0
        with evaluation_mode(student):
            for ids in batches(self.held_out, batch_size, contexts):
                batch = collate([{"input_ids": row} for row in ids])
                batch = {name: value.to(self.teacher.device) for name, value in batch.items()}
                count = int(batch_mask(batch).sum())
                for name, value in objective(student, self.teacher, batch, None).items():
                    sums[name] = sums.get(name, 0.0) + count * value.item()
                tokens += count
        return {name: value / tokens for name, value in sums.items()}

    def firing(self, student: PreTrainedModel) -> dict[str, Any]:
        """Firing statistics on held-out text, drawn to figures/firing.png, and a sentence to figures/raster.png."""
        statistics = firing_statistics(student, self.held_out, max_contexts=self.settings.evaluation_contexts)
        plot.firing_heatmap(statistics, self.figure("firing.png"))
        draw_raster(student, self.held_out[0]["input_ids"][:32], self.tokenizer, self.figure("raster.png"))
        return statistics

    def figure(self, name: str) -> Path:
        """Where a picture of this run goes."""
        figures = self.run.path("figures")
        figures.mkdir(exist_ok=True)
        return figures / name

    def log_of(self, stage: str) -> Path:
        """The log of a stage's training."""
        return self.run.path("training") / stage / "log.jsonl"


def trained_stage(
    run: RunDirectory,
    name: str,
    build: Callable[[], tuple[PreTrainedModel, dict[str, Any]]],
    load: Callable[[str], PreTrainedModel],
    tokenizer: Any,
) -> PreTrainedModel:
    """load(name) where the stage is finished; else what build() gives with a record, saved with the tokenizer."""

    def delete_checkpoints() -> None:  # the optimiser's state; log.jsonl stays
        if distributed.is_first():
            for checkpoint in list((run.path("training") / name).glob("**/checkpoint*")):
                remove(checkpoint)

    if run.is_done(name):
        delete_checkpoints()  # a process may have been killed on the way to it
        return load(name)
    say(f"{name}: training")
    start = time.monotonic()
    model, record = build()
    model.eval()
    record |= {"total_s": round(time.monotonic() - start, 1)}

    def save(directory: Path) -> None:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    run.finish_stage(name, save, record)
    delete_checkpoints()
    return model


def packed_once(run: RunDirectory, read: Callable[[], Any], settings: Settings, tokenizer: Any) -> Any:
    """The two data sets that `read()` gives; of several processes the first reads, and all map them from the disk.

    What a run has packed serves it again; SpikelmError where its settings, tokenizer or a file have changed since.
    """
    if distributed.world_size() == 1 and not run.path("contexts").exists():
        return read()
    from datasets import load_from_disk

    source = distributed.on_first_rank(lambda: _source_fingerprint(settings, tokenizer))

    def write(directory: Path) -> None:
        for name, rows in zip(("train", "held_out"), read(), strict=True):
            rows.save_to_disk(directory / name)

    if not run.is_done("contexts"):
        run.finish_stage("contexts", write, {"source": source})
    before = run.stage_record("contexts").get("source")
    difference = first_difference(before or {}, source)
    if difference is not None:
        raise SpikelmError(
            f"{run.path('contexts')} was packed from other data ({difference}): choose another output_dir"
        )
    return [load_from_disk(str(run.path("contexts") / name)) for name in ("train", "held_out")]


def _source_fingerprint(settings: Settings, tokenizer: Any) -> dict[str, Any]:
    """What packed contexts depend on; files by their content (reading 1 GB takes about 1 s), a Hub dataset by name."""
    names = ("data", "text_field", "max_tokens", "context_length", "held_out")
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {name: getattr(settings, name) for name in names} | {
        "files": {name: file_fingerprint(name) for name in source_names(settings.data)},
        "python": platform.python_version() if "embedded" in source_names(settings.data) else None,
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
    }


AnySettings = TypeVar("AnySettings")


def finished_settings(settings_class: type[AnySettings], directory: str | Path, stage: str) -> AnySettings:
    """The configuration of the finished run in ``directory``, which has ``stage``; its own teacher by its path.

    settings_class: a dataclass with a field ``teacher``.
    """
    source = Path(directory)
    if not (source / "metrics.json").exists() or not (source / stage).exists():
        raise SpikelmError(f"run must be the output_dir of a finished train.py with a {stage}; got {directory}")
    stage_manifest(source / stage)  # whole, or an error
    try:
        saved = json.loads((source / "metrics.json").read_text(encoding="utf-8"))["config"]
        settings: Any = from_dict(settings_class, saved)
    except (SpikelmError, ValueError, KeyError) as error:
        raise SpikelmError(f"run {directory} is not one of this example's train.py (or of another version)") from error
    if settings.teacher != "embedded":
        return settings
    stage_manifest(source / "teacher")
    return replace(settings, teacher=str(source / "teacher"))


def weights_fingerprint(directory: str | Path) -> str:
    """Of a saved model's weights, so that results of another model are never mixed in; "none" where there are none."""
    digests = [file_fingerprint(path) for path in sorted(Path(directory).glob("*.safetensors"))]
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else "none"


def file_fingerprint(path: str | Path) -> str:
    """Of a file's content; "none" where there is no such file, as for a Hub dataset's name."""
    return sha256(path) if Path(path).is_file() else "none"


def embedded_teacher(settings: Settings, run: RunDirectory, model_type: str, shape: dict[str, Any]) -> str:
    """The directory of the small teacher that is trained on Python's documentation, once per run.

    The contexts that the run holds out of that text are not trained on.
    """
    path = run.path("teacher")
    if not run.is_done("teacher"):
        say(f"teacher: training a small {model_type} on Python's documentation")
        train_teacher(
            path, python_documentation(), model_type=model_type, context_length=settings.context_length,
            max_tokens=settings.max_tokens if settings.data == "embedded" else None, held_out=settings.held_out,
            seed=settings.seed, **shape,
        )  # fmt: skip
    return str(path)


def teacher_seconds(run: RunDirectory) -> dict[str, float]:
    """How long the embedded teacher trained, if there is one."""
    log = run.path("teacher") / "log.jsonl"
    return {"teacher": last_metrics(log)["wall_s"]} if log.exists() else {}


@torch.no_grad()
def draw_raster(student: PreTrainedModel, ids: list[int], tokenizer: Any, path: Path) -> None:
    """The spikes of the first bank of neurons over a sentence."""
    name, owner = next(iter(spike_sites(student).items()))
    seen: list[torch.Tensor] = []
    handle = owner.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    student(torch.tensor([ids], device=student.device))
    handle.remove()
    frames = owner.neuron.encode(seen[0][0])  # T, L, C
    plot.raster(frames.cpu(), path, tokens=[tokenizer.decode([i]) for i in ids], title=f"Spikes before {name}")


def say(message: str) -> None:
    """A line of progress, to stderr; of several processes the first one's."""
    if distributed.is_first():
        print(message, file=sys.stderr, flush=True)
