"""benchmarks/training_memory.py: what it counts is what is there, and what it refuses."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

from spikelm.errors import SpikelmError
from spikelm.layers import SpikingLinear
from spikelm.neurons import ATMN

if not hasattr(neuron, "ILIFNode"):
    pytest.skip("the benchmarks need SpikingJelly 2", allow_module_level=True)

MODULES = ("contenders", "measure", "training_memory")


@pytest.fixture(scope="module")
def script(repository: Path) -> Iterator[ModuleType]:
    """The benchmark, which imports its neighbours; they leave this process as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        patch.setenv("KINETO_LOG_LEVEL", "99")
        loaded = importlib.import_module("training_memory")
        patch.setattr(loaded, "give_back_freed_memory", lambda: None)  # it is for processes of their own
        yield loaded
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module", params=[0, 1], ids=["Llamba", "Llama"])
def arms(script: ModuleType, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    return {arm: script.measured(script.QUICK[request.param], arm) for arm in script.ARMS}


def test_bits_take_an_eighth_and_the_peak_falls_by_the_rest(arms: dict[str, dict[str, Any]]) -> None:
    dense, bits = arms["dense"], arms["bits"]
    assert dense["kept"]["spikes"] == 8 * bits["kept"]["spikes"] > 0
    assert {who: bits["kept"][who] for who in ("neurons", "others")} == {
        who: dense["kept"][who] for who in ("neurons", "others")
    }
    saved = dense["kept"]["spikes"] - bits["kept"]["spikes"]
    assert dense["held"] - bits["held"] == pytest.approx(saved, rel=0.02)
    assert 0.8 * saved < dense["peak"] - bits["peak"] < 1.2 * saved
    assert dense["gradients"] == bits["gradients"]


def test_every_projection_of_a_layer_is_named(script: ModuleType, arms: dict[str, dict[str, Any]]) -> None:
    dense, bits = (arms[arm]["kept_of_first_layer"] for arm in script.ARMS)
    assert {name.rpartition(".")[2] for name in dense} >= {"gate_proj", "up_proj", "down_proj"}
    assert {name: size // 8 for name, size in dense.items()} == bits


def test_kept_of_one_projection(script: ModuleType) -> None:
    """Counted by hand: 16 x 64 float32 inputs, ternary spikes in 2 bit each, and 64 thresholds."""
    layer = SpikingLinear.from_linear(nn.Linear(64, 8), ATMN(T=1, num_channels=64))
    model, x = nn.Sequential(layer), torch.randn(16, 64)
    keepers, projections = script.kept(model, model(x).sum())
    assert keepers["spikes"] == 16 * 64 * 2 // 8 and projections == {"0": keepers["spikes"]}
    assert keepers["neurons"] == x.nbytes + 64 * 4
    with script.spikes_stored(as_bits=False):
        assert script.kept(model, model(x).sum())[0]["spikes"] == x.nbytes


def test_the_allocator_s_figures(script: ModuleType) -> None:
    def run() -> torch.Tensor:
        largest = torch.zeros(3000)
        return largest[:1000].clone()

    result, used, highest = script.allocated(run)
    assert (used, highest) == (4000, 16000) and result.numel() == 1000


def test_what_is_refused(script: ModuleType) -> None:
    figures = {"gradients": "a", "kept": {"spikes": 60, "others": 40}, "held": 100}
    script.check(script.QUICK[0], {"dense": figures, "bits": figures})
    with pytest.raises(SpikelmError, match="gradients of Case"):
        script.check(script.QUICK[0], {"dense": figures, "bits": figures | {"gradients": "b"}})
    with pytest.raises(
        SpikelmError, match="bits: 160 bytes are in use behind the forward and the graph keeps only 100"
    ):
        script.check(script.QUICK[0], {"dense": figures, "bits": figures | {"held": 160}})


def test_the_line_to_meet_is_about_the_worst_row(script: ModuleType) -> None:
    def row(spikes: int) -> dict[str, Any]:
        dense, bits = {"kept": {"spikes": 80}}, {"kept": {"spikes": spikes}}
        return {"neuron": script.TERNARY, "dtype": "bfloat16", "dense": dense, "bits": bits}

    line = script.must_show([row(10), row(16)], quick=False)[0]
    assert line["measured"] == 5 and line["met"] is False
    assert script.must_show([row(10)], quick=False)[0]["met"] is True
