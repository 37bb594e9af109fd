"""Triton from the kernel IR: printing, the functions that printed kernels call, and running a step of them."""
