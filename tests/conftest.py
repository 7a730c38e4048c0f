"""Fixtures and settings that every test shares."""

import importlib.util
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# No test may ask a model hub for anything; set before transformers or datasets read it.
os.environ["HF_HUB_OFFLINE"] = "1"

# As many workers of pytest-xdist as cores: one thread each, here and in the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

hypothesis.settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", max_examples=500, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


def shared_path(relative: str) -> Path:
    """A path under ../shared; skips the test, saying why, where that material is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs ../shared/{relative}, which is not beside this repository")
    return path


def pytest_report_header() -> str:
    """The versions that the results hold for; `make test` runs a part with two of spikingjelly."""

    def version(package: str) -> str:
        try:
            return f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            return f"no {package}"

    return ", ".join(version(package) for package in ("torch", "spikingjelly", "snntorch"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked gpu where torch sees no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def teacher_path() -> Path:
    """A real pretrained Llama of 260,032 parameters: vocabulary 512, context 512, tied embeddings, heads 8:4."""
    return shared_path("teachers/stories260k")


@pytest.fixture(scope="session")
def tinystories_path() -> Path:
    """944 kB of TinyStories as plain text."""
    return shared_path("data/tinystories/train.txt")


@pytest.fixture
def tiny_llama() -> "LlamaForCausalLM":
    """A fresh random Llama in eval mode, the same at every call: 2 layers, hidden 32, heads 4:2 of 8, vocabulary 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def load_example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """load_example("mar/train.py") imports a script of examples/ as a module, its directory importable as when run."""

    def load(relative: str) -> ModuleType:
        path = REPOSITORY / "examples" / relative
        monkeypatch.syspath_prepend(str(path.parent))
        for script in path.parent.glob("*.py"):  # every example has a settings.py
            monkeypatch.delitem(sys.modules, script.stem, raising=False)
        name = "example_" + relative.removesuffix(".py").replace("/", "_")
        specification = importlib.util.spec_from_file_location(name, path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up there
        specification.loader.exec_module(module)
        return module

    return load
