"""Neurons for SpikingJelly networks. Needs torch and spikingjelly alone."""

try:
    import spikingjelly.activation_based.base  # noqa: F401
except ImportError as error:
    raise ImportError(
        "spikelm.neurons needs SpikingJelly: pip install --no-deps spikingjelly==2.0.0 "
        "(--no-deps keeps the installed torch; see docs/install.md)"
    ) from error

from spikelm.neurons.atmn import ATMN

__all__ = ["ATMN"]
