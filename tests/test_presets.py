"""Typed configurations from YAML and command line."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikelm.errors import SpikelmError
from spikelm.presets import config_from_command_line, field_names, load_config, to_dict


@dataclass(frozen=True)
class Stage:
    alpha: float = 0.2
    taps: Literal["pre", "post", "both"] = "pre"
    steps: int = 10


@dataclass(frozen=True)
class Settings:
    teacher: str
    data: str | None = None
    seed: int = 0
    learning_rate: float = 1e-3
    bf16: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    sites: list[str] = field(default_factory=lambda: ["mixer", "mlp"])
    max_tokens: int | None = None
    levels: Literal[1, 2, 4] = 4
    stage2: Stage = Stage()
    stage3: Stage | None = None
    stage4: Stage | None = Stage(0.7, "both", 3)


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("teacher: embedded\nlearning_rate: 3e-4\nstage2:\n  alpha: 1\n  steps: 7\n")
    (tmp_path / "small.yaml").write_text("inherits: base\nseed: 3\nstage2:\n  steps: 9\nsites: [mixer]\n")
    (tmp_path / "empty.yaml").write_text("")
    return tmp_path


def test_values_are_typed_and_inherited(presets: Path) -> None:
    config = load_config(Settings, "small", [], presets)
    assert config == Settings("embedded", seed=3, learning_rate=3e-4, sites=["mixer"], stage2=Stage(1.0, steps=9))
    assert type(config.stage2.alpha) is float


def test_what_is_not_given_is_the_fields_own_default(presets: Path) -> None:
    """Not that of its class, which is another."""
    assert load_config(Settings, "base", ["stage4.steps=5"], presets).stage4 == Stage(0.7, "both", 5)
    assert load_config(Settings, "base", ["stage4=null"], presets).stage4 is None
    assert load_config(Settings, "base", ["stage3.steps=5"], presets).stage3 == Stage(steps=5)


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("teacher=123", "teacher", "123"),
        ("teacher=yes", "teacher", "yes"),
        ("teacher=a=b", "teacher", "a=b"),
        ("data=null", "data", None),
        ("data=some text.txt", "data", "some text.txt"),
        ("seed=010", "seed", 10),
        ("learning_rate=1e-2", "learning_rate", 0.01),
        ("learning_rate=1", "learning_rate", 1.0),
        ("bf16=true", "bf16", True),
        ("betas=[0.8, 1e-1]", "betas", (0.8, 0.1)),
        ("sites=[]", "sites", []),
        ("sites=[a, b.c]", "sites", ["a", "b.c"]),
        ("max_tokens=5", "max_tokens", 5),
        ("max_tokens=None", "max_tokens", None),
        ("levels=2", "levels", 2),
        ("stage2.taps=both", "stage2", Stage(1.0, "both", 7)),
        ("stage3.alpha=0.5", "stage3", Stage(0.5)),
        ("stage3=null", "stage3", None),
    ],
)
def test_overrides(presets: Path, override: str, name: str, value: object) -> None:
    found = getattr(load_config(Settings, "base", [override], presets), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sead=1", "unknown field 'sead': did you mean 'seed'"),
        ("stage2.alhpa=1", "unknown field 'stage2.alhpa': did you mean 'stage2.alpha'"),
        ("taps=pre", "unknown field 'taps': did you mean 'stage2.taps'"),
        ("zzzzzz=1", "unknown field 'zzzzzz': accepted are teacher, data"),
        ("seed=1.5", "seed=1.5: an integer is accepted"),
        ("seed=", "seed=: an integer is accepted"),
        ("learning_rate=nan", "learning_rate=nan: a finite number"),
        ("learning_rate=fast", "learning_rate=fast: a finite number is accepted, text was given"),
        ("bf16=1", "bf16=1: true or false"),
        ("betas=[0.9]", "betas: 2 values are accepted, 1 were given"),
        ("betas=0.9,0.8", r"betas=0.9,0.8: a list such as \[a, b\]"),
        ("betas=[0.9, x]", r"betas\[1\]=x: a finite number"),
        ("max_tokens=many", r"max_tokens=many: an integer is accepted, text was given \(null is accepted too\)"),
        ("levels=3", "levels=3: accepted are 1, 2, 4"),
        ("stage2.taps=prae", "stage2.taps=prae: accepted are pre, post, both"),
        ("stage2=5", "stage2=5: it has fields of its own"),
        ("seed.x=5", r"seed={'x': '5'}: an integer is accepted, dict was given"),
        ("teacher.x=5", "teacher is a single value"),
        ("seed", "'seed' is no override"),
        ("=3", "'=3' is no override"),
    ],
)
def test_bad_overrides_say_what_is_accepted(presets: Path, override: str, message: str) -> None:
    with pytest.raises(SpikelmError, match=message) as raised:
        load_config(Settings, "base", [override], presets)
    assert "\n" not in str(raised.value)


def test_a_field_given_twice(presets: Path) -> None:
    with pytest.raises(SpikelmError, match="seed is given twice"):
        load_config(Settings, "base", ["seed=1", "seed=2"], presets)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teacher: 5", "teacher=5: text is accepted, int was given"),
        ("teacher: a\nseed: '5'", "seed=5: an integer is accepted, text was given"),
        ("teacher: a\nseed: true", "seed=True: an integer is accepted, bool was given"),
        ("teacher: a\nbf16: 0", "bf16=0: true or false"),
        ("teacher: a\nsites: mixer", "sites=mixer: a list is accepted, text was given"),
        ("teacher: a\nlevels: '4'", "levels=4: accepted are 1, 2, 4"),
        ("teacher: a\nstage3: {alfa: 1}", "unknown field 'stage3.alfa': did you mean 'stage3.alpha'"),
        ("teacher: [", "bad.yaml is no valid YAML"),
        ("- teacher", "bad.yaml must hold a mapping"),
        ("seed: 1", "field 'teacher' has no value"),
        ("inherits: bad", "presets inherit in a circle: bad -> bad"),
        ("inherits: none", r"unknown preset 'none' \(inherited by 'bad'\): accepted are bad, base, empty, small"),
    ],
)
def test_bad_files_say_what_is_accepted(presets: Path, text: str, message: str) -> None:
    (presets / "bad.yaml").write_text(text)
    with pytest.raises(SpikelmError, match=message) as raised:
        load_config(Settings, "bad", [], presets)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("preset", ["large", "../base", ""])
def test_unknown_presets_name_the_known_ones(presets: Path, preset: str) -> None:
    with pytest.raises(SpikelmError, match="accepted are base, empty, small"):
        load_config(Settings, preset, [], presets)


def test_unsupported_annotations_are_a_programming_error(presets: Path) -> None:
    @dataclass
    class Unsupported:
        teacher: bytes = b""

    with pytest.raises(TypeError, match="not supported"):
        load_config(Unsupported, "empty", ["teacher=x"], presets)


def test_to_dict_survives_json(presets: Path) -> None:
    config = load_config(Settings, "small", ["stage3.alpha=1"], presets)
    plain = to_dict(config)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["betas"] == [0.9, 0.95]
    assert plain["stage3"]["alpha"] == 1.0
    assert set(plain) == {each.name for each in dataclasses.fields(Settings)}


def test_field_names_are_dotted() -> None:
    names = list(field_names(Settings))
    assert "stage3.taps" in names
    assert names[0] == "teacher"
    assert len(names) == len(set(names)) == 21


def test_command_line(presets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def parse(*arguments: str) -> Settings:
        return config_from_command_line(
            Settings, presets, description="Train.", default_preset="small", arguments=arguments
        )

    assert parse("seed=5", "--preset", "base", "data=x") == load_config(Settings, "base", ["seed=5", "data=x"], presets)
    assert parse().seed == 3
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "base, empty, small" in shown
    assert "stage2.alpha" in shown


@given(number=st.floats(allow_nan=False, allow_infinity=False), whole=st.integers(-(10**12), 10**12))
def test_numbers_typed_in_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, number: float, whole: int
) -> None:
    directory = tmp_path_factory.getbasetemp()
    (directory / "numbers.yaml").write_text("teacher: a")
    config = load_config(Settings, "numbers", [f"learning_rate={number!r}", f"seed={whole}"], directory)
    assert (config.learning_rate, config.seed) == (number, whole)
