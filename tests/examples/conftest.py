"""Very small runs of the examples, finished once and shared, and the means to run others like them."""

import contextlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SAVE_STEPS = 12
EVERYWHERE = {
    "context_length": 32,
    "max_tokens": "null",
    "evaluation_contexts": 8,
    "sample_tokens": 8,
    "prompt": "The cat",
    "embedded_teacher.steps": 100,
    "embedded_teacher.vocab_size": 300,
}
MINIMAL_MAR = EVERYWHERE | {
    "orientation.steps": 2,
    "alignment.steps": 2,
    "distillation.steps": 60,
    "distillation.batch_size": 4,
    "distillation.save_steps": SAVE_STEPS,
    "spiking.optimisation.steps": 60,
    "spiking.optimisation.batch_size": 4,
    "spiking.optimisation.save_steps": SAVE_STEPS,
    "spiking.calibration_contexts": 8,
}
MINIMAL_SPIKINGMAMBA = EVERYWHERE | {
    "distillation.calibration_contexts": 8,
    "distillation.optimisation.steps": 40,
    "distillation.optimisation.batch_size": 4,
    "distillation.optimisation.save_steps": SAVE_STEPS,
}
MINIMAL_BISPIKCLM = EVERYWHERE | {
    "student.hidden_size": 32,
    "student.num_hidden_layers": 2,
    "student.num_attention_heads": 4,
    "student.T": 2,
    "optimisation.steps": 60,
    "optimisation.batch_size": 4,
    "optimisation.save_steps": SAVE_STEPS,
    "optimisation.bf16": "false",
}

MINIMAL_EXTREME_QUANTIZATION = {
    "held_out": 60,
    "max_rows": "null",
    "max_length": 16,
    "T": "[2,16]",
    "embedded_teacher.steps": 80,
    "embedded_teacher.vocab_size": 300,
    "float_stages.general.steps": 0,
    "float_stages.internal.steps": 10,
    "float_stages.prediction.steps": 150,
    "float_stages.prediction.learning_rate": 5e-3,
    "float_stages.spiking.steps": 5,
    "quantised_stages.internal.steps": 5,
    "quantised_stages.prediction.steps": 25,
    "quantised_stages.prediction.learning_rate": 5e-3,
    "quantised_stages.spiking.steps": 5,
}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """One thread in every test of the examples."""
    with one_thread():
        yield


@dataclass(frozen=True)
class Example:
    """Runs the scripts of one example as a user would: by their command line."""

    directory: Path
    minimal: Mapping[str, Any]
    text: Path

    def arguments(self, output_dir: Path, fields: Mapping[str, Any], preset: str = "smoke") -> list[str]:
        """The command line of a minimal run."""
        values = {**self.minimal, "data": self.text, **fields, "output_dir": output_dir}
        return ["--preset", preset, *(f"{name}={value}" for name, value in values.items())]

    def call(self, script: str, arguments: list[str]) -> Any:
        """Run a script in this process; its exit status."""
        with pytest.MonkeyPatch.context() as patch, one_thread():
            patch.setattr(sys, "argv", [script, *arguments])
            patch.syspath_prepend(str(self.directory))
            own = {path.stem for path in self.directory.glob("*.py")}
            for name in own:  # every example has a settings.py
                patch.delitem(sys.modules, name, raising=False)
            try:
                runpy.run_path(str(self.directory / script), run_name="__main__")
            except SystemExit as leaving:
                return leaving.code
            finally:
                for name in own:
                    sys.modules.pop(name, None)
        raise AssertionError("command_line leaves with SystemExit")

    def run(self, output_dir: Path, fields: Mapping[str, Any], preset: str = "smoke") -> Any:
        """train.py in this process; its exit status."""
        return self.call("train.py", self.arguments(output_dir, fields, preset))

    @contextlib.contextmanager
    def started(self, output_dir: Path, fields: Mapping[str, Any]) -> Iterator["subprocess.Popen[str]"]:
        """train.py in a process of its own, killed at the end if it still runs."""
        command = [sys.executable, "-W", "error", str(self.directory / "train.py"), *self.arguments(output_dir, fields)]
        process = subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background job ignores Ctrl-C, and its children would too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def stop(self, output_dir: Path, fields: Mapping[str, Any], stage: str, number: signal.Signals) -> tuple[int, str]:
        """Start train.py, send a signal when `stage` has logged a step beyond a checkpoint; exit status and stderr."""
        log = output_dir / "training" / stage / "log.jsonl"
        with self.started(output_dir, fields) as process:
            while last_step(log) <= SAVE_STEPS:
                assert process.poll() is None, process.communicate()[1][-2000:]
                time.sleep(0.005)
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        return process.returncode, errors


