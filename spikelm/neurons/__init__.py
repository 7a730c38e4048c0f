"""Neurons for SpikingJelly networks. Needs torch and spikingjelly alone."""

try:
    import spikingjelly.activation_based.base  # noqa: F401
except ImportError as error:
    raise ImportError(
        "spikelm.neurons needs SpikingJelly: pip install --no-deps spikingjelly==2.0.0 "
        "(--no-deps keeps the installed torch; see docs/install.md)"
    ) from error

from spikelm.neurons.atmn import ATMN
from spikelm.neurons.base import DynamicsNode, set_backend
from spikelm.neurons.binary_if import BinaryIF
from spikelm.neurons.tilif import TILIF, anneal_sgc

__all__ = ["ATMN", "TILIF", "BinaryIF", "DynamicsNode", "anneal_sgc", "set_backend"]
