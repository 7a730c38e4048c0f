"""Recipes and presets of any content: a SpikelmError, or what they say; never another exception."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spikelm import Recipe, spikify
from spikelm.checkpoint import SpikingConfig
from spikelm.convert import NEURONS, spike_sites
from spikelm.errors import SpikelmError
from spikelm.limits import MOST_STEPS, check_file_name, check_sizes
from spikelm.presets import from_dict, load_config, to_dict
from tests.robustness.profiles import examples

# What a JSON file can hold, the awkward numbers often.
ODD_NUMBERS = st.sampled_from([0, -1, 1, 2, 2**31, 2**62, 10**12, 10**400, -(10**400), 1e-320, 1e308, 0.5, 1.0])
NUMBERS = st.one_of(ODD_NUMBERS, st.integers(), st.floats())
WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["*", "[", "[!", "?" * 999, "*a" * 400, "../../etc", "a\0b", "__class__", "import os", "ATMN", "torch"]
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.one_of(
    SCALARS,
    SCALARS,
    st.lists(SCALARS, max_size=2),
    st.dictionaries(WORDS, SCALARS | st.lists(SCALARS, max_size=2), max_size=2),
)


def mostly(right: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A fitting value three times in four, or anything."""
    return st.one_of(right, right, right, VALUES)


SURROGATES = (
    *("ATan", "Sigmoid", "Rect", "PiecewiseLeakyReLU", "SquarewaveFourierSeries", "S2NN", "LogTailedReLU"),
    *("PoissonPass", "MultiLevelSpikeCount", "SurrogateFunctionBase", "heaviside", "nn", "__builtins__"),
)
SURROGATE = st.one_of(
    st.sampled_from(SURROGATES),
    st.dictionaries(st.sampled_from(["name", "alpha", "n", "w", "c", "spiking"]), mostly(NUMBERS), max_size=3),
    st.fixed_dictionaries(
        {"name": st.sampled_from(SURROGATES)}, optional={"alpha": mostly(st.floats(0.1, 5)), "n": NUMBERS}
    ),
)


def some_of(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Up to four of the fields; cheaper than optional fields, each of which takes a decision."""

    @st.composite
    def chosen(draw: st.DrawFn) -> dict[str, Any]:
        return {name: draw(fields[name]) for name in draw(st.lists(st.sampled_from(list(fields)), max_size=4))}

    return chosen()


ARGUMENTS = some_of(
    {
        "T": mostly(st.integers(1, 5)),
        "D": mostly(st.integers(1, 5)),
        "tau": mostly(st.floats(0.5, 2)),
        "beta": mostly(st.floats(0.5, 1)),
        "frame_weight": mostly(st.sampled_from([1.0, 0.5])),
        "v_threshold": mostly(st.floats(0.1, 2)),
        "learn_threshold": mostly(st.booleans()),
        "sgc": mostly(st.sampled_from([None, "gradient", "blend"])),
        "sgc_weight": mostly(st.floats(0, 1)),
        "alpha": mostly(st.floats(0.5, 2)),
        "inject": mostly(st.sampled_from(["first", "every"])),
        "surrogate_function": mostly(SURROGATE),
        "channel_dim": VALUES,
        "num_channels": VALUES,
        "backend": mostly(st.just("torch")),
        "step_mode": mostly(st.just("s")),
        "detach_reset": VALUES,
    }
)
PATTERNS = st.one_of(st.sampled_from(["*", "0", "1", "2.*", "?", "2.[01]", "no*"]), WORDS)
SITES = mostly(st.dictionaries(WORDS, mostly(st.lists(PATTERNS, min_size=1, max_size=2)), min_size=1, max_size=2))
RECIPES = st.builds(
    dict,
    some_of(
        {
            "neuron": mostly(st.sampled_from(list(NEURONS))),
            "neuron_arguments": mostly(ARGUMENTS),
            "calibrated": mostly(st.booleans()),
            "deployed": mostly(st.none() | st.just({"form": "gather"})),
            "weights": mostly(st.sampled_from(["float", "binary", "ternary", "int8"])),
            "per_row": mostly(st.booleans()),
        }
    ),
    sites=SITES,
)


def tried(work: Callable[[], Any]) -> Any:
    """The result, or None for a SpikelmError that says something in one line of bearable length."""
    try:
        return work()
    except SpikelmError as error:
        assert str(error).strip()
        return None


@pytest.mark.filterwarnings("ignore")  # surrogates' own, and of the backend
@examples(100, 30_000)
@given(st.sampled_from(list(NEURONS)), ARGUMENTS)
def test_neuron_arguments(neuron: str, arguments: dict[str, Any]) -> None:
    """A bank is refused, or it runs, with bounded numbers of steps."""

    def run() -> Any:
        bank = Recipe({"site": ["*"]}, neuron, arguments).make_neuron(4)
        assert max(getattr(bank, "T", 1), getattr(bank, "D", 1)) <= MOST_STEPS
        return bank.encode_sum(torch.linspace(-2, 2, 8).view(2, 4))

    spikes = tried(run)
    assert spikes is None or spikes.shape == (2, 4)


@examples(100, 30_000)
@given(st.one_of(RECIPES, VALUES))
def test_recipes_of_a_file(fields: Any) -> None:
    """Through JSON, as a checkpoint has it; what is accepted is the same after another round."""
    text = json.dumps({"recipe": fields, "quant_method": "spikelm"})
    recipe = tried(lambda: SpikingConfig(**json.loads(text)).to_recipe())
    if recipe is not None:
        again = json.loads(json.dumps(recipe.to_dict()))
        assert SpikingConfig(recipe=again).to_recipe().to_dict() == recipe.to_dict()


@pytest.mark.filterwarnings("ignore")
@examples(60, 10_000)
@given(RECIPES)
def test_recipes_on_a_model(fields: dict[str, Any]) -> None:
    """The model is spiking where the patterns say so, or unchanged."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    before = dict(model.named_modules())
    recipe = tried(lambda: Recipe(**fields))
    if recipe is None:
        return
    if tried(lambda: spikify(model, recipe)) is None:
        assert dict(model.named_modules()) == before
        return
    patterns = [pattern for patterns in recipe.sites.values() for pattern in patterns]
    chosen = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
    spiking = {name for name in names if model.get_submodule(name) is not before[name]}
    assert spiking == chosen
    assert set(spike_sites(model)) <= chosen
    tried(lambda: model(torch.ones(2, 4)))


# ---- presets


@dataclass(frozen=True)
class Inner:
    steps: int = 3
    rate: float = 0.1
    kind: Literal["a", "b", 1] = "a"


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    seed: int | None = None
    flag: bool = False
    inner: Inner = field(default_factory=Inner)
    other: Inner | None = None
    sizes: list[int] = field(default_factory=list)
    pair: tuple[float, str] = (1.0, "y")


FIELDS = st.sampled_from(["name", "seed", "flag", "inner", "other", "sizes", "pair", "inner.steps", "inner.kind",
                          "other.rate", "name.x", "inherits", "steps", "", ".", "inner."])  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=10),
    st.sampled_from(["1", "true", "null", "[1, 2]", "[1, a]", "1e400", "nan", "a", "{}", "1" * 400, "1" * 5000]),
)
OVERRIDES = st.lists(st.tuples(FIELDS, TEXTS).map("=".join) | st.text(max_size=12), max_size=4)


