"""spikelm: neurons, layers and distilled students for spiking language models.

Importing it registers the models and the spiking checkpoint format with transformers, where that is installed.
"""

import warnings
from importlib.util import find_spec
from typing import Any

__version__ = "0.1.0"
__all__ = ["Recipe", "calibrate", "deploy", "spikify", "use_backend"]

if find_spec("spikingjelly") is not None:
    from spikelm.ops.multistep import use_backend

_reason = "they are not installed"
if find_spec("transformers") is not None and find_spec("spikingjelly") is not None:
    try:
        import spikelm.checkpoint
        import spikelm.models  # noqa: F401
        from spikelm.calibrate import calibrate
        from spikelm.convert import Recipe, spikify
        from spikelm.deploy import deploy
    except ImportError as error:  # an older transformers; the neurons work without it
        _reason = str(error)
        warnings.warn(f"spikelm's models and checkpoints are not available: {error}", stacklevel=2)


def __getattr__(name: str) -> Any:
    if name in __all__:
        raise ImportError(
            f"spikelm.{name} needs transformers and SpikingJelly ({_reason}): pip install 'spikelm[hf]' and "
            "pip install --no-deps spikingjelly==2.0.0 (see docs/install.md)"
        )
    raise AttributeError(f"module 'spikelm' has no attribute {name!r}")
