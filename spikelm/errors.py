"""The exception and the warning that spikelm raises itself."""

import warnings

import torch

_SAID: set[str] = set()


class SpikelmError(ValueError):
    """Bad input; the message names what was given and what is accepted."""


class SpikelmWarning(UserWarning):
    """Something runs in another way than the quickest one."""


def warn_once(message: str) -> None:
    """A SpikelmWarning, at its first call with this message in the process; nothing while torch.compile traces."""
    if not torch.compiler.is_compiling() and message not in _SAID:
        _SAID.add(message)
        warnings.warn(message, SpikelmWarning, stacklevel=3)
