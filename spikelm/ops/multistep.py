"""Multi-step operations on tensors: a kernel where there is one, the reference (ops/reference.py) elsewhere.

x = torch.randn(4, 1024)
spikes, v = multi_step(x, None, torch.tensor(1.0), Dynamics("ternary", surrogate.ATan()))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from spikelm.cpu import module as cpu_module
from spikelm.errors import SpikelmError, warn_once
from spikelm.ops import operators, reference, vmap  # noqa: F401  vmap registers its rules
from spikelm.ops.dynamics import Dynamics
from spikelm.ops.kernel import Kernel

BACKENDS = ("auto", "torch", "cpu", "cupy")
_DEVICES = {"cpu": "cpu", "cuda": "cupy"}
_default = "auto"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within it, ``name`` takes the place of every backend "auto"; a backend named on a module or in a call stays.

    For the whole process, not a thread. Raises SpikelmError for an unknown name.
    """
    global _default
    check_backend(name)
    before, _default = _default, name
    try:
        yield
    finally:
        _default = before


def default_backend() -> str:
    """What "auto" stands for here: itself, or what :func:`use_backend` says."""
    return _default


def check_backend(name: str) -> None:
    """Raises SpikelmError unless ``name`` is one of BACKENDS."""
    if name not in BACKENDS:
        raise SpikelmError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")


def unavailable(backend: str) -> str | None:
    """Why the backend "cpu" or "cupy" cannot run here, with what helps; None where it can. Of "torch" always None."""
    if backend == "cpu":
        return cpu_module.unavailable()
    if backend == "cupy":
        from spikelm.cuda import module as cuda_module

        return cuda_module.unavailable()
    return None


