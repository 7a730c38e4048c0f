"""The kernels of cuda/steps.cuh on a CPU, built by the system's C++ compiler."""
