"""Runs the CUDA kernel of spiking attention: a warp for every query of a head."""

from __future__ import annotations

import math

import torch

from spikelm.cpu.attention import definitions, dense_rows, pack
from spikelm.cpu.module import storage
from spikelm.cuda import module
from spikelm.cuda.module import Launch
from spikelm.ops.kernel import Kernel

SOURCE = "attention.cuh"
_BLOCK = 128  # threads, what attention.cuh bounds its registers by
_WARP = 32


def attend(
    kernel: Kernel,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_keys: int,
    threshold: float,
    out: torch.Tensor,
    fired: torch.Tensor,
) -> None:
    """Fills ``out`` and ``fired``, see :func:`spikelm.ops.spiking_attention.spiking_attention`; no waiting."""
    queries, keys, values = dense_rows(queries), dense_rows(keys), dense_rows(values)
    T, B, H, _, L = queries.shape
    text = definitions(kernel.definitions, T, values.shape[-1]) + storage(torch.float32, out.dtype)
    arguments = pack(kernel, queries, keys, values, num_keys, threshold, out, fired, 0)
    launches = [Launch("attend", math.ceil(B * H * L / (_BLOCK // _WARP)), _BLOCK)]
    module.launch(text, launches, arguments, queries.device, SOURCE)
