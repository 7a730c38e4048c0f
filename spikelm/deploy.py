"""Turns a model into the form it is meant to run in: silent channels unread, no product, or few bits a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from spikelm.convert import Recipe, recipe_of, remember
from spikelm.errors import SpikelmError
from spikelm.layers.bit_linear import BitLinear
from spikelm.layers.gather_linear import GatherLinear
from spikelm.layers.spiking_linear import SpikingLinear
from spikelm.layers.ternary_linear import TernaryLinear, accumulation_type, check_neuron, check_weights
from spikelm.neurons import TILIF

FORMS = ("gather", "ternary", "packed")


def deploy(
    model: nn.Module,
    form: str = "gather",
    accumulate_dtype: torch.dtype | None = None,
    weights: str | None = None,
    head: str | None = None,
) -> nn.Module:
    """Gives, in place, projections their inference form; returns the model, in eval mode, not trainable.

    The model is saved and comes back in this form. What only training needs goes: gradients, and a TILIF's compensation
    (``sgc``).

    Args:
        form: "gather", the quick one: every SpikingLinear becomes a :class:`~spikelm.layers.GatherLinear`, which reads
            the weights of active channels alone; binary and ternary ones are packed.
            "ternary", every SpikingLinear of float weights becomes a :class:`~spikelm.layers.TernaryLinear`: additions
            alone, exact. "gather" and "ternary" of float weights keep the state dict's names, shapes and types, so that
            it takes the tensors of a training checkpoint.
            "packed", every BitLinear of binary, ternary or int8 weights, which SpikingLinear is too, keeps these alone;
            also in a model that was not made by spikify, whose configuration then gets packed = True if it
            has that field. The logits are bit for bit the same.
        accumulate_dtype: the type of the sums of "ternary"; see TernaryLinear.
        weights: "int8" rounds float weights to 8 bit with a scale per output, of "gather" alone.
        head: "int8" does so with the output embeddings, which are then tied to the input's no more and cannot be
            resized; of "gather" alone.

    Raises:
        SpikelmError: another form, a model without such projections or deployed already, neurons or weights that
            the form does not take. The model is then unchanged.
    """
    if form not in FORMS:
        raise SpikelmError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
    for name, value in {"weights": weights, "head": head}.items():
        if value not in (None, "int8") or (value and form != "gather"):
            raise SpikelmError(f'{name} must be None or, with form="gather", "int8"; got {value!r} with {form!r}')
    if accumulate_dtype is not None and form != "ternary":
        raise SpikelmError(f'accumulate_dtype is of form="ternary"; got {accumulate_dtype} with form={form!r}')
    if form == "packed":
        _pack(model)
    elif form == "ternary":
        _accumulate(model, accumulate_dtype)
    else:
        _gather(model, weights, head)
    for neuron in (module for module in model.modules() if isinstance(module, TILIF)):
        neuron.sgc = None
    recipe = recipe_of(model)
    if recipe is not None:  # a model put together by hand has none
        accumulate = None if accumulate_dtype is None else str(accumulate_dtype).removeprefix("torch.")
        quantised = replace(recipe, weights=weights, per_row=True) if weights and recipe.weights == "float" else recipe
        options = {"accumulate_dtype": accumulate, "head": head}
        deployed = {"form": form} | {name: value for name, value in options.items() if value is not None}
        remember(model, replace(quantised, deployed=deployed))
    return model.eval().requires_grad_(False)


def store_as_deployed(model: nn.Module, recipe: Recipe) -> None:
    """Gives a model made spiking by ``recipe``, whose tensors a loader is to fill, those that its deployed form saves.

    After loading, deploy makes the rest of the form.
    """
    assert recipe.deployed is not None
    if recipe.weights != "float" and recipe.deployed["form"] != "ternary":
        _pack(model)
    if recipe.deployed.get("head"):
        _set_int8_head(model, _output_layer(model))


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


def _pack(model: nn.Module) -> None:
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
    def check(layer: SpikingLinear) -> None:
        if layer.packed:
            raise SpikelmError("the model is deployed already: its weights are packed")
        check_weights(layer)
        check_neuron(layer.neuron)
        accumulation_type(layer.weight.dtype, accumulate_dtype)

    _replace(model, check, lambda layer, owner: TernaryLinear.from_spiking(layer, accumulate_dtype, owner))


def _gather(model: nn.Module, weights: str | None, head: str | None) -> None:
    def check(layer: SpikingLinear) -> None:
        if weights and layer.weights not in ("float", weights):
            raise SpikelmError(f"weights={weights!r} takes float weights; these are {layer.weights}")

    def gather(layer: SpikingLinear, owner: GatherLinear | None) -> GatherLinear:
        if weights and layer.weights == "float":
            layer.weights, layer.per_row = weights, True
        return GatherLinear.from_spiking(layer, owner)

    output = _output_layer(model) if head else None
    _replace(model, check, gather)
    if output is not None:
        _set_int8_head(model, output)


def _output_layer(model: nn.Module) -> nn.Linear:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(output, BitLinear) and output.packed and output.weights == "int8":
        return output
    if type(output) is not nn.Linear:
        raise SpikelmError(
            f'head="int8" takes a model whose get_output_embeddings() is an nn.Linear; got {type(output).__name__}'
        )
    return output


def _set_int8_head(model: Any, output: nn.Linear) -> None:
    if isinstance(output, BitLinear):
        return
    model.set_output_embeddings(int8_layer(output))
    model.config.tie_word_embeddings = False


def int8_layer(linear: nn.Linear) -> BitLinear:
    """A copy of a layer in 8 bit, with a scale per output; the layer stays as it is."""
    layer = BitLinear(linear.in_features, linear.out_features, linear.bias is not None, "int8", True, device="meta")
    layer.weight, layer.bias = linear.weight, linear.bias
    layer.pack()
    return layer


AnyDeployed = TypeVar("AnyDeployed", TernaryLinear, GatherLinear)


def _replace(
    model: nn.Module,
    check: Callable[[SpikingLinear], None],
    make: Callable[[SpikingLinear, AnyDeployed | None], AnyDeployed],
) -> None:
    """Puts make(layer, owner of its bank, if another) in the place of every SpikingLinear, once all pass ``check``."""
    names: dict[SpikingLinear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SpikingLinear):
            names.setdefault(module, []).append(name)
    if not names:
        raise SpikelmError("deploy takes a spiking model: spikify(model, recipe) makes one")
    for layer, (name, *_) in names.items():
        _check(name, layer, check)
        if layer._shares_with and layer._shares_with[0] not in names:
            raise SpikelmError(
                f"{name} shares the neurons of a projection outside of the model; deploy the whole model"
            )
    owners: dict[nn.Module, AnyDeployed] = {}
    waiting = sorted(names, key=lambda layer: layer.owns_neuron)  # owners last, to be taken from the end
    while waiting:
        layer = waiting.pop()
        neuron, owner = layer.neuron, None if layer.owns_neuron else owners[layer.neuron]
        deployed = make(layer, owner)
        owners.setdefault(neuron, deployed)
        for name in names.pop(layer):  # which frees the training form's weight before the next copy
            model.set_submodule(name, deployed)


def _check(name: str, layer: SpikingLinear, check: Callable[[SpikingLinear], None]) -> None:
    if isinstance(layer, TernaryLinear | GatherLinear):
        raise SpikelmError(f"the model is deployed already: {name} is a {type(layer).__name__}")
    if not layer.spiking:
        raise SpikelmError(f"{name} passes its input through (spiking is False): set it to True before deploy")
    try:
        check(layer)
    except SpikelmError as error:
        raise SpikelmError(f"{name}: {error}") from error