def last_step(log: Path) -> int:
    """The step of the last whole line of a log.jsonl; 0 where there is none."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 kB of text."""
    words = "the cat dog ran to house and saw a red ball with tree that was big small happy sun in day one they said"
    choose = random.Random(0)
    lines = [" ".join(choose.choices(words.split(), k=12)).capitalize() + "." for _ in range(600)]
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n".join(lines))
    return text


@pytest.fixture(scope="session")
def mar(small_text: Path) -> Example:
    """examples/mar."""
    return Example(EXAMPLES / "mar", MINIMAL_MAR, small_text)


@pytest.fixture(scope="session")
def spikingmamba(small_text: Path) -> Example:
    """examples/spikingmamba."""
    return Example(EXAMPLES / "spikingmamba", MINIMAL_SPIKINGMAMBA, small_text)


@pytest.fixture(scope="session")
def bispikclm(small_text: Path) -> Example:
    """examples/bispikclm."""
    return Example(EXAMPLES / "bispikclm", MINIMAL_BISPIKCLM, small_text)


@pytest.fixture(scope="session")
def small_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 sentences, half of them with more good words than bad ones."""
    good, bad, other = (
        "good great fine happy".split(),
        "bad poor dull sad".split(),
        "the film is a very long one".split(),
    )
    choose = random.Random(0)
    lines = ["sentence\tlabel"]
    for number in range(600):
        words = choose.choices(other, k=5) + choose.choices(good if number % 2 else bad, k=2)
        lines.append(" ".join(choose.sample(words, len(words))) + f"\t{number % 2}")
    rows = tmp_path_factory.mktemp("rows") / "rows.tsv"
    rows.write_text("\n".join(lines))
    return rows


@pytest.fixture(scope="session")
def extreme_quantization(small_rows: Path) -> Example:
    """examples/extreme_quantization."""
    return Example(EXAMPLES / "extreme_quantization", MINIMAL_EXTREME_QUANTIZATION, small_rows)


@pytest.fixture(scope="session")
def finished_extreme_quantization(extreme_quantization: Example, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a minimal run of examples/extreme_quantization. Tests leave it as it is."""
    output_dir = tmp_path_factory.mktemp("extreme_quantization") / "run"
    assert extreme_quantization.run(output_dir, {}) == 0
    return output_dir


@pytest.fixture(scope="session")
def finished_bispikclm(bispikclm: Example, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a minimal run of examples/bispikclm on the teacher of `finished`. Tests leave it as it is."""
    output_dir = tmp_path_factory.mktemp("bispikclm") / "run"
    assert bispikclm.run(output_dir, {"teacher": finished / "teacher"}) == 0
    return output_dir


@pytest.fixture(scope="session")
def finished_spikingmamba(spikingmamba: Example, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a minimal run of examples/spikingmamba, embedded teacher included. Tests leave it as it is."""
    output_dir = tmp_path_factory.mktemp("spikingmamba") / "run"
    assert spikingmamba.run(output_dir, {}) == 0
    return output_dir


@pytest.fixture(scope="session")
def finished(mar: Example, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a minimal run, embedded teacher included. Tests leave it as it is."""
    output_dir = tmp_path_factory.mktemp("mar") / "run"
    assert mar.run(output_dir, {}) == 0
    return output_dir


@pytest.fixture(scope="session")
def same_teacher(finished: Path) -> dict[str, Any]:
    """Fields that make another run do what the finished one did, without training the teacher again."""
    return {"teacher": finished / "teacher"}


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """weights(checkpoint directory) -> every tensor in it."""

    def read(directory: Path) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(directory / "model.safetensors")

    return read
