"""spikelm: neurons, layers and distilled students for spiking language models.

Importing it registers the models and the spiking checkpoint format with transformers, where that is installed.
"""

from importlib.util import find_spec
from typing import Any

__version__ = "0.1.0"
__all__ = ["Recipe", "calibrate", "spikify"]

if find_spec("transformers") is not None and find_spec("spikingjelly") is not None:
    import spikelm.checkpoint
    import spikelm.models  # noqa: F401
    from spikelm.calibrate import calibrate
    from spikelm.convert import Recipe, spikify
else:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError(
                f"spikelm.{name} needs transformers and SpikingJelly: pip install 'spikelm[hf]' and "
                "pip install --no-deps spikingjelly==2.0.0 (see docs/install.md)"
            )
        raise AttributeError(f"module 'spikelm' has no attribute {name!r}")
