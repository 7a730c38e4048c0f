"""report on networks of others, against a count by hand and SpikingJelly's own counters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from transformers import AutoModelForCausalLM

from spikelm import deploy
from spikelm.energy import report
from spikelm.energy.attention import PlainAttention
from spikelm.energy.spikes import Flow, mark
from spikelm.energy.trace import Trace
from spikelm.neurons import ATMN, TILIF, BinaryIF
from tests.energy.report_cases import IDS, calibrated, rows_of, total
from tests.small_models import bert, bispikclm, spikingbert


@pytest.mark.parametrize("mode", ["m", "s"])
def test_a_spikingjelly_network(mode: str) -> None:
    """All T at once or a step at a time: the same dense pass, the same spikes."""

    class Steps(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.net(x) for x in x_seq])

    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1, bias=False),
        neuron.LIFNode(tau=2.0),
        layer.Conv2d(4, 4, 3, padding=1, bias=False),
        neuron.IFNode(),
        layer.Flatten(),
        layer.Linear(4 * 25, 3, bias=False),
    )
    for kernel in net.parameters():
        kernel.data.abs_()  # so that spikes get to the end
    functional.set_step_mode(net, mode)
    x_seq = 3 * torch.rand(6, 2, 1, 5, 5)
    if mode == "m":
        found = report(net, x_seq)
    else:
        found = report(Steps(net), {"x_seq": x_seq})
    phase = found.data["phases"]["forward"]
    units = phase["units"]
    first, second, last = phase["products"]
    assert not first["spiking"] and second["spiking"] and last["spiking"]
    assert (first["mac"] * units, last["mac"] * units) == (2 * 25 * 36, 2 * 300)
    assert first["mac_executed"] == 6 * first["mac"]
    functional.reset_net(net)
    functional.set_step_mode(net, "m")
    with torch.no_grad():
        spikes = net[3](net[2](net[1](net[0](x_seq))))
    functional.reset_net(net)
    assert last["spikes"] * units == float(spikes.sum()) > 0
    assert last["accumulations"] * units == 3 * float(spikes.sum())
    assert last["frames"] == 6 and last["levels"] == 7 and last["bits"] == 3
    assert (
        phase["neurons"][0]["multiplications"]
        == phase["neurons"][0]["updates"]
        > 0
        == phase["neurons"][1]["multiplications"]
    )


def test_agrees_with_op_counter_on_binary_spikes_and_where_that_miscounts() -> None:
    op_counter = pytest.importorskip(
        "spikingjelly.activation_based.op_counter", reason="SpikingJelly counts operators from 2.0 on"
    )

    def theirs(net: nn.Module, x: torch.Tensor) -> tuple[int, int]:
        added, multiplied = op_counter.SynOpCounter(), op_counter.MACCounter()
        with torch.no_grad(), op_counter.DispatchCounterMode([added, multiplied]):
            net(x)
        functional.reset_net(net)
        return added.get_total(), multiplied.get_total()

    def ours(net: nn.Module, x: torch.Tensor) -> tuple[float, float]:
        phase = report(net, x).data["phases"]["forward"]
        rows, units = phase["products"], phase["units"]
        added = sum(row["accumulations"] or 0.0 for row in rows)
        return round(added * units), round(sum(r["mac_executed"] for r in rows if not r["spiking"]) * units)

    torch.manual_seed(0)
    binary = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1, bias=False),
        neuron.IFNode(),
        layer.Conv2d(4, 6, 3, stride=2, bias=False),
        neuron.LIFNode(),
        layer.Flatten(),
        layer.Linear(24, 16, bias=False),
        BinaryIF(),
        layer.Linear(16, 3, bias=False),
    )
    functional.set_step_mode(binary, "m")
    x_seq = 3 * torch.rand(4, 2, 1, 5, 5)
    assert ours(binary, x_seq) == theirs(binary, x_seq) and min(ours(binary, x_seq)) > 0
    for bank in (ATMN(T=4, inject="every"), TILIF(D=4)):  # -1 and 2 are no spikes to op_counter: all is MAC
        net = nn.Sequential(bank, layer.Linear(24, 16, bias=False)).eval()
        functional.set_step_mode(net, "m")
        x_seq = 2 * torch.randn(4, 3, 24)
        added, multiplied = theirs(net, x_seq)
        assert (added, multiplied) == (0, 4 * 3 * 24 * 16)
        with torch.no_grad():
            spikes = float(bank(x_seq).abs().sum())
        functional.reset_net(net)
        assert ours(net, x_seq) == (16 * spikes, 0)


def test_a_snntorch_network() -> None:
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 6, bias=False), nn.Linear(6, 2, bias=False)
            self.leaky = snntorch.Leaky(beta=0.9, init_hidden=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.last(self.leaky(self.first(x))) for _ in range(5)])

    torch.manual_seed(0)
    phase = report(Net(), 4 * torch.rand(3, 8)).data["phases"]["forward"]
    first, last = phase["products"]
    assert not first["spiking"] and last["spiking"] and last["frames"] == 5
    assert (first["mac"], last["mac"]) == (48.0, 12.0)
    assert last["accumulations"] == pytest.approx(2 * phase["neurons"][0]["spikes"]) and last["spikes"] > 0


@pytest.mark.parametrize("weights", ["float", "ternary"])
def test_spikingbert_takes_T_times_the_rates(weights: str) -> None:
    model = spikingbert(weights=weights)
    found = report(model, {"input_ids": IDS, "T": 8})
    with torch.no_grad():
        rates = model(IDS, T=8, output_rates=True).firing_rates
    by_scope = {row["scope"]: row for row in rows_of(found, "forward", role="projection", spiking=True)}
    for place, population in (("query", "input_neuron"), ("output", "layers.0.intermediate_neuron")):
        row = by_scope[f"bert.layers.0.{place}"]
        assert row["sum_of_rates"]["mean"] == pytest.approx(8 * float(rates[population]), rel=1e-5)
        assert row["accumulations"] == pytest.approx(row["mac"] * row["sum_of_rates"]["mean"], rel=1e-9)
        assert row["mac"] == (32 * 32 if place == "query" else 64 * 32)
    key = by_scope["bert.layers.0.key"]["multiplications"]
    assert key == 0, "the scale is in the threshold"
    assert by_scope["bert.layers.0.query"]["multiplications"] == (0 if weights == "float" else 8 * 32)
    norms = [row for row in found.data["phases"]["forward"]["elementwise"] if row["group"] == "norm"]
    inside = [row for row in norms if "layers" in row["scope"]]
    assert inside and all(row["executed"]["multiplication"] == 8 * row["once"]["multiplication"] for row in inside)


@pytest.mark.parametrize(("at_once", "feedback"), [(3, False), (1, False), (1, True)])
def test_steps_at_once_change_nothing(at_once: int, feedback: bool) -> None:
    """T = 8 in calls of 3, 3 and 2, or one by one, and as one call."""
    several, whole = (spikingbert(steps_at_once=steps, feedback=feedback) for steps in (at_once, 8))
    if feedback:
        torch.nn.init.normal_(several.bert.feedback.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    one, other = (report(model, {"input_ids": IDS, "T": 8}) for model in (several, whole))
    by_scope = {row["scope"]: row for row in rows_of(other, "forward", role="projection")}
    for row in rows_of(one, "forward", role="projection"):
        if row["scope"] == "bert.feedback":
            assert row["mac"] == 32 * 32 and row["frames"] == 7 and row["spiking"]
            continue
        same = by_scope[row["scope"]]
        keys = ("mac", "frames", "levels") + (() if feedback else ("mac_executed", "accumulations", "sum_of_rates"))
        assert all(row[key] == pytest.approx(same[key]) for key in keys), row["scope"]
        assert row["bytes"]["activations"]["dense"] == same["bytes"]["activations"]["dense"]
    assert feedback == any(row["scope"] == "bert.feedback" for row in rows_of(one, "forward"))


def test_a_bert_and_a_llama_are_dense(tiny_llama: Any) -> None:
    found = report(bert(), {"input_ids": IDS, "labels": torch.zeros(3, dtype=torch.long)})
    assert list(found.data["phases"]) == ["forward"] and found.data["whole"] is None
    phase = report(tiny_llama, IDS).data["phases"]["decode"]
    scores = [row for row in phase["products"] if row["role"] == "mixing"]
    assert sum(row["mac"] for row in scores) == 2 * 2 * 4 * 8 * 13, "layers, products, heads, their size, keys"
    assert phase["cache_bytes"] == 2 * 2 * 16 * 4, "keys and values of one token are written"
    assert not phase["unknown"] and any(row["group"] == "softmax" for row in phase["elementwise"])


def test_stories260k_takes_seconds(teacher_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher_path)
    found = report(model, torch.arange(3, 131)[None], measure=True)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    rows = rows_of(found, "decode", role="projection") + rows_of(found, "decode", role="head")
    assert total(rows, "mac") == linear
    seconds = found.data["latency"]["median_seconds"]
    assert 0 < seconds["decode"] < seconds["prefill"] * 10
    assert found.data["latency"]["joules_prefill"] is None and "NVML" in found.data["latency"]["no_joules_because"]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_plain_attention_is_the_fused_one(groups: int, mask: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator)
    key, value = (torch.randn(2, groups, 5, 8, generator=generator) for _ in range(2))
    allowed = torch.rand(2, 1, 5, 5, generator=generator) > 0.4
    allowed[0, 0, 2] = False  # a row that sees nothing
    options: dict[str, Any] = {"enable_gqa": groups < 4, "is_causal": mask == "causal"}
    if mask in ("bool", "float"):
        options["attn_mask"] = allowed if mask == "bool" else torch.zeros(2, 1, 5, 5).masked_fill(~allowed, -1e9)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, **options)
    with PlainAttention():
        found = nn.functional.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(found, expected)


def test_outputs_under_the_count_are_the_models() -> None:
    """Of what runs in another form: attention on bits, gathered rows, fused attention."""
    for model in (bispikclm(), deploy(calibrated("llamba")), bert()):
        x = IDS.detach()
        mark(x, Flow())
        with torch.no_grad():
            expected = model(IDS).logits
            with PlainAttention(), Trace(model):
                found = model(x).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
