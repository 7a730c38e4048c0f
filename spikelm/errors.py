"""The one exception a user is meant to see."""


class SpikelmError(ValueError):
    """Bad input, said in one line: what was given and what is accepted."""
