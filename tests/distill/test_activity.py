"""The activity term against frames that are counted one by one, and what it does in training."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

import spikelm
from spikelm.convert import spike_sites
from spikelm.distill import Activity, InternalKD, LogitDistillation
from spikelm.distill.activity import weights_behind
from spikelm.distill.objectives import Objective
from spikelm.distill.sharing import part_of_batch
from spikelm.distill.trainer import train
from spikelm.errors import SpikelmError
from spikelm.evaluate import firing_statistics
from spikelm.models.llamba import LlambaForCausalLM
from spikelm.neurons import ATMN, TILIF


@pytest.fixture
def dense(tiny_llama: LlamaForCausalLM) -> LlambaForCausalLM:
    return LlambaForCausalLM.from_llama(tiny_llama).requires_grad_(False).eval()


def spiking(dense: LlambaForCausalLM, recipe: str = "mar", **arguments: Any) -> LlambaForCausalLM:
    """Calibrated on random tokens."""
    student = copy.deepcopy(dense).requires_grad_(True).train()
    spikelm.spikify(student, spikelm.Recipe.preset(recipe, **arguments))
    spikelm.calibrate(student, [{"input_ids": ids_of(8, 16)}])
    return student


def ids_of(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(0))


def gradients(student: LlambaForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    student.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in student.named_parameters() if value.grad is not None}


def weighted_rate(student: LlambaForCausalLM, ids: Tensor, rate: str, banks: str = "") -> float:
    """By firing_statistics, which counts frames."""
    sites = firing_statistics(student, [{"input_ids": row} for row in ids.tolist()])["sites"]
    weights = {name: count for name, count in weights_behind(student).items() if name.endswith(banks)}
    return sum(weights[name] * sites[name][rate] for name in weights) / sum(weights.values())


# ---- the neurons


@given(
    tau=st.sampled_from([0.3, 0.5, 0.7, 1.0, 1.5, 4.0]),
    T=st.integers(1, 6),
    fire=st.sampled_from(["ternary", "binary"]),
    seed=st.integers(0, 99),
)
def test_fires_where_any_frame_of_atmn_does(tau: float, T: int, fire: str, seed: int) -> None:
    neuron = type("Neuron", (ATMN,), {"fire": fire})(tau=tau, T=T, num_channels=5)
    generator = torch.Generator().manual_seed(seed)
    neuron.v_threshold = torch.rand(5, generator=generator, dtype=torch.float64).add(0.2)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    frames = neuron.encode(x)
    assert torch.equal(neuron.fires(x), (frames != 0).any(0).double())
    assert torch.equal(neuron.spike_count(x), frames.abs().sum(0))


def test_an_atmn_fires_at_the_very_bound() -> None:
    neuron = ATMN(tau=0.5, T=4)
    x = torch.tensor([0.0, 0.12499, 0.125, -0.125, -0.12499, 9.0, math.nan])
    assert neuron.fires(x)[:-1].tolist() == [0, 0, 1, 1, 0, 1]
    assert (neuron.encode(x) != 0).any(0).tolist() == [False, False, True, True, False, True, False]


@given(D=st.integers(1, 6), V=st.floats(0.1, 3.0), seed=st.integers(0, 99))
def test_fires_where_tilif_does(D: int, V: float, seed: int) -> None:
    neuron = TILIF(D=D, v_threshold=V)
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    spikes = neuron.encode_sum(x)
    assert torch.equal(neuron.fires(x), (spikes != 0).float())
    assert torch.equal(neuron.spike_count(x), spikes.abs())


@pytest.mark.parametrize("neuron", [ATMN(tau=0.5, T=3), TILIF(D=3, learn_threshold=True)])
def test_silent_elements_and_thresholds_have_a_gradient(neuron: ATMN | TILIF) -> None:
    x = torch.tensor([-0.8, -0.2, 0.1, 0.2, 0.6], requires_grad=True)
    neuron.fires(x).sum().backward()
    assert x.grad is not None and neuron.a is not None and neuron.a.grad is not None
    assert bool((x.grad * x.sign() > 0).all())  # a larger magnitude fires sooner
    assert neuron.a.grad < 0  # and a higher threshold later


# ---- the objective


@pytest.mark.parametrize(("measure", "rate"), [("union", "union_rate"), ("sum", "sum_of_rates")])
@pytest.mark.parametrize(
    ("recipe", "arguments"),
    [("mar", {"tau": 0.5, "frame_weight": 0.5}), ("mar", {}), ("spikingmamba", {"learn_threshold": True})],
)
def test_the_loss_is_the_other_objective_and_the_excess_over_the_target(
    dense: LlambaForCausalLM, recipe: str, arguments: dict[str, Any], measure: Any, rate: str
) -> None:
    student, ids = spiking(dense, recipe, **arguments), ids_of()
    measured = weighted_rate(student, ids, rate)
    plain = LogitDistillation()(student, dense, {"input_ids": ids})["loss"]
    terms = Activity(LogitDistillation(), 0.6 * measured, 3.0, measure)(student, dense, {"input_ids": ids})
    assert next(iter(terms)) == "loss"
    assert terms["rate"].item() == pytest.approx(measured, rel=1e-5)
    assert terms["activity"].item() == pytest.approx(0.4 * measured, rel=1e-5)
    assert terms["objective"].item() == plain.item()
    assert terms["loss"].item() == pytest.approx(plain.item() + 3 * 0.4 * measured, rel=1e-5)


def test_below_the_target_nothing_pulls(dense: LlambaForCausalLM) -> None:
    student, batch = spiking(dense), {"input_ids": ids_of()}
    plain = LogitDistillation()(student, dense, batch)["loss"]
    held = Activity(LogitDistillation(), 1.0, 50.0)(student, dense, batch)["loss"]
    expected, found = gradients(student, plain), gradients(student, held)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_target_for_each_site(dense: LlambaForCausalLM) -> None:
    student, ids = spiking(dense, tau=0.5, frame_weight=0.5), ids_of()
    ffn_in, ffn_out = (weighted_rate(student, ids, "union_rate", name) for name in ("gate_proj", "down_proj"))
    weights = weights_behind(student)
    behind = [sum(n for name, n in weights.items() if name.endswith(part)) for part in ("gate_proj", "down_proj")]
    assert behind[0] == 2 * behind[1]  # gate_proj and up_proj read one bank
    objective = Activity(LogitDistillation(), {"ffn_in": 0.5 * ffn_in, "ffn_out": 0.25 * ffn_out})
    terms = objective(student, dense, {"input_ids": ids})
    assert terms["rate"].item() == pytest.approx((2 * ffn_in + ffn_out) / 3, rel=1e-5)
    assert terms["activity"].item() == pytest.approx((2 * 0.5 * ffn_in + 0.75 * ffn_out) / 3, rel=1e-5)


def test_sites_without_a_target_are_free(dense: LlambaForCausalLM) -> None:
    student = spiking(dense)
    terms = Activity(LogitDistillation(), {"mixer_in": 0.1})(student, dense, {"input_ids": ids_of()})
    found = gradients(student, terms["activity"])
    pulled = {name for name, value in found.items() if name.endswith("neuron.a") and bool((value != 0).any())}
    last = {f"{name}.neuron.a" for name in spike_sites(student) if "layers.1" in name}  # what follows the last hinge
    assert {name for name in last if "in_proj" in name} == pulled & last


@pytest.mark.parametrize("measure", ["union", "sum"])
def test_padding_is_not_counted(dense: LlambaForCausalLM, measure: Any) -> None:
    student, ids = spiking(dense), ids_of(2, 12)
    objective = Activity(LogitDistillation(), 0.01, 1.0, measure)
    whole = objective(student, dense, {"input_ids": ids[:, :7], "attention_mask": torch.ones(2, 7, dtype=torch.long)})
    mask = (torch.arange(12) < 7).long().expand(2, 12)
    padded = objective(student, dense, {"input_ids": ids, "attention_mask": mask})
    assert padded["rate"].item() == pytest.approx(whole["rate"].item(), rel=1e-6)
    everything = objective(student, dense, {"input_ids": ids})
    assert abs(everything["rate"].item() - whole["rate"].item()) > 1e-3


def test_parts_of_an_update_add_up(dense: LlambaForCausalLM) -> None:
    """To the mean of the parts' rates, each by what the wrapped objective counts in it."""
    student, ids = spiking(dense), ids_of(4)
    objective = Activity(LogitDistillation(), 0.01)
    parts = [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}]
    whole = objective(student, dense, {"input_ids": ids})
    for term in ("rate", "activity", "loss"):
        found = sum(objective(student, dense, part, num_items=4 * 8)[term].item() for part in parts)
        assert found == pytest.approx(whole[term].item(), rel=1e-5)


