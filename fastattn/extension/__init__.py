"""The extension ``fastattn._C``: csrc's functions on tensors, backends ``cpu`` and ``cuda``."""
