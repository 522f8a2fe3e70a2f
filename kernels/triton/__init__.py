"""Triton kernels and their launchers: they know tensors, not autograd, modules or dispatch."""
