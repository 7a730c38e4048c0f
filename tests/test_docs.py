"""Pages of docs/: their code runs, what they link and name exists, the pictures can be drawn."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate
from transformers import AutoModelForCausalLM

from spikelm import plot
from spikelm.convert import spike_sites
from spikelm.data import train_tokenizer
from tests.small_models import mamba2

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = (
    "neurons.md",
    "extending.md",
    "spikingmamba.md",
    "bispikclm.md",
    "spikingbert.md",
    "weights.md",
    "inference.md",
)
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


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def run(code: str, name: str) -> dict[str, object]:
    names: dict[str, object] = {"__name__": name}
    exec(compile(code, name, "exec"), names)
    return names


@pytest.mark.parametrize("place", range(len(blocks("neurons.md"))))
def test_each_block_of_the_neurons_page_runs_by_itself(place: int) -> None:
    block = blocks("neurons.md")[place]
    if "snntorch" in block:
        pytest.importorskip("snntorch", reason="this block needs snntorch, which is not installed")
    torch.manual_seed(0)
    run(block, f"neurons.md, block {place}")


def test_the_deployed_model_of_the_spikingmamba_page_multiplies_nothing() -> None:
    torch.manual_seed(0)
    run(blocks("spikingmamba.md")[1], "spikingmamba.md, inference")


def test_the_hub_block_of_the_spikingmamba_page_runs_on_a_local_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer("Once upon a time there was a cat. " * 20, 300)
    tokenizer.save_pretrained("teacher")
    model = mamba2()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained("teacher")
    block = blocks("spikingmamba.md")[0]
    assert block.count("AntonV/mamba2-130m-hf") == 1
    names = run(block.replace("AntonV/mamba2-130m-hf", "teacher"), "spikingmamba.md, ten lines")
    assert all(type(site).__name__ == "TernaryLinear" for site in spike_sites(names["student"]).values())
    assert len(spike_sites(AutoModelForCausalLM.from_pretrained("student"))) == 4


def test_the_block_of_the_bispikclm_page_runs() -> None:
    torch.manual_seed(0)
    names = run(blocks("bispikclm.md")[0], "bispikclm.md")
    assert len(names["maps"]) == 4 and names["maps"][0].shape == (1, 4, 32, 32)
    assert names["text"].shape[1] > 32


@pytest.mark.parametrize("page", ["weights.md", "spikingbert.md"])
def test_packed_models_of_the_pages_are_saved(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(page)
    torch.manual_seed(0)
    run(block, page)
    assert (tmp_path / "packed" / "model.safetensors").exists()


def test_the_inference_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks("inference.md"):
        torch.manual_seed(0)
        names = run(block, "inference.md")
    assert (tmp_path / "deployed" / "model.safetensors").exists()
    torch.testing.assert_close(names["y"], names["spikes"] @ names["weights"].rows)


def test_a_neuron_of_ones_own_passes_its_test() -> None:
    definition, tests, custom_surrogate = blocks("extending.md")
    assert len(definition.splitlines()) <= 30
    names = run(definition + tests, "extending.md")
    functions = [value for name, value in names.items() if name.startswith("test_") and callable(value)]
    assert len(functions) == 3
    for function in functions:
        torch.manual_seed(0)
        function()
    run(custom_surrogate, "extending.md, surrogate")


def test_a_neuron_of_ones_own_is_TernaryLIFNode() -> None:
    if not hasattr(neuron, "TernaryLIFNode"):
        pytest.skip("this SpikingJelly has no TernaryLIFNode; it came with 2.0.0")
    ours = run(blocks("extending.md")[0], "extending.md")["TernaryHardReset"]
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


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", (DOCS / page).read_text())
    assert links
    for target, anchor in links:
        path = DOCS / (target or page)
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), anchor


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
