"""Where distillation looks into a transformers decoder: layers, norms, mixers, head; and hooks that record them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from spikelm.errors import SpikelmError

LAYER_PATHS = (
    "model.layers",
    "backbone.layers",
    "model.backbone.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.decoder.layers",
    "layers",
    "h",
)
MIXER_NAMES = ("self_attn", "mixer", "attention", "attn")
NORM_NAMES = {
    "pre": ("input_layernorm",),
    "post": ("post_attention_layernorm",),
    "both": ("input_layernorm", "post_attention_layernorm"),
}
# Models with one of these set change what lies between the last hidden state and the logits.
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class Taps:
    """Record the first input and the output of named modules during one forward pass; no hook outlives the context.

    with Taps({"0": layer.mixer}) as taps:
        model(input_ids)
    taps.inputs["0"], taps.outputs["0"]        # the output as the module returned it: a tensor or a tuple

    Tensors keep their graph. A module that runs never or twice in the context raises RuntimeError: a record must not be
    ambiguous.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Any] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def _record(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        if name in self.outputs:
            raise RuntimeError(f"tapped module {name!r} ran twice in one context: open a context per forward pass")
        self.inputs[name] = args[0] if args else kwargs["hidden_states"]
        self.outputs[name] = output

    def __enter__(self) -> Taps:
        self.inputs, self.outputs = {}, {}
        self._handles = [
            module.register_forward_hook(partial(self._record, name), with_kwargs=True)
            for name, module in self.modules.items()
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        silent = [name for name in self.modules if name not in self.outputs]
        if kind is None and silent:
            raise RuntimeError(f"tapped module {silent[0]!r} did not run in the context")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a DistributedDataParallel wrapper, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of a transformers model (wrapped or not). SpikelmError where none of the known paths
    exists.
    """
    model = unwrapped(model)
    for path in LAYER_PATHS:
        found: Any = model
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList) and len(found) > 0:
            return found
    raise SpikelmError(f"{type(model).__name__} has no decoder layers at any of {', '.join(LAYER_PATHS)}")


def norm_modules(model: nn.Module, which: str) -> dict[str, nn.Module]:
    """The norms of every layer as {"<layer>.<norm>": module}; `which` is "pre" (before the mixer), "post" (before the
    MLP) or "both".
    """
    if which not in NORM_NAMES:
        raise SpikelmError(f"unknown norm taps {which!r}; accepted: {', '.join(NORM_NAMES)}")
    modules: dict[str, nn.Module] = {}
    for index, layer in enumerate(decoder_layers(model)):
        for name in NORM_NAMES[which]:
            if not isinstance(getattr(layer, name, None), nn.Module):
                raise SpikelmError(f"layer {index} of {type(unwrapped(model)).__name__} has no {name} to tap")
            modules[f"{index}.{name}"] = getattr(layer, name)
    return modules


def mixer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The token mixer (attention or state-space) of every layer as {"<layer>": module}."""
    modules: dict[str, nn.Module] = {}
    for index, layer in enumerate(decoder_layers(model)):
        found = [getattr(layer, name) for name in MIXER_NAMES if isinstance(getattr(layer, name, None), nn.Module)]
        if not found:
            raise SpikelmError(
                f"layer {index} of {type(unwrapped(model)).__name__} has no mixer; looked for {', '.join(MIXER_NAMES)}"
            )
        modules[str(index)] = found[0]
    return modules


def output_head(model: nn.Module) -> nn.Linear:
    """The Linear that turns the last hidden state into logits. SpikelmError where there is none or the model rescales
    its logits.
    """
    model = unwrapped(model)
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    if not isinstance(head, nn.Linear):
        raise SpikelmError(
            f"{type(model).__name__} has no Linear language-model head: it is not a causal language model"
        )
    for name in LOGIT_CHANGES:
        if getattr(getattr(model, "config", None), name, None) not in (None, 1, 1.0):
            raise SpikelmError(f"{type(model).__name__} sets {name}, which logit distillation does not apply; use None")
    return head


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Let the attention layers form their maps (second output, [B, H, L, L]) for one forward pass, then restore."""
    model = unwrapped(model)
    config = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if before == "eager":
        yield
        return
    set_implementation: Any = getattr(model, "set_attn_implementation", None)
    if set_implementation is None:
        raise SpikelmError(
            f"{type(model).__name__} cannot switch its attention to eager to give its maps: load it with "
            'attn_implementation="eager"'
        )
    set_implementation("eager")
    try:
        yield
    finally:
        set_implementation(before)
