"""The way to NIR: a network whose spikelm neurons are SpikingJelly's own, which its exporter knows."""

from __future__ import annotations

import copy

from torch import nn

from spikelm.errors import SpikelmError
from spikelm.neurons import BinaryIF
from spikelm.ops.dynamics import Dynamics

# isort: split
# Last: where SpikingJelly is missing, spikelm.neurons says how to install it.
from spikingjelly.activation_based import neuron

__all__ = ["to_spikingjelly"]


def to_spikingjelly(net: nn.Module) -> nn.Module:
    """A copy of ``net`` with SpikingJelly's node in the place of every spikelm neuron, for export and inference.

    ``spikingjelly.activation_based.nir_exchange.export_to_nir`` (SpikingJelly 2) then takes the copy. NIR can say
    BinaryIF with a hard reset and a single fixed threshold: with beta = 1 it becomes IFNode, with beta < 1 and
    v_reset = 0 LIFNode with tau = 1 / (1 - beta) and decay_input=False, which agrees to rounding. The new nodes begin
    at rest and have SpikingJelly's default surrogate.

    Raises:
        SpikelmError: a neuron that NIR cannot say; names its path in ``net`` and the reason.
    """
    nodes = {}
    for path, module in net.named_modules():
        dynamics = getattr(module, "dynamics", None)
        if isinstance(dynamics, Dynamics):  # also the snnTorch adapters, and neurons that others built in this way
            reason = _why_not(module, dynamics)
            if reason is not None:
                name = f"{type(module).__module__}.{type(module).__name__}"
                raise SpikelmError(f"{path or 'the network'}: NIR cannot say {name} with {reason}")
            assert isinstance(module, BinaryIF)
            nodes[id(module)] = _node(module)
    return copy.deepcopy(net, nodes)  # deepcopy puts these in the place of the neurons, wherever they are


def _node(module: BinaryIF) -> nn.Module:
    arguments = {
        "v_threshold": module.v_threshold,
        "v_reset": module.v_reset,
        "detach_reset": module.detach_reset,
        "step_mode": module.step_mode,
        "store_v_seq": module.store_v_seq,
    }
    if module.beta == 1:
        return neuron.IFNode(**arguments).train(module.training)
    return neuron.LIFNode(tau=1 / (1 - module.beta), decay_input=False, **arguments).train(module.training)


def _why_not(module: nn.Module, dynamics: Dynamics) -> str | None:
    """What NIR, by way of SpikingJelly's nodes, has no word for; None if there is nothing."""
    if dynamics.fire != "binary":
        return f"{dynamics.fire} spikes: NIR's neurons have spikes of 0 and 1"
    if type(module) is not BinaryIF:
        return "equations of its own: spikelm.neurons.BinaryIF alone is converted"
    if not getattr(module.surrogate_function, "spiking", True):
        return "a smooth primitive in the place of spikes (a surrogate_function with spiking=False)"
    if module.v_reset is None:
        return "a soft reset (v_reset=None): NIR's neurons reset to a value"
    if module.a is not None:
        return "a per-channel or learned threshold: SpikingJelly's nodes have a single fixed one"
    if module.beta > 1:
        return f"beta={module.beta:g}: NIR's neurons leak or hold, they do not grow"
    if module.beta < 1 and module.v_reset != 0:
        return f"beta={module.beta:g} and v_reset={module.v_reset:g}: LIFNode leaks towards v_reset, this towards 0"
    if module.beta < 1 and not 1 / (1 - module.beta) > 1:
        return f"beta={module.beta:g}: LIFNode's tau, 1 / (1 - beta), must be greater than 1"
    return None
