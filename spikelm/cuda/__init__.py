"""The kernels of cuda/steps.cuh on an NVIDIA GPU, built by NVRTC through CuPy."""
