"""The repository's own rules: sizes, versions, and that what the documents name is there and runs."""

import os
import re
from pathlib import Path

import pytest
import torch

import spikelm

DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/install.md",
    "docs/faithfulness.md",
    "docs/neurons.md",
    "docs/extending.md",
    "docs/digits.md",
    "docs/bispikclm.md",
    "docs/spikingbert.md",
    "docs/weights.md",
)
MODEL_NAME = '"meta-llama/Llama-3.2-1B"'


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_no_file_of_the_package_is_two_things(repository: Path) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (repository / "spikelm").rglob("*.py")}
    assert lengths
    assert {str(path): length for path, length in lengths.items() if length > 400} == {}


def test_one_version_everywhere(repository: Path) -> None:
    assert f"\nversion: {spikelm.__version__}\n" in (repository / "CITATION.cff").read_text()
    assert spikelm.__version__ in (repository / "CHANGELOG.md").read_text()


def test_continuous_integration_runs_the_tests(repository: Path) -> None:
    script = repository / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"


def test_licence_is_whole(repository: Path) -> None:
    text = (repository / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability" in text
    assert "limitations under the License." in text


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_what_exists(document: str, repository: Path) -> None:
    path = repository / document
    text = path.read_text()
    targets = set(re.findall(r"^([a-z]+):", (repository / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"test", "demo", "lint", "clean"} <= targets
    assert set(re.findall(r"(?:^ {4}|`)make ([a-z]+)\b", text, flags=re.MULTILINE)) <= targets
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    named = re.findall(r"\b(?:examples|docs|tests|spikelm)/[\w./-]+\.(?:py|md|yaml)\b", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [name for name in named if not (repository / name).exists()]
    assert missing == []


def test_readme_spikingjelly_example_runs(repository: Path) -> None:
    (block,) = (block for block in python_blocks(repository / "README.md") if "spikingjelly" in block)
    assert len(block.splitlines()) <= 15
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    frames = names["frames"]
    assert isinstance(frames, torch.Tensor)
    assert frames.shape == (4, 8, 256)
    assert set(frames.unique().tolist()) <= {-1.0, 0.0, 1.0}


def test_readme_hugging_face_example_runs(
    repository: Path, teacher_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = (block for block in python_blocks(repository / "README.md") if MODEL_NAME in block)
    exec(compile(block.replace(MODEL_NAME, repr(str(teacher_path))), "README.md", "exec"), {})
    assert "Once upon a time" in capsys.readouterr().out
