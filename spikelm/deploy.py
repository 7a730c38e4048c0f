"""Turns a model into the form it is meant to run in: no multiplication behind a neuron, or 1 to 2 bit a weight."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spikelm.convert import recipe_of, remember
from spikelm.errors import SpikelmError
from spikelm.layers.bit_linear import BitLinear
from spikelm.layers.spiking_linear import SpikingLinear
from spikelm.layers.ternary_linear import TernaryLinear, accumulation_type, check_neuron, check_weights
from spikelm.neurons import TILIF

FORMS = ("ternary", "packed")


def deploy(model: nn.Module, form: str = "ternary", accumulate_dtype: torch.dtype | None = None) -> nn.Module:
    """Gives, in place, projections their inference form; returns the model, in eval mode, not trainable.

    The model is saved and comes back in this form. What only training needs goes: gradients, and a TILIF's compensation
    (``sgc``).

    Args:
        form: "ternary", every SpikingLinear of float weights becomes a :class:`~spikelm.layers.TernaryLinear`. The
            state dict keeps its names, shapes and types, so that it takes the tensors of a training checkpoint.
            "packed", every BitLinear of binary or ternary weights, which SpikingLinear is too, keeps these alone, 1 or
            2 bit each; also in a model that was not made by spikify, whose configuration then gets packed = True if it
            has that field. The logits are bit for bit the same.
        accumulate_dtype: the type of the sums of "ternary"; see TernaryLinear.

    Raises:
        SpikelmError: another form, a model without such projections or deployed already, neurons or weights that
            the form does not take. The model is then unchanged.
    """
    if form not in FORMS:
        raise SpikelmError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
    if form == "packed":
        _pack(model, accumulate_dtype)
    else:
        _accumulate(model, accumulate_dtype)
    for neuron in (module for module in model.modules() if isinstance(module, TILIF)):
        neuron.sgc = None
    recipe = recipe_of(model)
    if recipe is not None:  # a model put together by hand has none
        accumulate = None if accumulate_dtype is None else str(accumulate_dtype).removeprefix("torch.")
        remember(model, replace(recipe, deployed={"form": form, "accumulate_dtype": accumulate}))
    return model.eval().requires_grad_(False)


def packed_storage(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Bytes of a model's weights when saved, "trained" and "packed"; {} for one without binary or ternary weights.

    "file" counts all of the checkpoint's weights, "matrices" the quantised ones alone. The model stays as it is.
    """
    if not any(layer.weights != "float" for layer in _bit_linears(model).values()):
        return {}
    packed: Any = deploy(copy.deepcopy(model), "packed")
    return {"trained": _stored_bytes(model), "packed": _stored_bytes(packed)}


def storage_line(storage: Mapping[str, Mapping[str, int]]) -> str:
    """What :func:`packed_storage` found, in a line."""
    trained, packed = storage["trained"], storage["packed"]
    parts = ", ".join(f"{part} {trained[part]:,} -> {packed[part]:,}" for part in ("matrices", "file"))
    return f"bytes, trained -> packed: {parts}"


def _stored_bytes(model: PreTrainedModel) -> dict[str, int]:
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        file = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
    tensors = [
        tensor
        for layer in _bit_linears(model).values()
        if layer.weights != "float"
        for tensor in ((layer.packed_weight, layer.weight_scale) if layer.packed else (layer.weight,))
    ]
    return {"file": file, "matrices": sum(tensor.nbytes for tensor in tensors)}


def _bit_linears(model: nn.Module) -> dict[str, BitLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}


def _pack(model: nn.Module, accumulate_dtype: torch.dtype | None) -> None:
    if accumulate_dtype is not None:
        raise SpikelmError(f'accumulate_dtype is of form="ternary"; got {accumulate_dtype} with form="packed"')
    layers = _bit_linears(model)
    for name, layer in layers.items():
        if layer.packed:
            raise SpikelmError(f"the model is deployed already: {name} is packed")
    quantised = [layer for layer in layers.values() if layer.weights != "float"]
    if not quantised:
        raise SpikelmError(
            'form="packed" takes binary or ternary weights, of which the model has none: '
            'spikify(model, Recipe.preset(..., weights="ternary")) makes them'
        )
    for layer in quantised:
        layer.pack()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "packed"):
        config.packed = True


def _accumulate(model: nn.Module, accumulate_dtype: torch.dtype | None) -> None:
    names: dict[SpikingLinear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SpikingLinear):
            names.setdefault(module, []).append(name)
    if not names:
        raise SpikelmError("deploy takes a spiking model: spikify(model, recipe) makes one")
    for layer, (name, *_) in names.items():
        _check(name, layer, accumulate_dtype)
        if layer._shares_with and layer._shares_with[0] not in names:
            raise SpikelmError(
                f"{name} shares the neurons of a projection outside of the model; deploy the whole model"
            )
    owners: dict[nn.Module, TernaryLinear] = {}
    waiting = sorted(names, key=lambda layer: layer.owns_neuron)  # owners last, to be taken from the end
    while waiting:
        layer = waiting.pop()
        neuron, owner = layer.neuron, None if layer.owns_neuron else owners[layer.neuron]
        ternary = TernaryLinear.from_spiking(layer, accumulate_dtype, owner)
        owners.setdefault(neuron, ternary)
        for name in names.pop(layer):  # which frees the training form's weight before the next copy
            model.set_submodule(name, ternary)


def _check(name: str, layer: SpikingLinear, accumulate_dtype: torch.dtype | None) -> None:
    if isinstance(layer, TernaryLinear) or layer.packed:
        state = "packed" if layer.packed else "a TernaryLinear"
        raise SpikelmError(f"the model is deployed already: {name} is {state}")
    if not layer.spiking:
        raise SpikelmError(f"{name} passes its input through (spiking is False), which a TernaryLinear cannot")
    try:
        check_weights(layer)
        check_neuron(layer.neuron)
        accumulation_type(layer.weight.dtype, accumulate_dtype)
    except SpikelmError as error:
        raise SpikelmError(f"{name}: {error}") from error
