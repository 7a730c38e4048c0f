"""Spiking models in transformers' own checkpoints: the recipe travels in the configuration.

from_pretrained builds the dense architecture and hands it, before any weight is read, to the quantiser that the
configuration names; ours puts the neurons in, and packs the weights that are packed in the file. So a spiking model
needs no loader of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spikelm.convert import Recipe, remember, spike_sites, spikify
from spikelm.deploy import deploy, store_as_deployed
from spikelm.errors import SpikelmError
from spikelm.layers.bit_linear import BitLinear, check_packed
from spikelm.limits import check_sizes, check_weight_files


@register_quantization_config("spikelm")
class SpikingConfig(QuantizationConfigMixin):
    """The recipe as a configuration entry, ``quantization_config`` of a saved spiking model."""

    def __init__(self, recipe: Any = None, quant_method: str = "spikelm", **kwargs: Any) -> None:
        self.quant_method: Any = quant_method
        self.recipe = recipe

    def to_recipe(self) -> Recipe:
        """The recipe; refuses unknown fields and neurons."""
        if not isinstance(self.recipe, dict):
            raise SpikelmError(f"the checkpoint's recipe must be an object with fields; got {self.recipe!r}")
        try:
            return Recipe(**self.recipe)
        except TypeError as error:
            raise SpikelmError(f"the checkpoint's recipe does not fit this version of spikelm: {error}") from error


@register_quantizer("spikelm")
class SpikingQuantizer(HfQuantizer):
    """Puts the neurons in before the weights are loaded."""

    quantization_config: SpikingConfig

    requires_calibration = False

    @property
    def is_trainable(self) -> bool:
        """Spiking models train with surrogate gradients; deployed ones do not train."""
        return self.quantization_config.to_recipe().deployed is None

    @property
    def is_qat_trainable(self) -> bool:
        """All weights train, no adapter is needed."""
        return self.is_trainable

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Saved as they are."""
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """Of transformers' hooks the last one before the model is built: absurd sizes and recipes end here."""
        check_sizes(config.to_dict())
        self.quantization_config.to_recipe()
        return config

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        recipe = self.quantization_config.to_recipe()
        spikify(model, replace(recipe, deployed=None))
        if self.pre_quantized and recipe.deployed:
            store_as_deployed(model, recipe)
        if self.pre_quantized and checkpoint_files:  # a dense model's may be anything that its owner trusts
            tensors = (*model.parameters(), *model.buffers())
            check_weight_files(checkpoint_files, sum(tensor.numel() for tensor in tensors))
        # Rounded to 16 bit, thresholds would give other spikes than the saved model's.
        keep: Any = model
        keep._keep_in_fp32_modules_strict = {*(keep._keep_in_fp32_modules_strict or ()), "neuron"}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Thresholds that no file held are uninitialised memory: an error, or the start value over dense weights."""
        recipe = self.quantization_config.to_recipe()
        check_loaded(model)
        unset = {n: o for n, o in spike_sites(model).items() if not getattr(o.neuron.a, "_is_hf_initialized", False)}
        if unset and (self.pre_quantized or recipe.calibrated):
            raise SpikelmError(f"the checkpoint has no thresholds (neuron.a) for {', '.join(unset)}")
        for owner in unset.values():
            owner.neuron.v_threshold = recipe.neuron_arguments.get("v_threshold", 1.0)
        if recipe.deployed and self.pre_quantized and recipe.deployed["form"] == "packed":
            remember(model, recipe)
            model.eval().requires_grad_(False)  # the loader has made parameters anew
        elif recipe.deployed:
            _deploy_as(model, **dict(recipe.deployed))
        return model


def check_loaded(model: nn.Module) -> None:
    """Raises SpikelmError for packed layers that no file filled, or filled with what is no code."""
    for name, layer in model.named_modules():
        if isinstance(layer, BitLinear) and layer.packed:
            tensors = {"packed_weight": layer.packed_weight, "weight_scale": layer.weight_scale}
            unset = [key for key, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
            if unset:
                raise SpikelmError(f"the checkpoint has no {' and no '.join(unset)} for {name}")
    check_packed(model)


def _deploy_as(
    model: nn.Module, form: str | None, accumulate_dtype: str | None = None, head: str | None = None
) -> None:
    """deploy(), from what the recipe of a deployed model says."""
    dtype = None if accumulate_dtype is None else getattr(torch, accumulate_dtype, None)
    if accumulate_dtype is not None and not isinstance(dtype, torch.dtype):
        raise SpikelmError(f"accumulate_dtype must name a dtype of torch; got {accumulate_dtype!r}")
    deploy(model, str(form), dtype, head=head)
