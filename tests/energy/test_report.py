"""report: the papers' figures on real shapes, forms that must agree, and what it hands out."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM

from spikelm import Recipe, deploy, spikify
from spikelm.energy import COSTS, CostTable, OperationCounter, Report, report
from spikelm.energy.spikes import flow_of
from spikelm.errors import SpikelmError
from spikelm.evaluate import firing_statistics
from spikelm.layers import TernaryLinear
from spikelm.models.llamba import LlambaConfig, LlambaForCausalLM
from spikelm.neurons import ATMN
from tests.energy.report_cases import IDS, calibrated, rows_of, total
from tests.small_models import llamba

ROWS = [{"input_ids": row} for row in IDS.tolist()]


# ---- the papers' figures, from real configurations without weights


def test_llamba_1b() -> None:
    """MAR: 1.142e9 MAC per token in the decoder's linear layers, 262.7e6 in the head."""
    heads = {"d_state": 64, "n_v_heads": 32, "n_qk_heads": 32, "d_conv": 4, "expand": 1, "chunk_size": 128}
    config = LlambaConfig(
        vocab_size=128256, d_model=2048, n_layer=16, mlp_cfg={"intermediate_size": 8192}, ssm_cfg=heads
    )
    with torch.device("meta"):
        model = LlambaForCausalLM(config)
    found = report(spikify(model, "mar"), torch.zeros((1, 128), dtype=torch.long, device="meta"))
    for phase in ("prefill", "decode"):
        projections = found.data["phases"][phase]["projections"]
        assert projections["mac"] == pytest.approx(1.142e9, rel=1e-3)
        assert projections["dense_pj"] == pytest.approx(5.25e9, rel=1e-3)
        assert total(rows_of(found, phase, role="head"), "mac") == pytest.approx(262.7e6, rel=1e-3)
        assert projections["accumulations"] is None and projections["benefit"] is None
        assert all(row["sum_of_rates"] is None for row in rows_of(found, phase))
    assert "not known" in found.to_markdown()
    with pytest.raises(SpikelmError, match="no energies to draw"):
        found.plot("unused.png")


