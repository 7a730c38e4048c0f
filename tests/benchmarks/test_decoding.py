"""The benchmarks of decoding, on models and matrices of seconds: rates are what was asked for, checks can fail."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from spikelm.cpu import module as cpu_module

if reason := cpu_module.unavailable():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def scripts(repository: Path) -> Iterator[list[ModuleType]]:
    """decoding.py and spike_linear.py of benchmarks/; they leave this process as it was."""
    names = ("decoding", "spike_linear")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        yield [importlib.import_module(name) for name in names]
    for name in names:
        del sys.modules[name]


def test_a_students_rows(scripts: list[ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, _ = scripts
    monkeypatch.setattr(decoding, "PROMPT", 4)
    shape = decoding.Shape(64, 2, 4, 8, 96, 512, 8)
    rates = {
        "some": {"mixer_in": 0.6, "mixer_out": 0.3, "ffn_in": 0.6, "ffn_out": 0.3},
        "few": dict.fromkeys(decoding.SITES, 0.1),
    }
    rows = {row["form"]: row for row in decoding.run_student(shape, torch.float32, rates)}
    assert list(rows) == [
        "dense Llamba", "spiking, some", "dense Llamba, our loop", "deployed, some", "deployed, few",
        "deployed, few, int8 head",
    ]  # fmt: skip
    assert rows["dense Llamba, our loop"]["read_share"] == 1
    assert 0.35 < rows["deployed, some"]["read_share"] < 0.75
    assert 0.03 < rows["deployed, few"]["read_share"] < 0.25
    assert "read_share" not in rows["spiking, some"]
    assert all(row["tokens_per_second"] == 1 / row["seconds_per_token"] for row in rows.values())


def test_a_wrong_projection_is_found(scripts: list[ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, _ = scripts
    model = decoding.Shape(64, 1, 4, 8, 96, 512, 8).llamba().eval()
    decoding.spikelm.spikify(model, decoding.spikelm.Recipe.preset("mar", T=4, tau=0.5, frame_weight=0.5))
    decoding.spikelm.deploy(model)
    decoding.check(model)
    forward = decoding.GatherLinear.forward
    monkeypatch.setattr(decoding.GatherLinear, "forward", lambda layer, x: 1.01 * forward(layer, x))
    with pytest.raises(AssertionError, match="in_proj is off by"):
        decoding.check(model)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "ternary", "binary"])
def test_the_kernel_table_reads_what_it_says(scripts: list[ModuleType], form: str) -> None:
    _, benchmark = scripts
    matrix, weights = benchmark.make(form, 512, 256)
    bits = {"float32": 32, "bfloat16": 16, "int8": 8, "ternary": 2, "binary": 1}[form]
    assert weights.rows.nbytes == 512 * 256 * bits // 8
    spikes = benchmark.draw(2, 256, 0.25, torch.Generator().manual_seed(0))
    assert (spikes != 0).sum(1).tolist() == [64, 64]
    found = benchmark.spike_linear(spikes.to(matrix.dtype), weights).float()
    torch.testing.assert_close(found, spikes @ matrix.float().t(), rtol=1e-2, atol=1e-2)
