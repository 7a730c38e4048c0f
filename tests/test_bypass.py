"""A fused kernel of transformers must not go around the neurons."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.mamba2 import modeling_mamba2

from spikelm import calibrate, spikify
from spikelm.errors import SpikelmError
from tests.small_models import llamba, mamba2

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def spiking() -> nn.Module:
    model = spikify(mamba2(), "spikingmamba")
    calibrate(model, [{"input_ids": IDS}])
    return model


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The kernel of mamba_ssm, as far as it matters here: it computes out_proj itself. Its calls."""
    calls: list[torch.Tensor] = []

    def kernel(zxbcdt: torch.Tensor, *arguments: Any, outproj_weight: torch.Tensor, **keywords: Any) -> torch.Tensor:
        calls.append(zxbcdt)
        return zxbcdt[..., : outproj_weight.shape[1]] @ outproj_weight.t()

    monkeypatch.setattr(modeling_mamba2, "mamba2_split_conv1d_scan_combined", kernel)
    return calls


def test_a_spiking_model_in_training_never_takes_the_fused_path(fused: list[torch.Tensor]) -> None:
    mamba2().train()(IDS)
    assert len(fused) == 2, "the dense model does"
    fused.clear()
    model = spiking()
    with torch.no_grad():
        expected = model(IDS).logits
    model.train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert not fused
    assert all(module.training for module in model.modules()), "the flags are as they were"
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected), "and training computes what inference does"


def test_checkpointing_and_copies_keep_the_watch(fused: list[torch.Tensor]) -> None:
    model = copy.deepcopy(spiking()).train()
    plain = model(IDS, labels=IDS).loss
    plain.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model(IDS, labels=IDS).loss.backward()
    assert not fused
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
    assert all(module.training for module in model.modules())


def test_a_mixer_that_leaves_a_projection_out_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = spiking()
    monkeypatch.setattr(
        modeling_mamba2.Mamba2Mixer, "forward", lambda self, hidden_states, **keywords: self.in_proj(hidden_states)
    )
    with pytest.raises(SpikelmError, match=r"Mamba2Mixer computed its output without calling out_proj: a fused kernel"):
        model.backbone.layers[0].mixer(torch.randn(1, 3, 32))


def test_an_error_within_the_mixer_is_the_one_that_is_seen() -> None:
    model = spiking().train()
    mixer = model.backbone.layers[0].mixer
    with pytest.raises(SpikelmError, match="TILIF has 32 channels on the last axis"):
        mixer(torch.randn(1, 3, 31))
    assert mixer.training


def test_an_interrupt_within_the_mixer_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = spiking().train()
    mixer = model.backbone.layers[0].mixer

    def interrupt(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(modeling_mamba2, "mamba2_chunk_scan", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(IDS)
    model(IDS)
    assert mixer.training
    model.eval()(IDS)
    assert not mixer.training


@pytest.mark.parametrize("make", [llamba, mamba2])
def test_other_mixers_are_left_alone(make: Callable[[], nn.Module]) -> None:
    model = spikify(make(), "spikingmamba")
    watched = [module for module in model.modules() if module._forward_hooks]
    assert len(watched) == (2 if make is mamba2 else 0)
