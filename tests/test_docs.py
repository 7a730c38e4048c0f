"""The code of every page runs: each block of Python in README and docs/, and what the pages say comes out of it."""

import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from spikelm import plot
from spikelm.convert import spike_sites
from spikelm.data import train_tokenizer
from tests.documents import DOCS, PAGES, python_blocks, python_fences
from tests.small_models import mamba2

PROPERTIES = {
    "test_spikes_are_integers_within_range",
    "test_charge_is_conserved",
    "test_odd_symmetry",
    "test_response_is_monotone",
    "test_split_sequences_equal_the_whole",
    "test_scale_equivariance",
    "test_channels_permute",
    "test_golden_rates",
    "test_rate_error_is_at_most_one_over_T",
    "test_ternary_expansion",
    "test_special_values",
}
# Pages whose blocks continue one another, as they say; everywhere else each block runs by itself.
CONTINUED = {"docs/extending.md", "docs/quickstart.md", "docs/distillation.md"}
Names = dict[str, Any]


def llama() -> LlamaForCausalLM:
    """A fresh random Llama of 2 layers and width 32."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, bos_token_id=0, eos_token_id=1, **shape))


# Models of the Hub that blocks name, and what stands in for each: nothing is downloaded here.
STAND_INS = {"meta-llama/Llama-3.2-1B": llama, "AntonV/mamba2-130m-hf": mamba2}


def with_stand_ins(code: str, directory: Path) -> str:
    """The code with every known model of the Hub replaced by a small one, saved in the directory with a tokenizer."""
    for name, build in STAND_INS.items():
        if f'"{name}"' not in code:
            continue
        path = directory / name.replace("/", "_")
        if not path.exists():
            tokenizer = train_tokenizer("Once upon a time there was a cat. " * 20, 300)
            tokenizer.save_pretrained(path)
            model = build()
            model.resize_token_embeddings(len(tokenizer))
            model.save_pretrained(path)
        code = code.replace(f'"{name}"', repr(str(path)))
    return code


@pytest.fixture
def run_page(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[Names]]:
    """run_page("docs/mar.md") executes the blocks of a page in an empty directory; the names that each left."""
    monkeypatch.chdir(tmp_path)
    models = tmp_path_factory.mktemp("hub")

    def run(page: str) -> list[Names]:
        results: list[Names] = []
        for place, block in enumerate(python_blocks(page)):
            if "snntorch" in block:
                pytest.importorskip("snntorch", reason="a block of this page needs snntorch, which is not installed")
            names = results[-1] if results and page in CONTINUED else {"__name__": f"{page}, block {place}"}
            torch.manual_seed(0)
            exec(compile(with_stand_ins(block, models), f"{page}, block {place}", "exec"), names)
            results.append(names)
        return results

    return run


def check_readme(results: list[Names], directory: Path) -> None:
    """The frames of the SpikingJelly example are ternary."""
    frames = results[0]["frames"]
    assert frames.shape == (4, 8, 256)
    assert set(frames.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert len(spike_sites(results[1]["student"])) == 8


def check_hub_block_of_spikingmamba(results: list[Names], directory: Path) -> None:
    """The deployed student multiplies nothing, and what was saved before comes back with its neurons."""
    assert all(type(site).__name__ == "TernaryLinear" for site in spike_sites(results[0]["student"]).values())
    assert len(spike_sites(AutoModelForCausalLM.from_pretrained(directory / "student"))) == 4


def check_bispikclm(results: list[Names], directory: Path) -> None:
    """Maps of every layer, and a text."""
    assert len(results[0]["maps"]) == 4
    assert results[0]["maps"][0].shape == (1, 4, 32, 32)
    assert results[0]["text"].shape[1] > 32


def check_packed(results: list[Names], directory: Path) -> None:
    """The packed model was saved."""
    assert (directory / "packed" / "model.safetensors").exists()


def check_inference(results: list[Names], directory: Path) -> None:
    """The deployed model was saved, and the kernel computes the product."""
    assert (directory / "deployed" / "model.safetensors").exists()
    torch.testing.assert_close(results[1]["y"], results[1]["spikes"] @ results[1]["weights"].rows)


def check_extending(results: list[Names], directory: Path) -> None:
    """The neuron of the page passes the tests of the page."""
    assert len(python_blocks("docs/extending.md")[0].splitlines()) <= 30
    functions = [value for name, value in results[1].items() if name.startswith("test_") and callable(value)]
    assert len(functions) == 3
    for function in functions:
        torch.manual_seed(0)
        function()


def check_quickstart(results: list[Names], directory: Path) -> None:
    """The first network learns, the student is saved, comes back spiking and deployed."""
    assert results[0]["accuracy"] > 0.8
    assert (directory / "student" / "model.safetensors").exists()
    assert all(type(site).__name__ == "GatherLinear" for site in spike_sites(results[-1]["student"]).values())


# What must hold beyond the asserts in the blocks themselves, once a page's blocks have run in the directory.
CHECKS: dict[str, Callable[[list[Names], Path], None]] = {
    "README.md": check_readme,
    "docs/spikingmamba.md": check_hub_block_of_spikingmamba,
    "docs/bispikclm.md": check_bispikclm,
    "docs/weights.md": check_packed,
    "docs/spikingbert.md": check_packed,
    "docs/inference.md": check_inference,
    "docs/extending.md": check_extending,
    "docs/quickstart.md": check_quickstart,
}


@pytest.mark.parametrize("page", [page for page in PAGES if python_fences(page)])
def test_every_block_of_a_page_runs(page: str, run_page: Callable[[str], list[Names]], tmp_path: Path) -> None:
    assert len(python_blocks(page)) == python_fences(page), "a block is not written ```python at the start of a line"
    results = run_page(page)
    assert len(results) == python_fences(page)
    CHECKS.get(page, lambda results, directory: None)(results, tmp_path)


def test_the_tables_above_name_pages_and_models_that_exist() -> None:
    assert set(CHECKS) | CONTINUED <= {page for page in PAGES if python_fences(page)}
    code = "".join(block for page in PAGES for block in python_blocks(page))
    assert [name for name in STAND_INS if f'"{name}"' not in code] == []


@functools.cache
def extending() -> Names:
    """What the first block of the page on neurons of one's own defines."""
    names: Names = {"__name__": "extending.md"}
    exec(compile(python_blocks("docs/extending.md")[0], "extending.md", "exec"), names)
    return names


