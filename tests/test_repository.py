"""The repository's own rules: sizes, versions, and that what the documents name is there and runs."""

import os
import re
from pathlib import Path

import pytest

import spikelm

DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "examples/README.md",
    "docs/install.md",
    "docs/faithfulness.md",
    "docs/neurons.md",
    "docs/extending.md",
    "docs/digits.md",
    "docs/bispikclm.md",
    "docs/spikingbert.md",
    "docs/weights.md",
)


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