@pytest.mark.parametrize("above", [True, False])
def test_processes_have_the_hinge_of_the_whole_batch(
    dense: LlambaForCausalLM, monkeypatch: pytest.MonkeyPatch, above: bool
) -> None:
    student, ids = spiking(dense), ids_of(4)
    mask = (torch.arange(9) < torch.tensor([[9], [5], [8], [2]])).long()
    counted = torch.where(torch.arange(9) < 7, ids, -100)  # fewer than there are tokens
    batch = {"input_ids": ids, "attention_mask": mask, "labels": counted.where(mask == 1, -100)}
    rows = [slice(0, 1), slice(1, 4), slice(0, 1)]  # the last one is a filler
    parts = [{name: value[row] for name, value in batch.items()} for row in rows]
    rates = [Activity(LogitDistillation(), 1.0)(student, dense, part)["rate"].item() for part in (*parts[:2], batch)]
    target = (rates[2] + (min(rates[:2]) if above else max(rates[:2]))) / 2
    assert min(rates) < target < max(rates)  # by itself one process would be above it, and one below
    objective, items = Activity(LogitDistillation(), target, weight=7.0), 50
    whole = objective(student, dense, batch, items)
    assert (whole["activity"].item() > 0) == above
    expected = gradients(student, whole["loss"])

    sums: list[Tensor] = []
    # Each part asks once, so that what all three give is known when they are asked again.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: sums.append(total.clone()))
    for part, filler in zip(parts, (False, False, True), strict=True):
        with part_of_batch(filler):
            objective(student, dense, part, items)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.copy_(torch.stack(sums).sum(0)))
    found: dict[str, Tensor] = {}
    terms: list[dict[str, Tensor]] = []
    for part in parts[:2]:
        with part_of_batch(filler=False):
            terms.append(objective(student, dense, part, items))
        for name, value in gradients(student, terms[-1]["loss"]).items():
            found[name] = found[name] + value if name in found else value
    for name in ("loss", "activity", "rate"):
        assert sum(term[name].item() for term in terms) == pytest.approx(whole[name].item(), rel=1e-5, abs=1e-6)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_what_the_other_objective_has_is_passed_on() -> None:
    batch = {"input_ids": ids_of()}
    kept = Activity(InternalKD(), 0.5)
    assert kept.items == "sentences" and kept.count_items(batch).item() == 3
    assert kept.build_projections.__func__ is InternalKD.build_projections
    assert not any(hasattr(Activity(LogitDistillation(), 0.5), name) for name in ("items", "build_projections"))
    assert copy.deepcopy(kept) == kept


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(dense: LlambaForCausalLM, reentrant: bool) -> None:
    student, batch = spiking(dense), {"input_ids": ids_of()}
    objective = Activity(LogitDistillation(), 0.01)
    expected = gradients(student, objective(student, dense, batch)["loss"])
    student.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        with pytest.raises(SpikelmError, match="use_reentrant"):
            objective(student, dense, batch)
        assert not any(owner._forward_pre_hooks for owner in spike_sites(student).values())
        return
    found = gradients(student, objective(student, dense, batch)["loss"])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_training_meets_the_target(dense: LlambaForCausalLM, tmp_path: Path) -> None:
    rows = [{"input_ids": row} for row in torch.randint(0, 64, (64, 16)).tolist()]
    rates = {}
    for target in (1.0, 0.3):
        student = spiking(dense, tau=0.5, frame_weight=0.5)
        objective: Objective = Activity(LogitDistillation(), target, weight=5.0)
        record = train(student, dense, rows, objective, output_dir=tmp_path / str(target), steps=60, batch_size=8,
                       learning_rate=1e-2, threshold_learning_rate=5e-2)  # fmt: skip
        assert {"objective", "activity", "rate"} <= set(record)
        rates[target] = weighted_rate(student, torch.tensor([row["input_ids"] for row in rows]), "union_rate")
    assert rates[1.0] > 0.4 and 0.15 < rates[0.3] < 0.33


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0.0}, "target must be a rate > 0 and <= 1"),
        ({"target": 1.2}, "target must be a rate > 0 and <= 1"),
        ({"target": math.nan}, "target must be a rate"),
        ({"target": {}}, "target must be a rate"),
        ({"target": {"ffn_in": -0.5}}, "target must be a rate > 0 and <= 1, or such a rate per site"),
        ({"target": math.inf, "measure": "sum"}, "target must be a rate > 0, or"),
        ({"target": 0.5, "weight": -1.0}, "weight must be finite and >= 0; got -1.0"),
        ({"target": 0.5, "measure": "mean"}, "measure must be one of union, sum; got 'mean'"),
    ],
)
def test_bad_values_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        Activity(LogitDistillation(), **arguments)


def test_students_that_do_not_fit_are_refused(dense: LlambaForCausalLM) -> None:
    batch = {"input_ids": ids_of()}
    with pytest.raises(SpikelmError, match="has no neurons: spikify"):
        Activity(LogitDistillation(), 0.5)(dense, dense, batch)
    with pytest.raises(SpikelmError, match="names the site 'attention_in'; .* mixer_in, mixer_out, ffn_in, ffn_out"):
        Activity(LogitDistillation(), {"attention_in": 0.5})(spiking(dense), dense, batch)
