"""The extension's CUDA kernels, each with what it may cost."""

from __future__ import annotations

import re

from tests.kernels.compiled.variants import ROOT, Kernel, Region, Source

GROUP = 8  # adjacent columns, kept in registers together


def elements_of_a_row(region: Region) -> float:
    """The last template argument counts the groups of columns that a thread owns."""
    (groups,) = re.findall(r"(\d+)>", region.kernel)
    return GROUP * int(groups)


def one_group(region: Region) -> float:
    return GROUP


#: By name, without namespaces and template arguments; how many elements a thread handles may
#: depend on the arguments, which ``Region.kernel`` shows. All the code counts, also that for types,
#: tensors and sums that a call has not: a call in bfloat16 with dropout runs less than half of
#: backward's.
KERNELS: dict[str, Kernel] = {
    "forward_rows": Kernel(elements_of_a_row),
    "backward_rows": Kernel(elements_of_a_row),
    "branch_rows": Kernel(lambda region: 2 * GROUP),
    "forward_wide": Kernel(one_group),
    "backward_wide": Kernel(one_group),
    "column_sums": Kernel(lambda region: 1),
}

SOURCES = [Source(path, KERNELS) for path in sorted((ROOT / "csrc").glob("*.cu"))]
