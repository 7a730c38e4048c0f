"""calibrate: thresholds of least coding error, folded once."""

import copy

import pytest
import torch
from torch import nn

from spikelm import Recipe, calibrate, spikify
from spikelm.calibrate import CANDIDATES, best_threshold, dense
from spikelm.convert import recipe_of, spike_sites
from spikelm.errors import SpikelmError
from spikelm.layers import BitLinear
from spikelm.neurons import ATMN, TILIF
from tests.small_models import llamba


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 64, (4, 16), generator=generator)} for _ in range(count)]


@pytest.mark.parametrize(("tau", "frame_weight"), [(1.0, 1.0), (0.5, 0.5), (2.0, 1.0)])
@pytest.mark.parametrize("T", [1, 4])
def test_best_threshold_against_brute_force(tau: float, frame_weight: float, T: int) -> None:
    scales = torch.tensor([0.1, 1.0, 7.0])
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(T)) * scales
    chosen = best_threshold(ATMN(tau=tau, frame_weight=frame_weight, T=T, num_channels=3), x)
    for channel in range(3):
        column, errors = x[:, channel], []
        for candidate in CANDIDATES:
            V = candidate * column.square().mean().sqrt()
            neuron = ATMN(tau=tau, frame_weight=frame_weight, T=T, v_threshold=V.item())
            code = sum(frame_weight**t * frame for t, frame in enumerate(neuron.encode(column)))
            errors.append((column - V * code).square().mean().item())
        V = chosen[channel].item()
        code = ATMN(tau=tau, frame_weight=frame_weight, T=T, v_threshold=V).encode_sum(column)
        assert (column - V * code).square().mean().item() == pytest.approx(min(errors), rel=1e-3)
    torch.testing.assert_close(chosen / scales, (chosen / scales).mean().expand(3), rtol=0.5, atol=0)


def test_best_threshold_of_dead_channels_is_positive() -> None:
    x = torch.randn(50, 3)
    x[:, 1] = 0
    x[:, 2] = 2.5  # constant
    for data in (x, torch.zeros(50, 3)):
        V = best_threshold(ATMN(num_channels=3), data)
        assert bool((V > 0).all() and V.isfinite().all())
    neuron = ATMN(num_channels=3)
    neuron.v_threshold = V = best_threshold(neuron, x)
    assert (V * neuron.encode_sum(x))[0, 2].item() == pytest.approx(2.5, rel=0.1)


def test_thresholds_can_be_held_to_a_rate() -> None:
    """Of Gaussian channels the finest code spikes 1.5 times a token; the limit takes the finest that it allows."""
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1.0, 7.0])
    chosen = {}
    for limit in (None, 0.9, 0.5):
        neuron = TILIF(D=4, num_channels=3)
        chosen[limit] = neuron.v_threshold = best_threshold(neuron, x, limit)
        rate = neuron.encode(x).abs().sum(0).mean(0)
        if limit is None:
            assert bool((rate > 1.3).all())
            continue
        assert bool((rate <= limit).all())
        larger = [V for V in CANDIDATES.tolist() if V * x.square().mean(0).sqrt()[0] < 0.999 * chosen[limit][0]]
        neuron.v_threshold = larger[-1] * x.square().mean(0).sqrt()
        assert bool((neuron.encode(x).abs().sum(0).mean(0) > limit).any()), "the next finer one spikes more"
    assert bool((chosen[0.5] > chosen[0.9]).all() and (chosen[0.9] > chosen[None]).all())


def test_a_limit_that_only_silence_meets_and_one_that_is_refused() -> None:
    x = torch.full((100, 1), 3.0)
    neuron = TILIF(D=4, num_channels=1)
    neuron.v_threshold = V = best_threshold(neuron, x, 1e-6)
    assert V.item() > 6 and not neuron.encode_sum(x).any()
    spiky = torch.zeros(10_000, 1).index_fill(0, torch.tensor([0]), 100.0)  # a spike whatever the candidate
    V = best_threshold(neuron, spiky, 1e-6)
    assert V.item() == pytest.approx(CANDIDATES[-1].item(), rel=1e-5), "then the largest"
    model = spikify(llamba(), "spikingmamba")
    for limit in (0, -1.0, float("nan")):
        with pytest.raises(SpikelmError, match="max_sum_of_rates must be > 0 or None"):
            calibrate(model, batches(), max_sum_of_rates=limit)
    calibrate(model, batches(), max_sum_of_rates=0.6)


@pytest.mark.filterwarnings("ignore:no kernel for sgc='blend'")
def test_a_training_only_path_has_no_part_in_it() -> None:
    thresholds = []
    for sgc in ("blend", None):
        model = spikify(llamba().train(), Recipe.preset("spikingmamba", sgc=sgc))
        calibrate(model, batches())
        thresholds.append([owner.neuron.v_threshold for owner in spike_sites(model).values()])
        assert all(module.training for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(*thresholds, strict=True))


