"""benchmarks/attention.py: what it refuses, and that its figures follow from its times."""

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

MODULES = ("contenders", "measure", "attention")


@pytest.fixture(scope="module")
def scripts(repository: Path) -> Iterator[SimpleNamespace]:
    """The scripts of benchmarks/ as they import each other; they leave this process as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        patch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # attention.py sets it
        loaded = SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        patch.setattr(loaded.measure, "reuse_memory", lambda: "as it is")
        yield loaded
        for name in MODULES:
            del sys.modules[name]


def command(scripts: SimpleNamespace, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmarks/attention.py", "--quick", "--threads", "1", *arguments])
        scripts.attention.main()


@pytest.fixture(scope="module")
def result(scripts: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("results") / "new" / "quick.json"
    command(scripts, "--output", str(path))
    return json.loads(path.read_text())


def test_everyone_is_there_and_equal(scripts: SimpleNamespace, result: dict[str, Any]) -> None:
    names = scripts.attention
    assert (
        result["command"] == f"python benchmarks/attention.py --quick --threads 1 {result['command'].split(' 1 ')[1]}"
    )
    assert [row["contender"] for row in result["rows"]] == 3 * [
        names.OURS, names.PACKED, names.FLOAT32, names.BLOCKS, names.BFLOAT16, names.SOFTMAX
    ]  # fmt: skip
    assert {(row["phase"], row["L"], row["num_keys"]) for row in result["rows"]} == {
        ("a sequence", 33, 33),
        ("a sequence", 64, 64),
        ("one token", 1, 40),
    }
    assert [row["equal"] for row in result["rows"]] == 3 * [True, True, True, True, True, False]
    assert all(0 < row["density_of_the_map"] < 1 for row in result["rows"] if "density_of_the_map" in row)
    assert all(line["met"] is None for line in result["must_show"])  # a smoke run judges nothing


def test_figures_follow_from_the_times(scripts: SimpleNamespace, result: dict[str, Any]) -> None:
    ours, _, whole, blocks, sixteen, softmax = result["rows"][:6]
    speeds = {row["contender"]: row["us"] / ours["us"] for row in (whole, blocks, sixteen)}
    assert ours["times_faster"] == pytest.approx(speeds, rel=1e-3)
    assert ours["in_those_of_softmax"] == pytest.approx(ours["us"] / softmax["us"], rel=1e-3)
    line = result["must_show"][0]
    assert line["measured"] == pytest.approx(min(speeds[name] for name in scripts.attention.IN_FLOAT32), rel=1e-3)
    (judged, *_) = scripts.attention.must_show([ours | {"times_faster": dict.fromkeys(speeds, 3.9)}], quick=False)
    assert judged["met"] is False
    assert "times_faster" not in softmax


def test_cached_elements_are_bits(scripts: SimpleNamespace) -> None:
    assert scripts.attention.cache_bits(scripts.attention.PLANS["full"]) == {"spikelm": 1.0, "bfloat16": 16}


def test_one_token_is_packed_into_the_cache(scripts: SimpleNamespace) -> None:
    attention = scripts.attention.Attention(scripts.attention.PLANS["quick"], 1, 40)
    before = [tensor.clone() for tensor in attention.packed]
    attention.packed[1][..., 39] = 0
    attention.packed[2][:, :, :, 1] &= ~(1 << 7)
    assert all(torch.equal(*pair) for pair in zip(attention.pack(), before, strict=True))


def test_nothing_is_written_if_ours_is_wrong(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = scripts.attention.spiking_attention

    def wrong(*arguments: Any, **options: Any) -> Any:
        out, fired = right(*arguments, **options)
        return out, fired + 1

    monkeypatch.setattr(scripts.attention, "spiking_attention", wrong)
    with pytest.raises(SpikelmError, match="spikelm does not equal products of float spikes around BinaryIF"):
        command(scripts, "--output", str(tmp_path / "out.json"))
    assert not list(tmp_path.iterdir())


def test_who_computes_something_else_gets_no_ratio(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.attention, "ROWS", {scripts.attention.BLOCKS: 0, scripts.attention.BFLOAT16: 512})
    products = scripts.attention.Attention.products

    def wrong(self: Any, *tensors: torch.Tensor, rows: int, **options: Any) -> torch.Tensor:
        return products(self, *tensors, rows=rows or self.L, **options) + (rows == 0)

    monkeypatch.setattr(scripts.attention.Attention, "products", wrong)
    rows = scripts.attention.group(scripts.attention.PLANS["quick"], "a sequence", 33, 33, 1)
    assert set(rows[0]["times_faster"]) == {scripts.attention.FLOAT32, scripts.attention.BFLOAT16}
    assert scripts.attention.must_show(rows, quick=False)[0]["met"] is None