def test_mamba2_1_3b() -> None:
    """SpikingMamba: projections 1.239 G, convolution 0.0008 G, SSM about 0.075 G, head 0.103 G MAC per token."""
    config = Mamba2Config(
        hidden_size=2048,
        num_hidden_layers=48,
        state_size=128,
        num_heads=64,
        head_dim=64,
        n_groups=1,
        expand=2,
        conv_kernel=4,
        vocab_size=50288,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = Mamba2ForCausalLM(config)
    found = report(spikify(model, "spikingmamba"), torch.zeros((1, 512), dtype=torch.long, device="meta"))
    giga = {name: term["mac"] / 1e9 for name, term in found.data["phases"]["prefill"]["terms"].items()}
    assert giga["spiking projections"] == pytest.approx(1.239, rel=0.01)
    assert giga["head"] == pytest.approx(0.103, rel=0.01)
    assert giga["convolutions"] == pytest.approx(48 * 4352 * 4 / 1e9, rel=0.01)  # 0.0008
    assert "dense projections" not in giga
    for phase in found.data["phases"].values():
        assert phase["scan"]["mac_by_recurrence"] == pytest.approx(0.075e9, rel=0.01)
    decode = {name: term["mac"] / 1e9 for name, term in found.data["phases"]["decode"]["terms"].items()}
    assert decode["spiking projections"] == giga["spiking projections"]
    # one of the recurrence's three MAC is a product of matrices, the others are elementwise; the code computes two
    # outputs of the convolution and drops one
    assert decode["mixing of tokens"] == pytest.approx(0.075 / 3, rel=0.01)
    assert decode["convolutions"] == pytest.approx(2 * 48 * 4352 * 4 / 1e9, rel=1e-6)


# ---- forms that must agree


@pytest.mark.parametrize("name", ["mamba2", "llamba"])
def test_projections_are_those_of_the_measured_rates(name: str) -> None:
    """in * out * mean sum_t |s_t| over every projection, and what the deployed form gathers."""
    model = calibrated(name)
    found = report(model, IDS)
    sites = firing_statistics(model, ROWS)["sites"]
    products = {row["scope"]: row for row in rows_of(found, "prefill", role="projection")}
    assert set(sites) <= set(products)
    for scope, site in sites.items():
        assert products[scope]["sum_of_rates"]["mean"] == pytest.approx(site["sum_of_rates"], rel=1e-6)
        assert products[scope]["union_rate"]["mean"] == pytest.approx(site["union_rate"], rel=1e-6)
    for row in products.values():
        assert row["accumulations"] == pytest.approx(row["mac"] * row["sum_of_rates"]["mean"], rel=1e-9)
    deployed = deploy(copy.deepcopy(model), "ternary")
    with torch.no_grad(), OperationCounter(deployed) as counter:
        deployed(IDS, use_cache=False)
    gathered = sum(
        counter.numbers[site, "aten::_embedding_bag_forward_only", "accumulation"]
        for site, module in deployed.named_modules()
        if isinstance(module, TernaryLinear)
    )
    assert found.data["projections"]["accumulations"] * IDS.numel() == pytest.approx(gathered, rel=1e-9)


@pytest.mark.parametrize("form", ["ternary", "gather"])
def test_deployed_forms_count_alike(form: str) -> None:
    model = calibrated("llamba")
    one, other = report(model, IDS), report(deploy(copy.deepcopy(model), form), IDS)
    for phase in ("prefill", "decode"):
        mine, theirs = one.data["phases"][phase], other.data["phases"][phase]
        assert theirs["projections"] == pytest.approx(mine["projections"], rel=1e-9)
        assert theirs["energy"]["model"]["arithmetic_pj"] == pytest.approx(
            mine["energy"]["model"]["arithmetic_pj"], rel=1e-9
        )
        assert theirs["unknown"] == mine["unknown"] == {}


def test_packed_weights_are_read_as_they_are_stored_and_scaled_once() -> None:
    model = spikify(llamba(), Recipe.preset("mar", weights="ternary", per_row=True))
    trained, packed = report(model, IDS), report(deploy(copy.deepcopy(model), "packed"), IDS)
    for one, other in zip(rows_of(trained, "prefill"), rows_of(packed, "prefill"), strict=True):
        assert other["accumulations"] == one["accumulations"] and other["multiplications"] == one["multiplications"]
        if one["spiking"]:
            assert other["weight_bytes"] < one["weight_bytes"] / 4
            assert one["multiplications"] == 32 * 4 + 4 if one["scope"].endswith("in_proj") else one["multiplications"]
    names = {row["scope"] for row in trained.data["phases"]["prefill"]["elementwise"]}
    assert not any(name.endswith("_proj") for name in names), "dequantising depends on no input"


def test_backends_count_alike() -> None:
    found = []
    for backend in ("torch", "auto"):
        model = calibrated("llamba")
        for bank in model.modules():
            if isinstance(bank, ATMN):
                bank.backend = backend
        found.append(report(model, IDS).data["phases"]["decode"])
    assert found[0]["energy"]["model"]["parts_pj"] == pytest.approx(found[1]["energy"]["model"]["parts_pj"])
    assert found[0]["neurons"] == found[1]["neurons"]


def test_the_dense_student_is_the_model_without_neurons() -> None:
    model = calibrated("llamba")
    phases = report(model, IDS, teacher=llamba()).data["phases"]
    for name, phase in phases.items():
        for key in ("arithmetic_pj", "total_pj"):
            dense, teacher = phase["energy"]["dense_student"][key], phase["energy"]["teacher"][key]
            assert dense == pytest.approx(teacher, rel=1e-9), name
        assert phase["energy"]["model"]["arithmetic_pj"] < phase["energy"]["dense_student"]["arithmetic_pj"]


# ---- the report itself


def test_every_output_says_what_it_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is not installed")
    found = report(calibrated("llamba"), ROWS, teacher=llamba(), max_batches=2)
    assert found.data["phases"]["prefill"]["units"] == 24
    text = found.to_json(tmp_path / "report.json")
    assert json.loads(text) == found.to_dict() == Report.from_json(tmp_path / "report.json").data
    for output in (text, found.to_markdown()):
        assert "estimate, not measured on hardware" in output
    assert "more products have fewer MAC" in found.to_markdown(2)
    assert found.plot(tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SpikelmError, match=r"drawn to a file that ends in .png; got .*report.pdf"):
        found.plot(tmp_path / "report.pdf")
    assert not (tmp_path / "report.pdf").exists()
    for content in (b"{}", b"no json", b"\xff\xfe"):
        (tmp_path / "report.json").write_bytes(content)
        with pytest.raises(SpikelmError, match="report.json is no report of spikelm.energy"):
            Report.from_json(tmp_path / "report.json")
    with pytest.raises(SpikelmError, match=r"none.json cannot be read: No such file"):
        Report.from_json(tmp_path / "none.json")


def test_it_leaves_the_model_as_it_was() -> None:
    model = calibrated("llamba").train()
    model.backbone.layers[0].eval()
    modes = [module.training for module in model.modules()]
    report(model, IDS)
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    banks = [module for module in model.modules() if isinstance(module, ATMN)]
    assert banks and not any({"encode", "encode_sum"} & bank.__dict__.keys() for bank in banks)
    assert flow_of(IDS) is None and not IDS.__dict__


def test_a_report_leaves_no_mark_on_what_the_model_keeps() -> None:
    """A buffer that the input was written to is a buffer again for the next report."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.kept = nn.Linear(8, 4, bias=False), None
            self.register_buffer("before", torch.zeros(3, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            prepared = self.linear(self.before)  # depends on no input at the first call
            self.before.copy_(x)
            self.kept = 2 * x
            return prepared + self.linear(self.before)

    model, x = Keeping(), torch.rand(3, 8)
    found = [report(model, batch).data["phases"] for batch in (x, x, [x, x])]
    assert found[0] == found[1] and found[0]["forward"]["products"][0]["mac"] == 32
    assert found[2]["forward"]["products"] == found[0]["forward"]["products"]
    assert flow_of(model.before) is None and flow_of(model.kept) is None
    assert not model.before.__dict__, "an attribute of a buffer would be saved with it"


def test_costs_are_horowitz() -> None:
    table = COSTS["45nm-fp32"]
    assert (table.mac, table.multiplication, table.accumulation) == (4.6, 3.7, 0.9)
    assert (COSTS["45nm-fp16"].mac, COSTS["45nm-fp16"].accumulation) == (1.5, 0.4)
    assert (COSTS["45nm-int8"].mac, COSTS["45nm-int8"].accumulation) == (0.23, 0.03)
    assert table.on_chip == (10.0, 20.0, 100.0) and table.dram == (1300.0, 2600.0)
    for table in COSTS.values():
        assert table.product + table.accumulation == pytest.approx(table.mac)
    assert CostTable("own", 2.0, None, 1.0, "none").product == 2.0


def test_what_it_refuses() -> None:
    with pytest.raises(SpikelmError, match="report takes a batch .* got int"):
        report(llamba(), 3)
    with pytest.raises(SpikelmError, match="one batch at least; got none"):
        report(llamba(), [])
    with pytest.raises(SpikelmError, match="a batch is a tensor or a mapping of tensors; got int"):
        report(llamba(), [3])
    with pytest.raises(SpikelmError, match="a batch holds a tensor at least; got labels"):
        report(llamba(), {"labels": IDS})
    with pytest.raises(SpikelmError, match="report takes an nn.Module; got str"):
        report("model", IDS)
    with pytest.raises(SpikelmError, match="costs must be a CostTable or one of 45nm-fp32, .*; got '7nm'"):
        report(llamba(), IDS, "7nm")
    for number in (-1, 0, 1.5, True):
        for name in ("max_batches", "time_steps"):
            with pytest.raises(SpikelmError, match=f"{name} must be a whole number, 1 or more; got {number}"):
                report(llamba(), IDS, **{name: number})


def test_empty_and_ragged_batches_are_refused() -> None:
    with pytest.raises(SpikelmError, match=r"one sample or token at least; got a tensor \[0, 8\]"):
        report(nn.Linear(8, 4), torch.zeros(0, 8))
    with pytest.raises(SpikelmError, match=r"one sample or token at least; got input_ids \[1, 0\]"):
        report(llamba(), torch.zeros(1, 0, dtype=torch.long))
    for rows in ([[1, 2], [3]], ["text"]):
        with pytest.raises(SpikelmError, match="one row of numbers, .* input_ids is not"):
            report(llamba(), {"input_ids": rows})
