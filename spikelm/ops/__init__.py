"""Definitions and kernels below the modules: neuron dynamics, surrogates, the SSD scan."""
