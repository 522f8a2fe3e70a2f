"""Compile every kernel that ships for sm_80, sm_90 and sm_100 and hold it to its budget.

    python -m tests.kernels.compiled [OP ...] [--only NAME] [--arch 90] [--write]

Needs the Triton wheel, no GPU. Fails where a kernel spills, lacks a tensor-core instruction, passes
a ceiling of budgets.json or has none. ``--write`` puts what was measured there, with headroom.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

if find_spec("triton") is None:
    sys.exit("the kernel report needs the Triton wheel, which there is for Linux alone")

from tests.kernels.compiled.command import main

if __name__ == "__main__":
    sys.exit(main())
