"""What an operator of PyTorch does to numbers: multiply, add, evaluate a function, or only compare and move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

Kind = Literal["multiplication", "accumulation", "function", "neuron", "other", "unknown"]

# Operators of aten without the underscore of their in-place form. What is not listed here is "unknown".
_MATRIX_PRODUCTS = set("mm addmm bmm baddbmm mv addmv dot _int_mm".split())
_REDUCTIONS = set("sum cumsum mean".split())
_NORMS = set("native_layer_norm native_group_norm".split())
_FIXED_NORMS = {"_native_batch_norm_legit_no_training"}
_AVERAGES = set("avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d".split())
_INDEXED_SUMS = set("index_add scatter_add".split())  # their fourth argument is what they add
_NAMES: dict[Kind, str] = {
    "multiplication": "mul div pow square reciprocal addcmul addcdiv lerp remainder fmod floor_divide convolution",
    "accumulation": "add sub rsub",
    "function": """exp expm1 log log2 log1p sqrt rsqrt sin cos tan tanh sigmoid log_sigmoid_forward erf silu gelu
        softplus _softmax _log_softmax _safe_softmax logsumexp""",
    "other": """view _unsafe_view _reshape_alias reshape t transpose permute expand squeeze unsqueeze slice select split
        split_with_sizes unbind unfold as_strided diagonal alias detach lift_fresh clone copy _to_copy cat stack index
        index_select index_put gather scatter embedding masked_fill masked_select where nonzero repeat
        repeat_interleave flip roll tril triu constant_pad_nd diag_embed empty empty_like new_empty new_zeros new_ones
        new_full zeros zeros_like ones ones_like full full_like fill zero arange scalar_tensor _local_scalar_dense
        abs neg sign floor ceil round trunc relu clamp clamp_min clamp_max maximum minimum max min amax amin aminmax
        argmax argmin sort topk eq ne lt le gt ge equal isnan isinf isfinite any all logical_and logical_or logical_not
        logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor isin __and__ __or__ __xor__ __lshift__ __rshift__
        __iand__ __ior__ __ixor__ __ilshift__ __irshift__ bitwise_left_shift bitwise_right_shift max_pool2d_with_indices
        heaviside copysign hardtanh leaky_relu unsafe_split lift triu_indices tril_indices bernoulli rand randn
        uniform normal is_same_size unsafe_chunk argwhere bincount""",
}
_KINDS: dict[str, Kind] = {name: kind for kind, names in _NAMES.items() for name in names.split()}


def operations(operator: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[tuple[Kind, int]]:
    """Kind and number of the scalar operations of one call, e.g. of "aten::addmm".

    A product of matrices and a convolution give their multiply-accumulates, as multiplications; a sum its summands; a
    norm three multiplications and three accumulations an element (a batch norm of fixed statistics one each);
    everything else the elements of its result.
    """
    namespace, name = operator.split("::")
    name = name.removesuffix("_") if not name.endswith("__") else name
    elements = sum(tensor.numel() for tensor in _tensors(out))
    if namespace == "spikelm":
        return [("neuron", elements)]
    if namespace != "aten":
        return [("unknown", elements)]
    if name in _MATRIX_PRODUCTS:
        left = [tensor for tensor in args if isinstance(tensor, torch.Tensor)][-2]
        return [("multiplication", elements * left.shape[-1])]
    if name == "convolution":
        moved = args[0].numel() if args[6] else elements  # transposed: every input meets the kernel
        return [("multiplication", moved * args[1][0].numel())]
    if name in ("_embedding_bag", "_embedding_bag_forward_only"):
        return _embedding_bag(out[0].numel(), *args)
    if name in _REDUCTIONS:
        added: tuple[Kind, int] = ("accumulation", args[0].numel())
        return [added, ("multiplication", elements)] if name == "mean" else [added]
    if name in _NORMS:  # the sums of mean and variance, and centring; squares, scale and gain
        return [("accumulation", 3 * args[0].numel()), ("multiplication", 3 * args[0].numel())]
    if name in _FIXED_NORMS:  # of known mean and variance: one factor and one summand
        return [("accumulation", args[0].numel()), ("multiplication", args[0].numel())]
    if name in _AVERAGES:
        return [("accumulation", args[0].numel()), ("multiplication", elements)]
    if name in _INDEXED_SUMS:
        return [("accumulation" if kwargs.get("alpha", 1) == 1 else "multiplication", args[3].numel())]
    kind = _KINDS.get(name, "unknown")
    if kind == "accumulation" and kwargs.get("alpha", 1) != 1:
        kind = "multiplication"
    if name == "index_put" and len(args) > 3 and args[3]:
        kind = "accumulation"
    return [(kind, elements)]


def _embedding_bag(
    elements: int,
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    *_: Any,
) -> list[tuple[Kind, int]]:
    """Gathered numbers are added; weights of the samples multiply them, mode 1 is the mean and 2 the largest."""
    gathered = indices.numel() * weight.shape[1]
    if mode == 2:
        return [("other", gathered)]
    found: list[tuple[Kind, int]] = [("accumulation", gathered)]
    if per_sample_weights is not None:
        found.append(("multiplication", gathered))
    if mode == 1:
        found.append(("multiplication", elements))
    return found


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