def multi_step(
    x_seq: torch.Tensor,
    v: torch.Tensor | None,
    threshold: torch.Tensor,
    dynamics: Dynamics,
    *,
    start: float = 0.0,
    started: bool = False,
    keep_state: bool = True,
    spike_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All steps of x_seq [T, N, *]; what is computed is :func:`spikelm.ops.reference.multi_step`.

    Args:
        v: membrane [N, *] before them in the state's type (float32; float64 for float64 input), or None: ``start``.
        threshold: V > 0 in the state's type, broadcasting over [N, *].
        started: with inject "first", x does not enter.
        keep_state: whether the last membrane is wanted.
        spike_dtype: None, x_seq's; or torch.int8, without gradient.
        backend: one of BACKENDS; "auto" is the kernel of x_seq's device, or the reference with one warning.

    Returns:
        Spikes [T, N, *], and the last membrane [N, *] or None. The backward keeps x_seq, v and threshold, nothing else.
    """
    shape = x_seq.shape
    if not shape:
        raise SpikelmError("x_seq must be [T, N, *]; got a tensor without axes")
    _check(x_seq, shape[1:], v, threshold)
    dtype = _spike_dtype(x_seq, spike_dtype, dynamics.levels)
    kernel = _choose(x_seq, threshold, dynamics, dtype, backend)
    if kernel is None or x_seq.numel() == 0:
        state = reference.state_dtype(x_seq.dtype)
        before = x_seq.new_full(x_seq.shape[1:], start, dtype=state) if v is None else v
        spikes, membranes = reference.multi_step(x_seq, before, threshold, dynamics, started)
        v_last = (membranes[-1] if len(membranes) else before).clone() if keep_state else None
        return _converted(spikes, dtype), v_last
    x = x_seq[0] if kernel.inject_first else x_seq
    if kernel.inject_first and started:
        x = x.detach()  # it gives the shape alone
    return operators.multi_step(x, v, threshold, kernel, shape[0], dtype, start, started, keep_state)


def encode(
    x: torch.Tensor,
    threshold: torch.Tensor,
    dynamics: Dynamics,
    T: int,
    *,
    spike_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """T >= 1 frames [T, *] of a plain x [*] that enters a fresh membrane once; arguments as of :func:`multi_step`."""
    _check_encoding(T, 1.0)
    _check(x, x.shape, None, threshold)
    first = dynamics if dynamics.inject == "first" else dataclasses.replace(dynamics, inject="first")
    dtype = _spike_dtype(x, spike_dtype, dynamics.levels)
    kernel = _choose(x, threshold, first, dtype, backend)
    if kernel is None or x.numel() == 0:
        return _converted(torch.stack(reference.encode(x, threshold, first, T)).to(x.dtype), dtype)
    return operators.multi_step(x, None, threshold, kernel, T, dtype, 0.0, False, False)[0]


def encode_sum(
    x: torch.Tensor,
    threshold: torch.Tensor,
    dynamics: Dynamics,
    T: int,
    frame_weight: float,
    *,
    spike_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """sum_t frame_weight**t s_t over the T frames of x [*]: shape and dtype of x; arguments as of :func:`multi_step`.

    T is an integer >= 1, frame_weight finite and > 0. In torch.int8 the sum is the count itself (frame_weight 1), or
    sum_t 2**(T - 1 - t) s_t (0.5); other weights are refused.
    """
    _check_encoding(T, frame_weight)
    _check(x, x.shape, None, threshold)
    scale, largest = 1.0, dynamics.levels * T
    if spike_dtype == torch.int8:
        if frame_weight not in (1, 0.5) and T > 1:
            raise SpikelmError(f"a sum in torch.int8 takes frame_weight 1 or 0.5; got {frame_weight}")
        if frame_weight == 0.5 and T > 1:
            scale, largest = 2.0 ** (T - 1), dynamics.levels * (2**T - 1)
    dtype = _spike_dtype(x, spike_dtype, largest)
    kernel = _choose(x, threshold, dynamics, dtype, backend)
    if kernel is None or x.numel() == 0:
        total = reference.encode_sum(x, threshold, dynamics, T, frame_weight)
        return _converted(total if scale == 1 else total * scale, dtype)
    return operators.encode_sum(x, threshold, kernel, T, dtype, float(frame_weight), scale)


def choose(x: torch.Tensor, backend: str, refused: Callable[[str], str | None]) -> str | None:
    """The backend whose kernel runs for tensors on x's device, or None: the reference, with one warning if "auto" does
    without a kernel. ``refused`` says why that device's backend cannot run; raises if it is a named one."""
    name = _default if backend == "auto" else backend
    natural = "cpu" if x.is_cpu else _DEVICES.get(x.device.type)
    if name == "torch" or x.is_meta:
        return None
    if name not in ("auto", natural):
        check_backend(name)
        on = next(device for device, backend in _DEVICES.items() if backend == name)
        reason = unavailable(name)
        besides = "" if reason is None else f". Besides, {reason}"
        raise SpikelmError(f"backend {name!r} takes tensors on a {on} device; got one on {x.device}{besides}")
    reason = f"no kernel for tensors on {x.device}" if natural is None else refused(natural)
    if reason is None:
        return natural
    if name == "auto":
        warn_once(f"{reason}; the reference is used")
        return None
    raise SpikelmError(reason if reason.startswith("backend ") else f"backend {name!r}: {reason}")


def _choose(
    x: torch.Tensor, threshold: torch.Tensor, dynamics: Dynamics, spike_dtype: torch.dtype, backend: str
) -> Kernel | None:
    """The kernel to run, or None for the reference; raises if a named backend cannot run."""
    kernel = dynamics.kernel

    def refused(natural: str) -> str | None:
        if isinstance(kernel, str):
            return kernel
        if threshold.numel() > 1 and threshold.numel() not in threshold.shape:
            return f"no kernel for a threshold over several axes, {tuple(threshold.shape)}"
        return _refused(natural, kernel.definitions, x.dtype, spike_dtype)

    found = choose(x, backend, refused)
    return None if found is None or isinstance(kernel, str) else kernel


def _refused(backend: str, definitions: str, io: torch.dtype, spike: torch.dtype) -> str | None:
    """Why this specialisation cannot run; builds it if need be."""
    key = (backend, definitions, io, spike)
    reason = _KNOWN.get(key, "")
    if reason == "":
        reason = _KNOWN[key] = _build(*key)
    return reason


# What torch.compiler.assume_constant_result sets; it would import the compiler, a second, for everyone.
_refused._dynamo_marked_constant = True  # type: ignore[attr-defined]
_KNOWN: dict[tuple[str, str, torch.dtype, torch.dtype], str | None] = {}


def _build(backend: str, definitions: str, io: torch.dtype, spike: torch.dtype) -> str | None:
    if io not in cpu_module.STORAGE:
        return f"no kernel for {io}"
    try:
        if backend == "cpu":
            cpu_module.functions(definitions, io, spike)
        elif (reason := unavailable(backend)) is not None:
            return reason
        else:  # what compiles for one step compiles for more, at the first launch with them
            operators.cuda_launch().build(definitions, io, spike)
    except SpikelmError as error:
        return str(error)
    return None


def _check(x: torch.Tensor, frame: torch.Size, v: torch.Tensor | None, threshold: torch.Tensor) -> None:
    """A kernel takes shapes and types on trust."""
    if not x.is_floating_point():
        raise SpikelmError(f"x must be a floating-point tensor; got {x.dtype}")
    if x.layout != torch.strided:
        raise SpikelmError(f"x must be a dense tensor (torch.strided); got {x.layout}")
    state = reference.state_dtype(x.dtype)
    if threshold.dtype != state or threshold.device != x.device:
        raise SpikelmError(
            f"threshold must be {state} on {x.device} for x of {x.dtype}; got {threshold.dtype} on {threshold.device}"
        )
    sizes = threshold.shape
    if sizes and not _broadcasts(sizes, frame):
        raise SpikelmError(f"threshold must broadcast over frames {tuple(frame)}; got shape {tuple(sizes)}")
    if v is not None and (v.shape != frame or v.dtype != state or v.device != x.device):
        raise SpikelmError(
            f"v must be {state} of shape {tuple(frame)} on {x.device}; "
            f"got {v.dtype} of shape {tuple(v.shape)} on {v.device}"
        )


def _check_encoding(T: int, frame_weight: float) -> None:
    if T < 1:
        raise SpikelmError(f"T must be an integer >= 1; got {T!r}")
    if not 0 < frame_weight < math.inf:
        raise SpikelmError(f"frame_weight must be a finite number > 0; got {frame_weight!r}")


def _broadcasts(sizes: torch.Size, frame: torch.Size) -> bool:
    pairs = zip(sizes[::-1], frame[::-1], strict=False)
    return len(sizes) <= len(frame) and all(size == 1 or size == at for size, at in pairs)


def _spike_dtype(x: torch.Tensor, dtype: torch.dtype | None, largest: int) -> torch.dtype:
    if dtype is None or dtype == x.dtype:
        return x.dtype
    if dtype != torch.int8:
        raise SpikelmError(f"spike_dtype must be None, {x.dtype} (the input's) or torch.int8; got {dtype}")
    if largest > 127:
        raise SpikelmError(f"torch.int8 holds up to 127; these spikes reach {largest}")
    return dtype


def _converted(spikes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return spikes if spikes.dtype == dtype else spikes.detach().to(dtype)
