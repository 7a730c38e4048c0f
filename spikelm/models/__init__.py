"""Spiking students as transformers models; importing this registers them with the Auto classes."""

from spikelm.models.llamba import LlambaConfig, LlambaForCausalLM, LlambaModel

__all__ = ["LlambaConfig", "LlambaForCausalLM", "LlambaModel"]
