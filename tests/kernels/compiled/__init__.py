"""The compile gate: what GPU kernels cost, counted in the machine code they compile to.

It needs the Triton wheel and no GPU. ``python -m tests.kernels.compiled`` runs it, in processes of
their own, because what stands in for a GPU changes Triton and torch for the whole process.
"""
