"""benchmarks/compare.py: what it refuses, how it counts, and that its tables and picture show what it wrote."""

import copy
import dataclasses
import gc
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import neuron

from spikelm.cpu import module as cpu_module
from spikelm.errors import SpikelmError

if reason := cpu_module.unavailable():
    pytest.skip(reason, allow_module_level=True)
if not hasattr(neuron, "ILIFNode"):
    pytest.skip("the benchmarks need SpikingJelly 2", allow_module_level=True)

MODULES = ("contenders", "measure", "compare", "student_tables", "tables")


@pytest.fixture(scope="module")
def scripts(repository: Path) -> Iterator[SimpleNamespace]:
    """The scripts of benchmarks/ as they import each other; they leave this process as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        patch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # compare.py sets it
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
        loaded = SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        patch.setattr(loaded.measure, "reuse_memory", lambda: "as it is")
        yield loaded
        for name in MODULES:
            del sys.modules[name]
    gc.unfreeze()


def command(scripts: SimpleNamespace, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmarks/compare.py", "--device", "cpu", *arguments])
        patch.setattr(scripts.measure, "_peak_elsewhere", lambda one: scripts.measure._peak(*one))
        scripts.compare.main()


@pytest.fixture(scope="module")
def written(scripts: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("results") / "new" / "quick.json"
    command(scripts, "--quick", "--no-compile", "--output", str(path))
    return json.loads(path.read_text())


@pytest.fixture
def result(written: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(written)


def rows(result: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if wanted.items() <= row.items()]


def test_a_quick_run_has_every_section_and_all_are_equal(scripts: SimpleNamespace, result: dict[str, Any]) -> None:
    assert result["command"].startswith("python benchmarks/compare.py --device cpu --quick")
    assert {"python", "torch", "spikingjelly", "snntorch", "spikelm", "machine"} <= set(result["versions"])
    assert {row["section"] for row in result["rows"]} == {"neurons", "types", "shapes", "dispatch", "sums"}
    for kind, one in scripts.contenders.NEURONS.items():
        for direction in ("forward", "forward + backward"):
            group = rows(result, section="neurons", neuron=kind, direction=direction)
            assert [row["contender"] for row in group] == ["spikelm", "spikelm op", one.peer, "copy", "read"]
            assert all(row["equal"] for row in group[:3]), (kind, direction)
            assert group[0]["times_faster"].keys() == {one.peer}
    int8 = rows(result, section="types", contender="spikelm op, int8")
    assert {(row["dtype"], row["direction"], row["bytes_per_element_step"]) for row in int8} == {
        ("bfloat16", "forward", 3)
    }
    assert {(row["frame_weight"], row["T"]) for row in rows(result, section="sums") if "T" in row} == {
        (weight, T) for weight in (1.0, 0.5) for T in (1, 4)
    }
    assert all(row["met"] is None for row in result["must_show"])  # a smoke run judges nothing


def test_figures_follow_from_the_times(result: dict[str, Any]) -> None:
    direction = {"section": "neurons", "neuron": "ternary", "direction": "forward + backward"}
    ours, _, theirs, floor, _ = rows(result, **direction)
    count = ours["T"] * ours["N"]
    assert ours["ns_per_element_step"] == pytest.approx(1e3 * ours["us"] / count, rel=1e-3)
    assert ours["to_floor"] == pytest.approx(ours["us"] / (floor["us"] * 20 / 8), rel=1e-3)
    assert ours["times_faster"]["SpikingJelly"] == pytest.approx(theirs["us"] / ours["us"], rel=1e-3)
    assert ours["quartiles_us"][0] <= ours["us"] <= ours["quartiles_us"][1]


def test_bytes_saved_are_those_of_the_definition(result: dict[str, Any]) -> None:
    for row in result["saved"]:
        if row["contender"].startswith("spikelm"):
            size = 2 if row["dtype"] == "bfloat16" else 4
            assert (row["x"], row["besides"]) == (4 * 2**14 * size, 4), row  # 4: the threshold


@pytest.mark.parametrize("wrong", ["spikes", "gradient", "nan"])
def test_who_computes_something_else_gets_no_ratio(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    kind = scripts.contenders.NEURONS["ternary"]
    right = kind.theirs()

    def forward(x: torch.Tensor) -> torch.Tensor:
        spikes = right.forward(x)
        if wrong == "gradient":
            return spikes.detach() + 1.01 * (spikes - spikes.detach())
        one = torch.zeros_like(spikes)
        one[-1, -1] = 1 if wrong == "spikes" else float("nan")
        return spikes + one

    peer = dataclasses.replace(right, forward=forward)
    monkeypatch.setitem(scripts.contenders.NEURONS, "ternary", dataclasses.replace(kind, theirs=lambda: peer))
    comparison = scripts.compare.Comparison(scripts.compare.PLANS["quick"], "cpu", False)
    comparison.group("neurons", "ternary", 4, 64, "float32", "forward + backward")
    ours, _, theirs, *_ = comparison.rows
    assert (ours["equal"], theirs["equal"]) == (True, False)
    assert ours["times_faster"] == {}
    assert "times_faster" not in theirs
    assert theirs["us"] > 0
    if wrong == "gradient":
        assert theirs["spikes_that_differ"] == 0
        assert theirs["gradient_off_by"] == pytest.approx(0.01, rel=1e-2)
    else:
        assert theirs["spikes_that_differ"] == pytest.approx(1 / 256, rel=1e-3)
    text = scripts.tables.groups(comparison.rows, ("neuron", "direction"))
    assert "(not equal)" in text
    assert "x)" not in text


def test_nothing_is_written_if_ours_is_wrong(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    operation = scripts.contenders.operation

    def wrong(*arguments: Any) -> Any:
        right = operation(*arguments)
        return dataclasses.replace(right, forward=lambda x: right.forward(x).roll(1, 1))

    monkeypatch.setattr(scripts.contenders, "operation", wrong)
    monkeypatch.setattr(scripts.measure, "peak_memory", lambda *_: [])
    with pytest.raises(SpikelmError, match="spikelm op does not compute what .*reference.py does"):
        command(scripts, "--quick", "--no-compile", "--output", str(tmp_path / "out.json"))
    assert not list(tmp_path.iterdir())


def test_calls_are_interleaved_and_prepared(scripts: SimpleNamespace) -> None:
    log: list[str] = []

    def pair(name: str) -> tuple[Any, Any]:
        return lambda: log.append(f"prepare {name}"), lambda: log.append(name)

    timings = scripts.measure.interleave({"a": pair("a"), "b": pair("b")}, "cpu", seconds=0, block=2)
    assert log[0::2] == [f"prepare {name}" for name in log[1::2]]
    calls = log[1::2][4:]  # after two rounds of warming up
    assert len(calls) == 20
    pairs = list(zip(calls[0::2], calls[1::2], strict=True))
    assert all(first == second for first, second in pairs)  # blocks of two
    orders = {tuple(name for name, _ in pairs[i : i + 2]) for i in range(0, 10, 2)}
    assert orders == {("a", "b"), ("b", "a")}
    assert all(timing.calls == 10 and timing.low <= timing.median <= timing.high for timing in timings.values())


def test_storages_saved_for_the_backward_count_once(scripts: SimpleNamespace) -> None:
    x = torch.rand(10)
    saved = {
        "x": scripts.contenders.Contender("", lambda x: x * x[:]),
        "exp": scripts.contenders.Contender("", lambda x: x.exp()),
        "both": scripts.contenders.Contender("", lambda x: x * x.exp()),
    }
    found = {name: scripts.measure.saved_bytes(one, x) for name, one in saved.items()}
    assert found == {
        "x": {"x": 40, "besides": 0},
        "exp": {"x": 0, "besides": 40},
        "both": {"x": 40, "besides": 40},
    }


def test_peak_memory_is_that_of_another_process(scripts: SimpleNamespace) -> None:
    T, N = 16, 2**20
    (found,) = scripts.measure.peak_memory([("ternary", "spikelm")], T, N, "cpu")
    least = 2 * 4 * T * N  # spikes and x's gradient
    assert least <= found["besides_inputs"] < 1.5 * least
    assert found["peak"] == found["besides_inputs"] + 2 * 4 * T * N


def test_the_worst_neuron_decides(scripts: SimpleNamespace, result: dict[str, Any]) -> None:
    result["quick"] = False

    def line(text: str) -> dict[str, Any]:
        (found,) = (line for line in scripts.compare.must_show(result) if text in line["line"])
        return found

    of = {"section": "neurons", "contender": "spikelm op", "direction": "forward"}
    for row in rows(result, **of):
        row["to_floor"] = 1.1
    floors = line("forward, spikelm op: time in byte floors")
    assert (floors["measured"], floors["met"], len(floors["each"])) == (1.1, True, 6)
    rows(result, **of, neuron="integer")[0]["to_floor"] = 1.2
    floors = line("forward, spikelm op: time in byte floors")
    assert (floors["measured"], floors["met"]) == (1.2, False)

    for row in rows(result, section="neurons", contender="spikelm", direction="forward"):
        if row["neuron"] != "LIF, delayed reset":
            row["times_faster"]["SpikingJelly"] = 11.0 if row["neuron"] in ("ternary", "integer") else 8.5
    assert line("forward, binary: times faster")["met"] is True
    assert line("forward, ternary and integer: times faster")["met"] is True
    (ternary,) = rows(result, section="neurons", contender="spikelm", direction="forward", neuron="ternary")
    ternary["times_faster"]["SpikingJelly"] = 9.9
    assert line("forward, binary: times faster")["met"] is True
    assert line("forward, ternary and integer: times faster")["met"] is False

    del ternary["times_faster"]["SpikingJelly"]  # as if its node had computed something else
    assert line("forward, ternary and integer: times faster")["met"] is None

    assert line("forward, spikelm op: time in those of torch.compile")["met"] is None  # it took no part
    assert line("saved for backward")["met"] is True
    next(row for row in result["saved"] if row["contender"] == "spikelm")["besides"] += 1
    assert line("saved for backward")["met"] is False


def test_a_gpu_has_lines_of_its_own(scripts: SimpleNamespace, result: dict[str, Any]) -> None:
    result |= {"device": "cuda", "quick": False}
    lines = {line["line"]: line for line in scripts.compare.must_show(result)}
    share = lines["forward, bfloat16, spikelm op: percent of the copy's bandwidth"]
    (row,) = rows(result, section="types", contender="spikelm op", direction="forward")
    assert share["measured"] == pytest.approx(100 / row["to_floor"], abs=0.01)
    assert share["met"] is (share["measured"] >= 85)
    assert not any("one call" in name for name in lines)


def test_tables_and_picture_show_the_figures(
    scripts: SimpleNamespace, result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = scripts.tables
    text = tables.comparison_of(result, "images/roofline_cpu.png")
    assert "![Time against bytes](images/roofline_cpu.png)" in text
    (ours,) = rows(result, section="neurons", contender="spikelm", direction="forward", neuron="integer")
    (theirs,) = rows(result, section="neurons", contender="SpikingJelly", direction="forward", neuron="integer")
    (line,) = (line for line in text.splitlines() if line.startswith("| integer | forward |"))
    cells = [cell.strip() for cell in line.split("|")[3:]]
    assert cells[0] == f"{tables.number(ours['ns_per_element_step'])} ({ours['to_floor']:.2f})"
    assert cells[2] == f"{tables.number(theirs['ns_per_element_step'])} ({ours['times_faster']['SpikingJelly']:.1f}x)"
    widths = {len(line.split("|")) for line in text.split("### ")[2].splitlines() if line.startswith("|")}
    assert len(widths) == 1

    for module in (tables, scripts.student_tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    assert "--device cuda --output benchmarks/results/h200.json" in tables.comparison("h200")
    (tmp_path / "h200.json").write_text(json.dumps(result))
    assert "images/roofline_h200.png" in tables.comparison("h200")
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is not installed")
    assert tables.roofline(result, tmp_path / "roofline.png").stat().st_size > 10_000


def test_the_pictures_of_the_committed_results_are_there(repository: Path) -> None:
    shown = [line for line in (repository / "docs" / "benchmarks.md").read_text().splitlines() if line.startswith("![")]
    for line in shown:
        assert (repository / "docs" / line.split("(")[1].rstrip(")")).exists(), line


def test_the_small_benchmarks_run(scripts: SimpleNamespace) -> None:
    module = importlib.import_module("benchmarks.test_neurons")
    ran = []

    class Benchmark:
        group = ""

        def pedantic(self, call: Any, *, setup: Any, **_: Any) -> None:
            setup()
            ran.append((self.group, call().shape))

    for case in module.CASES:
        module.test_neuron(Benchmark(), *case.values)
    assert len(ran) == 3 * 2 * len(scripts.contenders.NEURONS)
    assert {shape for _, shape in ran} == {(4, 2**16)}
