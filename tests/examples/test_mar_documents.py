"""examples/mar/train.py on documents some of which cannot be read."""

import json
from pathlib import Path
from typing import Any

import pytest

from spikelm.experiment import BAD_DOCUMENTS

FEW_STEPS = {
    "distillation.steps": 2,
    "spiking.optimisation.steps": 2,
    "evaluation_contexts": 2,
    "max_tokens": 2000,
}


@pytest.fixture
def documents(mar: Any, tmp_path: Path) -> Path:
    """The text's lines as documents; lines 1, 4, 7, ... 34 are bad."""
    lines = [json.dumps({"text": line}).encode() for line in mar.text.read_text().split("\n")]
    for number in range(12):
        lines.insert(3 * number, b"\xff{")
    path = tmp_path / "documents.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def test_too_many_are_one_line_and_more_are_accepted_in_the_same_place(
    mar: Any, same_teacher: dict[str, Any], documents: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fields = same_teacher | FEW_STEPS | {"data": documents}
    assert mar.run(tmp_path / "run", fields) == 2
    last = capfd.readouterr().err.rstrip("\n").split("\n")[-1]
    assert last.startswith(
        f"error: more than max_bad_documents=10 documents cannot be read: {documents} line 1: not UTF-8"
    )

    with pytest.warns(
        UserWarning, match="skipped 12 documents that cannot be read: .*documents.jsonl line 1: not UTF-8"
    ):
        assert mar.run(tmp_path / "run", fields | {"max_bad_documents": 12}) == 0
    bad = json.loads((tmp_path / "run" / BAD_DOCUMENTS).read_text())
    assert [document["line"] for document in bad] == list(range(1, 36, 3))
    assert {document["source"] for document in bad} == {str(documents)}