def test_a_neuron_of_ones_own_is_TernaryLIFNode() -> None:
    if not hasattr(neuron, "TernaryLIFNode"):
        pytest.skip("this SpikingJelly has no TernaryLIFNode; it came with 2.0.0")
    ours = extending()["TernaryHardReset"]
    theirs = neuron.TernaryLIFNode(tau=2.0, decay_input=False, step_mode="m", surrogate_function=surrogate.ATan())
    generator = torch.Generator().manual_seed(0)
    x_seq, weights = 1.3 * torch.randn(8, 100, generator=generator), torch.randn(8, 100, generator=generator)
    results = []
    for node in (ours(step_mode="m"), theirs):
        x = x_seq.clone().requires_grad_()
        spikes = node(x)
        results.append((spikes.detach(), *torch.autograd.grad((spikes * weights).sum(), x)))
    (our_spikes, our_gradient), (their_spikes, their_gradient) = results
    assert 0.1 < float(our_spikes.abs().mean()) < 0.9
    assert torch.equal(our_spikes, their_spikes)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-6)


def test_named_tests_exist(repository: Path) -> None:
    text = (DOCS / "neurons.md").read_text()
    folder = repository / "tests" / "neurons"
    defined = {
        name: set(re.findall(r"^def (test_\w+)\(", (folder / name).read_text(), flags=re.MULTILINE))
        for name in ("test_properties.py", "test_equality.py")
    }
    equalities, properties = text.split("## Properties, each with its test")
    listed = re.findall(r"\| `(test_\w+)` \|$", properties, flags=re.MULTILINE)
    assert set(listed) == PROPERTIES
    assert len(listed) == len(PROPERTIES)
    assert set(listed) - defined["test_properties.py"] == set()
    equal = set(re.findall(r"\| `(test_\w+)` \|$", equalities, flags=re.MULTILINE))
    assert len(equal) == 6
    assert equal - defined["test_equality.py"] == set()


def pictures(repository: Path) -> ModuleType:
    path = repository / "benchmarks" / "neuron_pictures.py"
    specification = importlib.util.spec_from_file_location("neuron_pictures", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_pictures_are_those_of_their_script(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every picture of the page is drawn, and its curves are within the limits that its caption names."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is not installed")
    figures, save = {}, plot._save

    def keep(figure: object, path: Path) -> Path:
        figures[path.name] = figure
        return save(figure, path)

    monkeypatch.setattr(plot, "_save", keep)
    drawn = pictures(repository).draw(tmp_path)
    shown = re.findall(r"\]\(images/([\w.]+)\)", (DOCS / "neurons.md").read_text())
    assert [path.name for path in drawn] == shown
    assert all((DOCS / "images" / name).exists() for name in shown)
    above, below = figures["neuron_atmn.png"].axes
    plain, weighted = (torch.as_tensor(line.get_ydata()) for line in above.get_lines())
    assert (float(plain.max()), float(weighted.max())) == (4, 1.875)
    for line, limit in zip(below.get_lines(), (4.0, 1.875), strict=True):
        slopes = torch.as_tensor(line.get_ydata())[torch.as_tensor(line.get_xdata()).abs() <= limit]
        assert 0.55 <= float(slopes.min()) <= float(slopes.max()) <= 1.03
    without, gradient, blend = (torch.as_tensor(line.get_ydata()) for line in figures["neuron_tilif.png"].axes[1].lines)
    torch.testing.assert_close(gradient, blend)
    assert set(without.unique().tolist()) == {0.0, 1.0}
