"""The tutorials run from beginning to end in an empty directory, quickly, and print what they promise."""

import importlib.util
import re
import time
from types import ModuleType
from typing import Any

import pytest

from tests.documents import DOCS

nbformat = pytest.importorskip("nbformat", reason="needs the extra docs")
pytest.importorskip("nbclient", reason="needs the extra docs")
pytest.importorskip("ipykernel", reason="needs the extra docs")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """docs/hooks.py, with which the site executes the same notebooks."""
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    specification = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def executed(name: str, hooks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    """The notebook with its outputs, and all that its cells printed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(DOCS / "tutorials" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    start = time.monotonic()
    hooks.execute_notebook(notebook, timeout=150)
    assert time.monotonic() - start < 150, "a tutorial takes a minute on one idle core"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return notebook, "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.mark.slow
def test_convert_a_model(hooks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    _, printed = executed("convert_a_model", hooks, monkeypatch)
    last = printed.strip().splitlines()[-1]
    ce = {name: float(value) for name, value in re.findall(r"([a-z1 ]+?) (\d\.\d+)", last)}
    assert list(map(str.strip, ce)) == ["teacher", "stage 1", "calibrated", "student"]
    teacher, stage1, calibrated, student = ce.values()
    assert teacher < 4.5, "a unigram model of this text is above 5"
    assert stage1 < teacher + 0.3
    assert student < calibrated
    assert len(re.findall(r"sum of rates 0*[1-9.]", printed)) == 8, "a line for each bank of neurons"


def test_write_a_neuron(hooks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook, printed = executed("write_a_neuron", hooks, monkeypatch)
    assert printed.startswith("[0.0, 0.0, 1.0, -1.0, 0.0]\n")
    accuracy = re.search(r"accuracy of the last batch (\d\.\d+)", printed)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.85
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    page = "\n".join(hooks.outputs_markdown(outputs))
    assert "data:image/png;base64," in page
    assert "[0.0, 0.0, 1.0, -1.0, 0.0]" in page


@pytest.mark.slow
def test_read_an_energy_report(hooks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook, printed = executed("read_an_energy_report", hooks, monkeypatch)
    benefits = re.findall(r"(?:alone|that runs): +(\d+\.\d+)", printed)
    assert len(benefits) == 2
    assert float(benefits[0]) > float(benefits[1]) > 1
    assert len(re.findall(r"sum of rates \d\.\d+: projections", printed)) == 3
    page = "\n".join(hooks.outputs_markdown([one for cell in notebook.cells for one in cell.get("outputs", [])]))
    assert "estimate, not measured on hardware" in page
    assert "\n| spiking projections | " in page


def test_an_error_in_a_cell_is_raised(hooks: ModuleType) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2, 'not equal'")])
    with pytest.raises(Exception, match="not equal"):
        hooks.execute_notebook(notebook, timeout=60)
