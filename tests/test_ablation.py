"""Rows of an ablation are trained once, and one line speaks for several seeds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from spikelm.ablation import Row, markdown, run_rows, spread, write_tables
from spikelm.run import RunDirectory


@dataclass(frozen=True)
class Student(Row):
    width: int = 1


def figures(row: Student) -> dict[str, Any]:
    return {"ce": row.width + row.seed / 10}


def test_a_row_of_two_tables_is_trained_once_and_an_interruption_loses_one_row(tmp_path: Path) -> None:
    plan = {
        "first": [Student("one", 0, 1), Student("one", 1, 1), Student("two", 0, 2)],
        "second": [Student("the same as two", 0, 2), Student("three", 0, 3)],
    }
    trained: list[Student] = []

    def train(row: Student) -> dict[str, Any]:
        if row.width == 3 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        trained.append(row)
        (run.path("training") / row.key).mkdir(parents=True)
        return figures(row)

    interrupted: list[bool] = []
    with RunDirectory(tmp_path / "run", {}) as run:
        with pytest.raises(KeyboardInterrupt):
            run_rows(run, plan, train)
        tables = run_rows(run, plan, train)
        assert [row.name for row in trained] == ["one", "one", "two", "three"]
        assert not list(run.path("training").iterdir())
        assert tables["second"][0][1]["ce"] == 2
        text = write_tables(run, tables, ["ce"], config={"a": 1})
    saved = json.loads((tmp_path / "run" / "ablation.json").read_text())
    assert [row["ce"] for row in saved["first"]] == [1, 1.1, 2] and saved["config"] == {"a": 1}
    assert saved["first"][0]["row"] == {"name": "one", "seed": 0, "width": 1} and saved["versions"]["torch"]
    assert (tmp_path / "run" / "table.md").read_text() == text == markdown(tables, ["ce"])
    assert "| one | 1.0500 +- 0.0707 |" in text and "| two | 2.0000 |" in text


def test_the_key_is_of_what_decides_the_result() -> None:
    row = Student("a", 0, 1)
    assert row.key == Student("b", 0, 1).key
    assert len({row.key, Student("a", 1, 1).key, Student("a", 0, 2).key}) == 3


def test_spread() -> None:
    assert spread([1.25]) == "1.2500"
    assert spread([1.0, 3.0]) == "2.0000 +- 1.4142"
