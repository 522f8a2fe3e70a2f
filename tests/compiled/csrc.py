"""The extension's CUDA kernels, each with what it may cost."""

from __future__ import annotations

from compiled.variants import ROOT, Kernel, Source

#: By name, without namespaces and template arguments; how many elements a thread handles may
#: depend on the arguments, which ``Region.kernel`` shows.
KERNELS: dict[str, Kernel] = {}

SOURCES = [Source(path, KERNELS) for path in sorted((ROOT / "csrc").glob("*.cu"))]
