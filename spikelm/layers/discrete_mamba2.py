"""The token mixer of Llamba: Mamba-2 with heads for values and for queries/keys, and an undiscretised input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from spikelm.errors import SpikelmError
from spikelm.ops.ssd import decay_matrix, ssd_chunked, ssd_step

try:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
except ImportError:
    mamba_chunk_scan_combined = None


class DiscreteMamba2(nn.Module):
    """Discrete multi-head Mamba-2 (Llamba, cartesia-ai/edge; parameter names and layout are the published ones).

    [xBC | z | A_log] = in_proj(u);  x, B, C = conv(xBC);  S_i = exp(-softplus(A_log_i)) S_{i-1} + B_i x_i^T;
    y_i = C_i^T S_i + D x_i;  out = out_proj(y * silu(z + z_bias)).

    Args:
        d_model: input and output channels.
        d_state: channels of B and C per head.
        n_qk_heads, n_v_heads: heads of B, C and of x; the first divides the second.
        d_conv: taps of the causal depthwise convolution over xBC.
        expand: inner channels = expand * d_model, divisible by n_v_heads.
        chunk_size: tokens per chunk of the scan.
        activation: after the convolution, "identity" or "silu".
        bias, conv_bias: as in the published configuration.
        layer_idx: which layer of a cache this is.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        n_qk_heads: int = 32,
        n_v_heads: int = 32,
        d_conv: int = 4,
        expand: int = 1,
        chunk_size: int = 128,
        activation: str = "identity",
        bias: bool = False,
        conv_bias: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.d_inner = expand * d_model
        if self.d_inner % n_v_heads or n_v_heads % n_qk_heads:
            raise SpikelmError(
                f"n_v_heads must divide expand * d_model and n_qk_heads must divide n_v_heads; got d_model={d_model}, "
                f"expand={expand}, n_v_heads={n_v_heads}, n_qk_heads={n_qk_heads}"
            )
        if activation not in ("identity", "silu"):
            raise SpikelmError(f"activation must be 'identity' or 'silu'; got {activation!r}")
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.n_qk_heads, self.n_v_heads, self.head_dim = n_qk_heads, n_v_heads, self.d_inner // n_v_heads
        self.chunk_size, self.activation, self.layer_idx = chunk_size, activation, layer_idx
        self.conv_dim = self.d_inner + 2 * n_qk_heads * d_state
        self.in_proj = nn.Linear(d_model, self.conv_dim + self.d_inner + n_v_heads, bias=bias)
        self.z_bias = nn.Parameter(torch.zeros(self.d_inner)) if not bias else None
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, padding=d_conv - 1, bias=conv_bias
        )
        self.D = nn.Parameter(torch.ones(n_v_heads))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states [B, L, d_model] -> [B, L, d_model].

        past_key_values: a transformers Cache whose layer ``layer_idx`` keeps the convolution and scan states.
        attention_mask: [B, L], 0 at padding, which then leaves the states as they are.
        """
        z, log_decay, x, B, C = self._project(hidden_states, past_key_values, attention_mask)
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        state = cache.recurrent_states[0] if cache is not None else None
        if state is not None and hidden_states.shape[1] == 1:
            y, state = ssd_step(x[:, 0], log_decay[:, 0], B[:, 0], C[:, 0], state)
            y = y.unsqueeze(1)
        else:
            y, state = self._scan(x, log_decay, B, C, state)
        if cache is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx)
        y = y + self.D.to(y.dtype).unsqueeze(-1) * x
        gate = F.silu(z if self.z_bias is None else z + self.z_bias)
        return self.out_proj(y.flatten(-2).to(gate.dtype) * gate)

    def mixing_matrix(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The lower triangular matrix [B, n_v_heads, L, L] that the scan and D apply to x, for MOHAWK's first step."""
        _, log_decay, x, B, C = self._project(hidden_states, None, attention_mask)
        decay = decay_matrix(log_decay.transpose(1, 2))  # b h l l
        scores = C.transpose(1, 2) @ B.transpose(1, 2).transpose(-1, -2)  # b g l l
        mixing = decay * scores.repeat_interleave(self.n_v_heads // self.n_qk_heads, dim=1)
        return mixing + torch.diag_embed(self.D.to(mixing.dtype)[:, None].expand(-1, x.shape[1]))

    def _project(
        self, hidden_states: torch.Tensor, past_key_values: Any, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """z [b, l, d_inner], log_decay [b, l, h], x [b, l, h, p], B and C [b, l, g, n]."""
        xBC, z, A_log = self.in_proj(hidden_states).split([self.conv_dim, self.d_inner, self.n_v_heads], dim=-1)
        log_decay = -F.softplus(A_log if A_log.dtype == torch.float64 else A_log.float())
        mask = None if attention_mask is None else attention_mask.to(xBC.dtype).unsqueeze(-1)
        if mask is not None:
            xBC, log_decay = xBC * mask, log_decay * mask
        xBC = self._convolve(xBC, past_key_values)
        if mask is not None:
            xBC = xBC * mask  # the convolution's bias must not enter the state either
        group = self.n_qk_heads * self.d_state
        x, B, C = xBC.split([self.d_inner, group, group], dim=-1)
        x = x.unflatten(-1, (self.n_v_heads, self.head_dim))
        B, C = (m.unflatten(-1, (self.n_qk_heads, self.d_state)) for m in (B, C))
        return z, log_decay, x, B, C

    def _convolve(self, xBC: torch.Tensor, past_key_values: Any) -> torch.Tensor:
        """Causal depthwise convolution and activation of xBC [b, l, conv_dim], continuing from the cache if any."""
        length = xBC.shape[1]
        if past_key_values is None:
            padded = F.pad(xBC, (0, 0, self.d_conv - 1, 0))
        else:
            seen = past_key_values.update_conv_state(
                xBC.transpose(1, 2), self.layer_idx, conv_kernel_size=self.d_conv
            ).transpose(1, 2)
            padded = F.pad(seen, (0, 0, self.d_conv - 1, 0))[:, -(length + self.d_conv - 1) :]
        taps = self.conv1d.weight.squeeze(1)  # conv_dim d_conv
        # A sum over a few shifted products is faster than Conv1d for so few taps, and needs no transposition.
        out = padded[:, self.d_conv - 1 :] * taps[:, -1]
        for k in range(self.d_conv - 1):
            out = torch.addcmul(out, padded[:, k : k + length], taps[:, k])
        if self.conv1d.bias is not None:
            out = out + self.conv1d.bias
        return out if self.activation == "identity" else F.silu(out)

    def _scan(
        self, x: torch.Tensor, log_decay: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if mamba_chunk_scan_combined is not None and x.is_cuda and x.dtype != torch.float64:
            dt = -log_decay
            minus_one = -torch.ones(self.n_v_heads, device=x.device)
            # The kernel multiplies x by dt; dividing in float32 before keeps it as it is. dt is 0 at padding, as x is.
            x = (x / dt.masked_fill(dt == 0, 1.0).unsqueeze(-1)).to(x.dtype)
            return mamba_chunk_scan_combined(
                x, dt, minus_one, B, C, self.chunk_size, initial_states=state, return_final_states=True
            )
        return ssd_chunked(x, log_decay, B, C, self.chunk_size, state)
