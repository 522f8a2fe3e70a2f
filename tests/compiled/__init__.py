"""The compile gate: what GPU kernels cost, counted in the machine code they compile to.

It needs the Triton wheel and no GPU. ``report.py`` runs it, in a process of its own, because what
stands in for a GPU changes Triton and torch for the whole process.
"""