def coding_error(model: nn.Module) -> dict[str, float]:
    """Mean squared error of the code relative to the input's power, per site, at the inputs of the dense model."""
    errors: dict[str, float] = {}

    def hook(name: str, neuron: ATMN) -> object:
        def record(module: nn.Module, arguments: tuple[torch.Tensor]) -> None:
            x = arguments[0]
            error = x - neuron.v_threshold * neuron.encode_sum(x)
            errors[name] = (error.square().mean() / x.square().mean()).item()

        return record

    sites = spike_sites(model)
    handles = [owner.register_forward_pre_hook(hook(name, owner.neuron)) for name, owner in sites.items()]
    with dense(model), torch.no_grad():
        model(**batches(1)[0])
    for handle in handles:
        handle.remove()
    return errors


def test_it_lowers_the_coding_error_at_every_site() -> None:
    model = spikify(llamba(), "mar")
    before = coding_error(model)
    calibrated = copy.deepcopy(model)
    calibrate(calibrated, batches())
    # measured on the unfolded model, whose dense inputs are the original's
    for name, owner in spike_sites(model).items():
        owner.neuron.v_threshold = spike_sites(calibrated)[name].neuron.v_threshold
    after = coding_error(model)
    assert all(after[name] < before[name] for name in before)
    assert max(after.values()) < 0.2


def test_weights_are_folded_by_the_chosen_thresholds() -> None:
    original = llamba()
    model = spikify(copy.deepcopy(original), "mar")
    calibrate(model, batches())
    for name, owner in spike_sites(model).items():
        weight = original.get_submodule(name).weight
        torch.testing.assert_close(owner.weight, weight * owner.neuron.v_threshold, rtol=1e-5, atol=0)
    up, V = original.backbone.layers[0].mlp.up_proj.weight, model.backbone.layers[0].mlp.gate_proj.neuron.v_threshold
    torch.testing.assert_close(model.backbone.layers[0].mlp.up_proj.weight, up * V, rtol=1e-5, atol=0)
    assert recipe_of(model).calibrated


def test_the_calibrated_model_is_nearer_to_the_dense_one() -> None:
    original, ids = llamba(), batches(1)[0]["input_ids"]
    exact = original(ids).logits
    plain = spikify(copy.deepcopy(original), Recipe.preset("mar", T=8))
    calibrated = copy.deepcopy(plain)
    calibrate(calibrated, batches())
    distances = [(model(ids).logits - exact).norm().item() for model in (calibrated, plain)]
    assert distances[0] < 0.75 * distances[1]


def test_padding_is_left_out() -> None:
    data = batches(1)[0]["input_ids"]
    padded = torch.cat([torch.full((4, 5), 1), data], 1)
    mask = (torch.arange(21) >= 5).long().expand(4, 21)
    results = []
    for batch in ({"input_ids": data}, {"input_ids": padded, "attention_mask": mask}):
        model = spikify(llamba(), "mar")
        calibrate(model, [batch])
        results.append({name: owner.neuron.a.detach() for name, owner in spike_sites(model).items()})
    for name, a in results[0].items():
        torch.testing.assert_close(results[1][name], a, rtol=1e-4, atol=1e-4)


def test_only_the_first_tokens_are_read() -> None:
    def endless() -> object:
        yield from batches(2)
        raise AssertionError("read on after enough tokens")

    model = spikify(llamba(), "mar").train()
    calibrate(model, endless(), tokens_per_site=100)
    assert model.training
    assert all(layer.spiking for layer in spike_sites(model).values())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_it_refuses() -> None:
    with pytest.raises(SpikelmError, match="not spiking: call spikify first"):
        calibrate(llamba(), batches())
    model = spikify(llamba(), "mar")
    with pytest.raises(SpikelmError, match="at least one token; batches held none"):
        calibrate(model, [])
    calibrate(model, batches())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SpikelmError, match="calibrated or deployed already"):
        calibrate(model, batches())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_failing_batch_leaves_the_model_as_it_was() -> None:
    model = spikify(llamba(), "mar")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(IndexError):
        calibrate(model, [*batches(1), {"input_ids": torch.tensor([[1000]])}])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(layer.spiking for layer in spike_sites(model).values())
    calibrate(model, batches())


@pytest.mark.parametrize("weights", ["binary", "ternary"])
def test_quantised_weights_are_calibrated_as_they_are(weights: str) -> None:
    """The thresholds are those of the dense model with the quantised matrices; V is folded into the masters."""
    recipe = Recipe.preset("mar", weights=weights)
    model, reference, masters = spikify(llamba(), recipe), llamba(), llamba()
    for name, layer in model.named_modules():
        if isinstance(layer, BitLinear):
            reference.get_submodule(name).weight.data.copy_(layer.effective_weight())
    calibrate(model, batches())
    calibrate(spikify(reference, "mar"), batches())
    assert recipe_of(model).calibrated and recipe_of(model).weights == weights
    for name, owner in spike_sites(model).items():
        V = owner.neuron.v_threshold
        assert torch.equal(V, spike_sites(reference)[name].neuron.v_threshold)
        torch.testing.assert_close(owner.weight, masters.get_submodule(name).weight * V)  # V is stored as its logarithm
