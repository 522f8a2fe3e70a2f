"""Compile every kernel that ships for sm_80, sm_90 and sm_100 and hold it to its budget.

    python tests/compiled/report.py [OP ...] [--only NAME] [--arch 90] [--write]

Needs the Triton wheel, no GPU. Fails where a kernel spills, lacks a tensor-core instruction, passes
a ceiling of budgets.json or has none. ``--write`` puts what was measured there, with headroom.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("triton") is None:
    sys.exit("report.py needs the Triton wheel, which there is for Linux alone")
sys.path.insert(0, str(Path(__file__).parents[1]))

from compiled.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
