"""No fused path of a model may go around its neurons.

A Mamba-2 mixer of transformers in training mode hands the weight of ``out_proj`` to one fused kernel, where mamba_ssm
is installed, and never calls the projection. Such a mixer is kept from that path; any other state-space mixer that
leaves a spiking projection out is an error.
"""

from __future__ import annotations

from threading import Lock, get_ident
from typing import Any

import torch
from torch import nn

from spikelm.errors import SpikelmError
from spikelm.layers.spiking_linear import SpikingLinear

_LOCK = Lock()


def forbid_bypass(model: nn.Module) -> None:
    """Watches every state-space mixer with spiking projections in ``model``."""
    for mixer in model.modules():
        if _spiking_children(mixer) and hasattr(mixer, "A_log"):  # as every Mamba mixer of transformers has
            mixer.register_forward_pre_hook(_before)
            mixer.register_forward_hook(_after, always_call=True)


def _before(mixer: nn.Module, inputs: tuple[Any, ...]) -> None:
    mixer.training = False  # the mixer's own flag alone, on which nothing but the fused path depends
    if torch.compiler.is_compiling():
        return
    inside: set[int] = mixer.__dict__.setdefault("_threads_inside", set())
    with _LOCK:
        inside.discard(get_ident())  # left by an interrupt
        if not inside:  # another thread's projections have run, and count for that thread's check
            for layer in _spiking_children(mixer).values():
                layer.__dict__["_ran"] = False
        inside.add(get_ident())


def _after(mixer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    # Its projections know the mode still, also after an interrupt that no hook is called for.
    mixer.training = next(iter(_spiking_children(mixer).values())).training
    if torch.compiler.is_compiling():
        return
    with _LOCK:
        mixer.__dict__.get("_threads_inside", set()).discard(get_ident())
    if output is None:  # the forward has failed with an error of its own
        return
    skipped = [name for name, layer in _spiking_children(mixer).items() if not layer.__dict__["_ran"]]
    if skipped:
        raise SpikelmError(
            f"{type(mixer).__name__} computed its output without calling {', '.join(skipped)}: a fused kernel has gone "
            "around the neurons. Load the model without that kernel"
        )


def _spiking_children(module: nn.Module) -> dict[str, SpikingLinear]:
    return {name: child for name, child in module.named_children() if isinstance(child, SpikingLinear)}
