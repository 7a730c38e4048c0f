"""Runs the CPU kernels on tensors."""

from __future__ import annotations

import torch

from spikelm.cpu import module
from spikelm.errors import SpikelmError
from spikelm.ops.kernel import Kernel
from spikelm.ops.launch import Launcher
from spikelm.ops.layout import Read, pack

_WORTH_THREADS = 1 << 15  # element-steps


def run(
    name: str,
    kernel: Kernel,
    spike_dtype: torch.dtype,
    tensors: tuple[torch.Tensor | None, ...],
    T: int,
    what: Read,
    channels: tuple[int, int],
    options: tuple[bool, float, float, float],
) -> None:
    """Builds the specialisation if need be and computes, with as many threads as torch has."""
    threads = torch.get_num_threads() if T * what.places.frame >= _WORTH_THREADS else 1
    packed = pack(kernel, (*tensors, None), T, what, channels, *options, threads)
    if module.functions(kernel.definitions, what.x.dtype, spike_dtype)[name](packed):
        raise SpikelmError(f"backend 'cpu': no memory for {name} over {T} steps of {tuple(what.x.shape)}")


_launcher = Launcher(run)
forward, forward_sum = _launcher.forward, _launcher.forward_sum
backward, backward_sum = _launcher.backward, _launcher.backward_sum
