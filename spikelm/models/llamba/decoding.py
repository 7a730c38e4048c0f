"""One token through the blocks of a deployed Llamba: a kernel's call for each block instead of some forty of torch."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from ctypes import create_string_buffer
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as every_module
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from spikelm.cpu import module as cpu
from spikelm.cpu import spike_linear
from spikelm.errors import SpikelmError
from spikelm.layers.discrete_mamba2 import DiscreteMamba2
from spikelm.layers.gather_linear import GatherLinear, stamp_of, version_of
from spikelm.models.llamba.cache import LlambaCache
from spikelm.ops import multistep, operators
from spikelm.ops.kernel import Kernel
from spikelm.ops.spike_linear import MOST_TOKENS, Encoder, SpikeWeights, refused

if TYPE_CHECKING:
    from spikelm.models.llamba.modeling_llamba import LlambaBlock, LlambaModel

# The members of struct Block of cpu/llamba.cpp between the places that change and the banks.
_BLOCK = struct.Struct("=6Q11qd")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PATCHES = {"_hf_hook", "forward"}


Step = Callable[[torch.Tensor, Any], None]
# Not in the models themselves, of which copies and files must not have addresses.
_STEPS: WeakKeyDictionary[nn.Module, list[BlockStep]] = WeakKeyDictionary()


def steps_of(model: LlambaModel, hidden_states: torch.Tensor, cache: Any, mask: Any) -> list[Step] | None:
    """The blocks as kernel calls that change hidden_states [B, 1, d_model], dense, and the cache in place, in turn.

    None where the blocks' own forwards are to run. That is where more than one token a sequence or more than
    MOST_TOKENS sequences come, on another device than a CPU, with padding, before a prefill, under autocast, while
    something watches the modules (hooks, modes, a compiler), and for blocks whose projections are not all GatherLinear
    of one form.
    """
    if not operators.is_plain(hidden_states, None, hidden_states) or every_module._has_any_global_hook():
        return None
    blocks: Any = model.layers
    if not hidden_states.is_cpu or not all(type(block.mlp.down_proj) is GatherLinear for block in blocks):
        _STEPS.pop(model, None)
        return None
    few = hidden_states.dim() == 3 and hidden_states.shape[1] == 1 and 0 < hidden_states.shape[0] <= MOST_TOKENS
    if not few or mask is not None or not isinstance(cache, LlambaCache) or model.training:
        return None
    if (torch.is_grad_enabled() and hidden_states.requires_grad) or torch.is_autocast_enabled("cpu"):
        return None
    known = _STEPS.get(model, [])
    if len(known) != len(blocks) or not all(step.is_of(block) for step, block in zip(known, blocks, strict=True)):
        known = _STEPS[model] = [BlockStep(block) for block in blocks]
    steps: list[Step] = []
    for step in known:
        prepared = step.prepare(hidden_states, cache)
        if prepared is None:
            return None
        steps.append(partial(step.run, prepared))
    return steps


def banks_of(model: LlambaModel) -> list[tuple[list[GatherLinear], int]]:
    """The projections behind every bank, and how many of its channels the last kernel call read, in order."""
    return [
        (bank, active)
        for step in _STEPS.get(model, [])
        for bank, active in zip(step.banks, step.active.tolist(), strict=True)
    ]


class Prepared(NamedTuple):
    """What a call needs, and keeps the tensors alive that it points to."""

    function: Callable[[Any], int]
    arguments: bytes  # of struct Block, without the places of hidden states and cache
    kept: Any


class BlockStep:
    """A block's kernel call, whose arguments are made anew only where a tensor of the block has changed."""

    def __init__(self, block: LlambaBlock) -> None:
        mixer, mlp = block.mixer, block.mlp
        self.block, self.index = block, mixer.layer_idx
        self.parts = _parts(block)
        self.banks: list[list[Any]] = [[mixer.in_proj], [mixer.out_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]
        self.projections: list[Any] = [layer for bank in self.banks for layer in bank]
        self.modules = list(block.modules())
        self.known: tuple[tuple[Any, ...], Prepared | None] | None = None
        self.active = torch.zeros(len(self.banks), dtype=torch.int64, device="cpu")
        norms = (block.input_layernorm, block.post_attention_layernorm)
        self.fits = (
            all(type(layer) is GatherLinear for layer in self.projections)
            and mlp.gate_proj.neuron is mlp.up_proj.neuron
            and type(mixer) is DiscreteMamba2
            and type(mixer.conv1d) is nn.Conv1d
            and all(type(norm) is LlamaRMSNorm for norm in norms)
            and norms[0].variance_epsilon == norms[1].variance_epsilon
            and _is_silu(mlp.act_fn)
        )

    def is_of(self, block: LlambaBlock) -> bool:
        """Whether these are still the block and its modules."""
        return self.block is block and all(a is b for a, b in zip(self.parts, _parts(block), strict=True))

    def prepare(self, hidden_states: torch.Tensor, cache: Any) -> Prepared | None:
        """The kernel's call for such a token; None where it cannot take it."""
        if not self.fits or _is_watched(self.modules):
            return None
        layer, mixer = cache.layers[self.index], self.block.mixer
        conv, state = layer.conv_states.get(0), layer.recurrent_states.get(0)
        if conv is None or state is None or layer.record_past or not layer.has_previous_state[0]:
            return None
        tokens = len(hidden_states)
        fits = (
            hidden_states.shape[2] == mixer.d_model
            and conv.shape == (tokens, mixer.conv_dim, mixer.d_conv)
            and state.shape == (tokens, mixer.n_v_heads, mixer.head_dim, mixer.d_state)
            and conv.dtype == hidden_states.dtype
            and state.dtype == torch.float32
            and conv.is_cpu
            and state.is_cpu
            and conv.is_contiguous()
            and state.is_contiguous()
        )
        return self._prepared(hidden_states) if fits else None

    def run(self, prepared: Prepared, hidden_states: torch.Tensor, cache: Any) -> None:
        """Changes hidden_states [B, 1, d_model] and the cache in place."""
        layer = cache.layers[self.index]
        if self.index == 0:
            cache.tokens_seen += 1
        conv, state = layer.conv_states[0], layer.recurrent_states[0]
        places = struct.pack("=3Q", hidden_states.data_ptr(), conv.data_ptr(), state.data_ptr())
        if prepared.function(create_string_buffer(places + prepared.arguments)):  # which the kernel writes to
            raise SpikelmError(f"backend 'cpu': no memory for a step of {tuple(hidden_states.shape)}")

    def _prepared(self, hidden_states: torch.Tensor) -> Prepared | None:
        """Made anew where something changed; one tuple, because other threads may be at the same block."""
        threads = torch.get_num_threads()
        stamp = (
            len(hidden_states), hidden_states.dtype, threads, multistep.default_backend(),
            *((layer.neuron.backend, id(layer.neuron._current_dynamics())) for layer in self.projections),
            *(stamp_of(layer) for layer in self.projections),
            *(version_of(tensor) for tensor in self._small()),
        )  # fmt: skip
        known = self.known
        if known is None or known[0] != stamp:
            known = self.known = stamp, self._make(hidden_states, threads)
        return known[1]

    def _small(self) -> list[torch.Tensor | None]:
        """The tensors besides the projections', in the order of struct Block."""
        block, mixer = self.block, self.block.mixer
        return [
            block.input_layernorm.weight, block.post_attention_layernorm.weight, mixer.conv1d.weight,
            mixer.conv1d.bias, mixer.z_bias, mixer.D,
        ]  # fmt: skip

    def _make(self, hidden_states: torch.Tensor, threads: int) -> Prepared | None:
        wide = hidden_states.new_empty((), dtype=torch.float32)
        prepared = [[layer.prepared(wide) for layer in bank] for bank in self.banks]
        kernels = {(encoder.dynamics.kernel, encoder.spiking) for bank in prepared for encoder, _ in bank}
        forms = {(weights.form, weights.rows.dtype) for bank in prepared for _, weights in bank}
        kernel, spiking = kernels.pop()
        if kernels or len(forms) != 1 or isinstance(kernel, str) or hidden_states.dtype not in _DTYPES:
            return None
        form, built = forms.pop(), []

        def reason(natural: str) -> str | None:
            for bank in prepared:
                found = refused(natural, kernel, bank[0][0], [weights for _, weights in bank], torch.float32)
                if found is not None:
                    return found
            try:
                built.append(_build(kernel, spiking, *form, hidden_states.dtype))
            except SpikelmError as error:
                return str(error)
            return None

        # The neurons' own kernel is what a named backend must have; this one may be missing.
        backend = "torch" if any(layer.neuron.backend == "torch" for layer in self.projections) else "auto"
        if multistep.choose(hidden_states, backend, reason) != "cpu":
            return None
        small = [None if tensor is None else tensor.detach().float().contiguous() for tensor in self._small()]
        head = _BLOCK.pack(
            *(0 if tensor is None else tensor.data_ptr() for tensor in small),
            *self._sizes(len(hidden_states)), self.block.input_layernorm.variance_epsilon,
        )  # fmt: skip
        calls = [self._call(i, kernel, bank, len(hidden_states), threads) for i, bank in enumerate(prepared)]
        return Prepared(built[0], head + b"".join(calls), (prepared, small))

    def _sizes(self, tokens: int) -> tuple[int, ...]:
        mixer = self.block.mixer
        return (
            tokens, mixer.d_model, mixer.d_inner, mixer.conv_dim, mixer.d_conv, mixer.n_v_heads, mixer.n_qk_heads,
            mixer.head_dim, mixer.d_state, self.block.mlp.down_proj.in_features, mixer.activation == "silu",
        )  # fmt: skip

    def _call(
        self, i: int, kernel: Kernel, bank: list[tuple[Encoder, SpikeWeights]], tokens: int, threads: int
    ) -> bytes:
        """struct Call of bank i, whose x and y the kernel fills in."""
        encoder, weights = bank[0][0], [one for _, one in bank]
        x = torch.empty((tokens, weights[0].in_features), device="meta")
        y = [torch.empty(0, device="meta")] * len(weights)
        place = self.active[i].data_ptr()
        return spike_linear.pack(kernel, encoder, x, weights, y, weights[0].in_features, place, 0, threads)


def _build(kernel: Kernel, spiking: bool, form: str, weights: torch.dtype, hidden: torch.dtype) -> Any:
    text = spike_linear.definitions(kernel.definitions, spiking, weights, form)
    text += f"#define HIDDEN_T {cpu.STORAGE[hidden]}\n"
    return cpu.functions(text, torch.float32, torch.float32, "llamba.cpp")["step_block"]


def _parts(block: LlambaBlock) -> tuple[nn.Module, ...]:
    """The modules whose work the kernel does."""
    mixer, mlp = block.mixer, block.mlp
    return (
        mixer, mlp, block.input_layernorm, block.post_attention_layernorm, mixer.in_proj, mixer.conv1d, mixer.out_proj,
        mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn,
    )  # fmt: skip


def _is_silu(function: nn.Module) -> bool:
    return isinstance(function, nn.SiLU) or type(function).__name__ == "SiLUActivation"


def _is_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether a hook of somebody's, or a forward put in the place of a module's own, would not be called."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or not _PATCHES.isdisjoint(module.__dict__)
        for module in modules
    )
