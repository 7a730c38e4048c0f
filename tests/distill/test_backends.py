"""A student trains to the same losses on the kernels as on the reference."""

import copy
from typing import TYPE_CHECKING

import pytest
import torch

import spikelm
from spikelm.cpu import module as cpu_module
from spikelm.distill.objectives import SBDS
from spikelm.models.llamba import LlambaForCausalLM

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@pytest.mark.skipif(cpu_module.unavailable() is not None, reason=str(cpu_module.unavailable()))
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_the_same_losses_on_every_backend(tiny_llama: "LlamaForCausalLM", tau: float) -> None:
    """In float64, where rounding does not flip spikes within a few steps; in float32 it does, on any two backends."""
    dense = LlambaForCausalLM.from_llama(tiny_llama).double().requires_grad_(False).eval()
    ids = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0))
    losses = {}
    for backend in ("torch", "cpu"):
        student = copy.deepcopy(dense).requires_grad_(True).train()
        spikelm.spikify(student, spikelm.Recipe.preset("mar", tau=tau, frame_weight=tau))
        optimiser = torch.optim.AdamW(student.parameters(), lr=1e-3)
        losses[backend] = []
        with spikelm.use_backend(backend):
            for _ in range(8):
                terms = SBDS(1.0, 1.0, 0.1)(student, dense, {"input_ids": ids})
                optimiser.zero_grad()
                terms["loss"].backward()
                optimiser.step()
                losses[backend].append(terms["loss"].item())
    assert len(set(losses["torch"])) == 8  # it does train
    assert losses["cpu"] == pytest.approx(losses["torch"], rel=1e-9)
