"""Puts neurons before named projections of any transformers (or plain torch) model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn

from spikelm.bypass import forbid_bypass
from spikelm.errors import SpikelmError
from spikelm.layers.bit_linear import BitLinear
from spikelm.layers.spiking_linear import SiteNeuron, SpikingLinear
from spikelm.limits import check_sizes
from spikelm.neurons import ATMN, TILIF
from spikelm.ops.weight_quantization import FORMS

# The neurons that a recipe can name.
NEURONS: dict[str, type[SiteNeuron]] = {"ATMN": ATMN, "TILIF": TILIF}
_LONGEST_PATTERN = 1000
_LARGEST_NUMBER = 3e38
_LARGEST_ARGUMENT = 1e4  # of a surrogate, some of which loop so many times


def _check_sites(sites: Any) -> None:
    """Site names to non-empty lists of patterns; a pattern is text for fnmatch alone."""
    accepted = "sites must map at least one site name to a non-empty list of module-name patterns"
    if not isinstance(sites, Mapping) or not sites:
        raise SpikelmError(f"{accepted}; got {sites!r}")
    for site, patterns in sites.items():
        right = isinstance(site, str) and isinstance(patterns, list | tuple) and len(patterns) > 0
        if not right or not all(isinstance(one, str) and 0 < len(one) <= _LONGEST_PATTERN for one in patterns):
            raise SpikelmError(f"{accepted}, each of 1 to {_LONGEST_PATTERN} characters; got {site!r}: {patterns!r}")


def _check_numbers(arguments: Mapping[str, Any]) -> None:
    """T and D within what a recipe may ask for, and no integer that no float holds."""
    check_sizes(arguments)
    for name, value in arguments.items():
        if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
            raise SpikelmError(
                f"{name} must be within +-{_LARGEST_NUMBER:g}; got an integer of {value.bit_length()} bits"
            )


def _check_deployed(deployed: Any) -> None:
    if deployed is None:
        return
    right = isinstance(deployed, Mapping) and {"form"} <= set(deployed) <= {"form", "accumulate_dtype", "head"}
    if not right or not all(value is None or isinstance(value, str) for value in deployed.values()):
        raise SpikelmError(f"deployed must name form, accumulate_dtype and head; got {deployed!r}")


@dataclass(frozen=True)
class Recipe:
    """Which neurons go where; JSON all through, so that it is saved beside the weights.

    Args:
        sites: site name -> patterns (``*`` and ``?``) over module names of nn.Linear layers. Projections of one site
            below the same parent module share an input, hence a bank of neurons.
        neuron: a name in ``spikelm.convert.NEURONS``.
        neuron_arguments: passed to the neuron; ``surrogate_function`` is the name of a SpikingJelly surrogate, or a
            mapping with "name" and its arguments.
        calibrated: set by :func:`spikelm.calibrate`: thresholds are chosen and folded into the weights.
        deployed: set by :func:`spikelm.deploy`: its ``form``, ``head`` and the name of ``accumulate_dtype``.
        weights: "float", "binary", "ternary" or "int8", of the projections behind neurons; see spikelm.layers.BitLinear
        per_row: a scale per output of quantised weights instead of one per matrix.
    """

    sites: Mapping[str, Sequence[str]]
    neuron: str = "ATMN"
    neuron_arguments: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = False
    deployed: Mapping[str, str | None] | None = None
    weights: str = "float"
    per_row: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.neuron, str) or self.neuron not in NEURONS:
            raise SpikelmError(f"neuron must be one of {', '.join(NEURONS)}; got {self.neuron!r}")
        _check_sites(self.sites)
        if not isinstance(self.neuron_arguments, Mapping) or not all(
            isinstance(key, str) for key in self.neuron_arguments
        ):
            raise SpikelmError(f"neuron_arguments must map names to values; got {self.neuron_arguments!r}")
        _check_numbers(self.neuron_arguments)
        if not isinstance(self.calibrated, bool):
            raise SpikelmError(f"calibrated must be True or False; got {self.calibrated!r}")
        _check_deployed(self.deployed)
        if self.weights not in FORMS:
            raise SpikelmError(f"weights must be one of {', '.join(FORMS)}; got {self.weights!r}")
        if not isinstance(self.per_row, bool) or (self.per_row and self.weights == "float"):
            raise SpikelmError(
                f"per_row must be a bool, and True only with quantised weights; got {self.per_row!r} with "
                f"{self.weights} weights"
            )

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        neuron: str | None = None,
        weights: str = "float",
        per_row: bool = False,
        **neuron_arguments: Any,
    ) -> Recipe:
        """The sites and, where no other is given, the neuron of ``PRESETS[name]``, with the neuron's arguments."""
        if name not in PRESETS:
            raise SpikelmError(f"the recipe presets are {', '.join(PRESETS)}; got {name!r}")
        preset = PRESETS[name]
        return replace(
            preset,
            neuron=neuron or preset.neuron,
            neuron_arguments=neuron_arguments,
            weights=weights,
            per_row=per_row,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        sites = {name: list(patterns) for name, patterns in self.sites.items()}
        return asdict(self) | {"sites": sites, "neuron_arguments": dict(self.neuron_arguments)}

    def make_neuron(self, num_channels: int) -> SiteNeuron:
        """A bank of ``num_channels`` neurons."""
        arguments = dict(self.neuron_arguments)
        try:
            if "surrogate_function" in arguments:
                arguments["surrogate_function"] = _surrogate(arguments["surrogate_function"])
            return NEURONS[self.neuron](num_channels=num_channels, **arguments)
        except SpikelmError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise SpikelmError(
                f"neuron_arguments {dict(self.neuron_arguments)} do not fit {self.neuron}: {error}"
            ) from error


PRESETS: dict[str, Recipe] = {
    # Before every fully connected unit of a Llamba block
    "mar": Recipe(
        {
            "mixer_in": ("*.mixer.in_proj",),
            "mixer_out": ("*.mixer.out_proj",),
            "ffn_in": ("*.mlp.gate_proj", "*.mlp.up_proj"),
            "ffn_out": ("*.mlp.down_proj",),
        }
    ),
    # The same places of a Llama that keeps its attention
    "llama": Recipe(
        {
            "attention_in": ("*.self_attn.q_proj", "*.self_attn.k_proj", "*.self_attn.v_proj"),
            "attention_out": ("*.self_attn.o_proj",),
            "ffn_in": ("*.mlp.gate_proj", "*.mlp.up_proj"),
            "ffn_out": ("*.mlp.down_proj",),
        }
    ),
    # The two projections of a Mamba-2 mixer: transformers' Mamba2ForCausalLM, and a Llamba, whose MLP stays dense
    "spikingmamba": Recipe({"mixer_in": ("*.mixer.in_proj",), "mixer_out": ("*.mixer.out_proj",)}, "TILIF"),
}


def spikify(model: nn.Module, recipe: Recipe | str) -> nn.Module:
    """Replaces, in place, the projections that ``recipe`` names by SpikingLinear; returns the model.

    Thresholds start at the neuron's v_threshold: run :func:`spikelm.calibrate` next. A transformers model remembers the
    recipe in its configuration, so save_pretrained / from_pretrained keep it.

    Args:
        recipe: a Recipe, or the name of a preset.

    Raises:
        SpikelmError: a pattern matches no nn.Linear, two sites claim one projection, the projections of a bank differ
            in their input size, one is a BitLinear of other weights than the recipe's, or the model is spiking already.
            The model is then unchanged.
    """
    recipe = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
    if recipe.deployed:
        raise SpikelmError("the recipe is a deployed model's: spikify takes the training form, deploy makes the other")
    if any(isinstance(module, SpikingLinear) for module in model.modules()):
        raise SpikelmError("the model is spiking already; spikify a dense model")
    banks = _find_banks(model, recipe)
    for names in banks:
        owner: SpikingLinear | None = None
        for name in names:
            linear = cast(nn.Linear, model.get_submodule(name))
            neuron = owner.neuron if owner else recipe.make_neuron(linear.in_features).to(linear.weight.device)
            layer = SpikingLinear.from_linear(linear, neuron, owner, recipe.weights, recipe.per_row)
            owner = owner or layer
            model.set_submodule(name, layer)
    forbid_bypass(model)
    remember(model, recipe)
    return model


def remember(model: nn.Module, recipe: Recipe) -> None:
    """Keeps the recipe with the model, and in its configuration if it is a transformers model."""
    model._spiking_recipe = recipe  # type: ignore[assignment]  # nn.Module types attributes as tensors or modules
    config: Any = getattr(model, "config", None)
    if config is not None:
        from spikelm.checkpoint import SpikingConfig

        config.quantization_config = SpikingConfig(recipe.to_dict())


def recipe_of(model: nn.Module) -> Recipe | None:
    """The recipe a model was made spiking with; None for a dense model."""
    return getattr(model, "_spiking_recipe", None)


def spike_sites(model: nn.Module) -> dict[str, SpikingLinear]:
    """Module name -> the projection that owns a bank of neurons, one entry per bank, in module order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SpikingLinear) and m.owns_neuron}


def projections_of(model: nn.Module, owner: SpikingLinear) -> list[SpikingLinear]:
    """Every projection behind the bank of ``owner``, the owner first."""
    return [m for m in model.modules() if isinstance(m, SpikingLinear) and m.neuron is owner.neuron]


@torch.no_grad()
def fold_threshold(model: nn.Module, owner: SpikingLinear, v_threshold: torch.Tensor) -> None:
    """Sets V [in_features] of a bank and folds it into the weights behind it, W[:, c] <- W[:, c] V_c.

    The projections then compute W (V s) with plain accumulation of W's columns. Only for weights not yet folded. Of
    binary and ternary weights W are the masters.

    Raises:
        SpikelmError: packed weights, whose masters are gone.
    """
    if any(layer.packed for layer in projections_of(model, owner)):
        raise SpikelmError("the weights behind this bank are packed: no threshold can be folded into them any more")
    owner.neuron.v_threshold = v_threshold
    for layer in projections_of(model, owner):
        layer.weight.mul_(v_threshold.to(layer.weight.dtype))


def _find_banks(model: nn.Module, recipe: Recipe) -> list[list[str]]:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    banks: dict[tuple[str, str], list[str]] = {}
    claimed: dict[str, str] = {}
    for site, patterns in recipe.sites.items():
        for pattern in patterns:
            names = [name for name in linears if fnmatchcase(name, pattern)]
            if not names:
                shown = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none"
                raise SpikelmError(f"site {site!r}: pattern {pattern!r} matches no nn.Linear; the model has {shown}")
            for name in names:
                if claimed.setdefault(name, site) != site:
                    raise SpikelmError(f"sites {claimed[name]!r} and {site!r} both claim {name}")
                _check_weights(name, linears[name], recipe)
                bank = banks.setdefault((name.rpartition(".")[0], site), [])
                if name not in bank:
                    bank.append(name)
    for (_, site), names in banks.items():
        sizes = {linears[name].in_features for name in names}
        if len(sizes) > 1:
            raise SpikelmError(f"site {site!r}: {', '.join(names)} have no common input size: {sorted(sizes)}")
    return list(banks.values())


def _check_weights(name: str, linear: nn.Linear, recipe: Recipe) -> None:
    """Weights that are quantised already stay as they are, or it is an error."""
    if not isinstance(linear, BitLinear):
        return
    own = "packed" if linear.packed else (linear.weights, linear.per_row)
    if own != (recipe.weights, recipe.per_row):
        raise SpikelmError(
            f"{name} is a BitLinear, {linear}; the recipe wants {recipe.weights}, per_row={recipe.per_row}"
        )


def _surrogate(specification: Any) -> Any:
    """The surrogate of SpikingJelly that a name, or a mapping with "name" and numbers, stands for."""
    if not isinstance(specification, str | Mapping):
        raise SpikelmError(f"surrogate_function must be a name or a mapping with one; got {specification!r}")
    arguments = {} if isinstance(specification, str) else {k: v for k, v in specification.items() if k != "name"}
    name = specification if isinstance(specification, str) else specification.get("name")
    from spikingjelly.activation_based import surrogate

    surrogate_class = getattr(surrogate, name, None) if isinstance(name, str) else None
    if not (isinstance(surrogate_class, type) and issubclass(surrogate_class, nn.Module)):
        raise SpikelmError(f"surrogate_function must name a class of spikingjelly's surrogate module; got {name!r}")
    if not all(isinstance(value, int | float) and abs(value) <= _LARGEST_ARGUMENT for value in arguments.values()):
        raise SpikelmError(
            f"the arguments of the surrogate {name} must be numbers within +-{_LARGEST_ARGUMENT:g}; got {arguments!r}"
        )
    try:
        function: Any = surrogate_class(**arguments)
        x = torch.linspace(-2, 2, 9, device="cpu").requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(function(x).sum(), x)
    except TypeError:  # arguments that it does not have: said with the neuron's
        raise
    except Exception as error:  # each class in its own way, assertions among them; the cause stays chained
        raise SpikelmError(f"the surrogate {name} does not run with {arguments!r}: {error}") from error
    if not bool(gradient.isfinite().all()):
        raise SpikelmError(f"the surrogate {name} has a gradient that is not finite with {arguments!r}")
    return function