@examples(100, 30_000)
@given(st.one_of(VALUES, st.dictionaries(FIELDS, mostly(SCALARS), max_size=4)))
def test_configurations_of_any_fields(fields: Any) -> None:
    config = tried(lambda: from_dict(Outer, fields)) if isinstance(fields, dict) else None
    if config is not None:
        assert from_dict(Outer, json.loads(json.dumps(to_dict(config)))) == config


@examples(60, 20_000)
@given(overrides=OVERRIDES)
def test_overrides(tmp_path_factory: pytest.TempPathFactory, overrides: list[str]) -> None:
    directory = tmp_path_factory.getbasetemp() / "presets"
    directory.mkdir(exist_ok=True)
    (directory / "base.yaml").write_text("name: base\ninner: {steps: 5}\n")
    config = tried(lambda: load_config(Outer, "base", overrides, directory))
    assert config is None or isinstance(config.inner.steps, int)


YAML = st.one_of(
    st.text(max_size=40),
    st.binary(max_size=40),
    VALUES.map(lambda value: json.dumps(value)),
    st.sampled_from(
        [
            "!!python/object/apply:os.system [touch owned]",
            "inherits: ../../secret",
            "inherits: [1]",
            "inherits: fuzz",
            "a: &a [*a]",
            "? [a]\n: b",
            "seed: 0x" + "f" * 5000,
            "seed: " + "9" * 5000,
            "[" * 2000,
            "seed: 2020-99-99",
            "seed: !!int x",
            "seed: !!float 'x'",
            "x: &x {a: 1}\n<<: *x",
            "<<: 3",
            "? {a: 1}\n: 2",
            "1: 2",
        ]
    ),
)


@examples(60, 20_000)
@given(content=YAML)
def test_preset_files(tmp_path_factory: pytest.TempPathFactory, content: str | bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "yaml"
    directory.mkdir(exist_ok=True)
    (directory.parent / "secret.yaml").write_text("name: secret\n")
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    (directory / "fuzz.yaml").write_bytes(data)
    config = tried(lambda: load_config(Outer, "fuzz", [], directory))
    assert config is None or config.name != "secret"
    assert not Path("owned").exists()


# ---- limits


@examples(60, 20_000)
@given(
    st.dictionaries(st.sampled_from(["T", "D", "d_model", "n_layer", "name", "num_hidden_layers"]), VALUES, max_size=3)
)
def test_sizes(fields: dict[str, Any]) -> None:
    tried(lambda: check_sizes(fields))


@examples(100, 10_000)
@given(VALUES | st.text("./\\\0ab", max_size=6))
def test_file_names(name: Any) -> None:
    """What is accepted lies in the directory itself."""
    accepted = tried(lambda: check_file_name(name))
    if accepted is not None:
        assert (Path("/directory") / accepted).resolve().parent == Path("/directory")
