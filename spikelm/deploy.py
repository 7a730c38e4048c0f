"""Turns a spiking model into the form it is meant to run in: no multiplication behind a neuron."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from spikelm.convert import recipe_of, remember
from spikelm.errors import SpikelmError
from spikelm.layers.spiking_linear import SpikingLinear
from spikelm.layers.ternary_linear import TernaryLinear, accumulation_type, check_neuron
from spikelm.neurons import TILIF

FORMS = ("ternary",)


def deploy(model: nn.Module, form: str = "ternary", accumulate_dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces, in place, every SpikingLinear by its inference form; returns the model, in eval mode, not trainable.

    The model is saved and comes back in this form. The state dict keeps its names, shapes and types, so that it takes
    the tensors of a training checkpoint. What only training needs goes: gradients, and a TILIF's compensation
    (``sgc``).

    Args:
        form: "ternary", :class:`~spikelm.layers.TernaryLinear`.
        accumulate_dtype: the type of the sums; see TernaryLinear.

    Raises:
        SpikelmError: another form, a model without spiking projections or deployed already, neurons or weights that
            the form does not take. The model is then unchanged.
    """
    if form not in FORMS:
        raise SpikelmError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
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
        if isinstance(neuron, TILIF):
            neuron.sgc = None
    recipe = recipe_of(model)
    if recipe is not None:  # a model put together by hand has none
        accumulate = None if accumulate_dtype is None else str(accumulate_dtype).removeprefix("torch.")
        remember(model, replace(recipe, deployed={"form": form, "accumulate_dtype": accumulate}))
    return model.eval().requires_grad_(False)


def _check(name: str, layer: SpikingLinear, accumulate_dtype: torch.dtype | None) -> None:
    if isinstance(layer, TernaryLinear):
        raise SpikelmError(f"the model is deployed already: {name} is a TernaryLinear")
    if not layer.spiking:
        raise SpikelmError(f"{name} passes its input through (spiking is False), which a TernaryLinear cannot")
    try:
        check_neuron(layer.neuron)
        accumulation_type(layer.weight.dtype, accumulate_dtype)
    except SpikelmError as error:
        raise SpikelmError(f"{name}: {error}") from error
