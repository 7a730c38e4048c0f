"""What the pages name is there: links, anchors, scripts with their presets, fields and flags, extras, targets."""

import configparser
import contextlib
import io
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import pytest

from spikelm.__main__ import main as spikelm_command
from tests.documents import NOTEBOOKS, PAGES, ROOT, anchors, commands, links, text_of

READERS_OWN = "my_neuron.py"  # a file that a page asks its reader to write


class Parsed(Exception):
    """Raised in the place of a script's work, once its command line is read."""


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS])
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in links(page):
        if "://" in target:
            address = urlsplit(target)
            assert address.scheme == "https", target
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc), target
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert path.resolve().is_relative_to(ROOT), f"{target} is outside of the repository"
        if anchor:
            assert anchor in anchors(path), f"{target}#{anchor}"


def test_links_are_found() -> None:
    found = {page: len(links(page)) for page in PAGES}
    assert found["README.md"] > 10
    assert found["docs/faq.md"] > 30
    assert ("extending.md", "") in links("docs/neurons.md")
    assert ("mar.md", "quality-against-rate") in links("docs/inference.md")


def read_command_line(words: list[str], load_example: Callable[[str], ModuleType], patch: pytest.MonkeyPatch) -> None:
    """Lets an example read its command line, and stops it there. SystemExit, SpikelmError: the line is not accepted."""
    script = load_example(words[0].removeprefix("examples/"))
    read = script.config_from_command_line

    def stop(*arguments: object, **keywords: object) -> None:
        read(*arguments, **keywords)
        raise Parsed

    patch.setattr(script, "config_from_command_line", stop)
    patch.setattr(sys, "argv", words)
    with pytest.raises(Parsed):
        script.main()


def check_python(words: list[str], load_example: Callable[[str], ModuleType], patch: pytest.MonkeyPatch) -> None:
    """A command line of Python: a script of this repository, -m or -c."""
    if words[0] == "-c":
        compile(words[1], "command", "exec")
    elif words[:2] == ["-m", "spikelm"]:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as left:
            spikelm_command([*words[2:3], "--help"])
        assert left.value.code == 0
        for flag in words[3:]:
            assert not flag.startswith("--") or flag.split("=")[0] in shown.getvalue(), flag
    elif words[:2] == ["-m", "pytest"]:
        files = [word for word in words[2:] if not word.startswith("-") and word != READERS_OWN]
        assert [word for word in files if not (ROOT / word).exists()] == []
    elif words[0].startswith("examples/"):
        read_command_line([word for word in words if word != "..."], load_example, patch)
    elif words[0].startswith(("benchmarks/", "tests/")):
        text = (ROOT / words[0]).read_text(encoding="utf-8")
        for flag in words[1:]:
            assert not flag.startswith("--") or f'"{flag.split("=")[0]}"' in text, flag
    else:
        raise AssertionError(f"no script of this repository: {words[0]}")


ALL_COMMANDS = sorted({(command, page) for page in PAGES for command in commands(page)})


@pytest.mark.parametrize(
    ("command", "page"), [pair for pair in ALL_COMMANDS if pair[0].startswith(("python ", "spikelm "))]
)
def test_a_command_is_accepted(
    command: str, page: str, load_example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(re.sub("^spikelm ", "python -m spikelm ", command))[1:]
    words = words[: words.index(">")] if ">" in words else words
    check_python(words, load_example, monkeypatch)


def test_commands_are_found() -> None:
    found = {command for command, _ in ALL_COMMANDS}
    assert len(found) > 30
    assert "python examples/bispikclm/ablate.py run=runs/bispikclm output_dir=runs/bispikclm-ablation" in found
    assert any("stage1=runs/stories/stage1 spiking.neuron.tau=1" in command for command in found), "lines are joined"


def test_targets_and_extras_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    named = [(page, command) for command, page in ALL_COMMANDS if command.startswith(("make ", "pip "))]
    for page, command in named:
        words = shlex.split(command)
        if words[0] == "make":
            missing = {word for word in words[1:] if "=" not in word} - targets
        else:
            extras = {extra for part in re.findall(r"(?:\.|spikelm)\[([\w,]+)\]", command) for extra in part.split(",")}
            missing = extras - set(settings["options.extras_require"])
        assert not missing, (page, command)
    assert len(named) > 8


def test_settings_in_the_text_are_fields(load_example: Callable[[str], ModuleType]) -> None:
    """`spiking.weights=ternary` and its like, of which a page need not show a whole command."""
    from spikelm.presets import field_names

    known = {
        name
        for script in sorted(ROOT.glob("examples/*/settings.py"))
        for name in field_names(load_example(str(script.relative_to(ROOT / "examples"))).Config)
    }
    dotted = {
        (page, name)
        for page in PAGES
        for name in re.findall(r"`((?:spiking|spad|student|embedded_teacher|distillation)\.[\w.]+)[=:]", text_of(page))
    }
    assert len(dotted) > 3
    assert {pair for pair in dotted if pair[1] not in known} == set()


def test_sources_named_in_the_text_exist() -> None:
    to_be_written = {match for command, _ in ALL_COMMANDS for match in re.findall(r"--output (\S+)", command)}
    named = {
        (page, name)
        for page in PAGES
        for name in re.findall(r"\b(?:examples|docs|tests|benchmarks|spikelm)/[\w./-]+\.\w+\b", text_of(page))
        if name not in to_be_written
    }
    assert len(named) > 20
    assert [(page, name) for page, name in named if not (ROOT / name).exists()] == []


def test_pages_hold_no_path_of_a_machine() -> None:
    for page in [*PAGES, *NOTEBOOKS]:
        assert re.search(r"(?<![\w.~])/(?:root|home|work|tmp|Users)/", text_of(page)) is None, page


def test_notebooks_are_stored_without_outputs() -> None:
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        text = text_of(notebook)
        assert '"outputs": []' in text
        assert not re.search(r'"(?:output_type|image/png|text/plain)"', text), notebook
        assert not re.search(r'"execution_count": \d', text), notebook


def test_every_page_is_a_file_that_a_clone_has() -> None:
    """Nothing under docs/ but pages, notebooks, pictures, style and the two extensions of the build."""
    suffixes = {path.suffix for path in Path(ROOT / "docs").rglob("*") if path.is_file()} - {".pyc"}
    assert suffixes == {".md", ".ipynb", ".png", ".css", ".py"}
