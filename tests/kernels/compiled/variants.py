"""What an op file of this folder lists: the calls that ship, and what their kernels may cost."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tests import ROOT
from tests.kernels.compiled.sass import Instruction

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Region:
    """Machine code that is counted: a kernel without its padding, or one of its innermost loops."""

    kernel: str
    constexprs: Mapping[str, Any]  # of a Triton kernel
    threads: int | None  # of a Triton kernel: in a program
    instructions: Sequence[Instruction]

    def count(self, opcode: str) -> int:
        """How many instructions have this opcode, or begin with it and a dot."""
        return sum(f"{i.opcode}.".startswith(f"{opcode}.") for i in self.instructions)


@dataclass(frozen=True)
class Kernel:
    """What is expected of a kernel; the ceilings that may move are in budgets.json."""

    #: How many elements a thread handles in one pass through the region. The compiler may have
    #: unrolled a loop: count its loads or its tensor-core instructions to tell.
    elements: Callable[[Region], float]
    #: Count the innermost loops (those with tensor-core instructions, if any has), not the kernel.
    loop: bool = False
    tensor_cores: bool = False
    #: By architecture, instructions an element that must not be passed whatever the budget says.
    at_most: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A call of a launcher, on meta tensors."""

    name: str
    call: Callable[[], object]
    kernels: Mapping[str, Kernel]  # everything it may launch


@dataclass(frozen=True)
class Extra:
    """What a variant may cost beyond another: instructions an element of one kernel's regions."""

    variant: str
    beyond: str
    kernel: str
    at_most: Mapping[int, float]  # by architecture
    #: Whether it may pass values between threads, by shuffles or shared memory, more often.
    may_exchange: bool = True


@dataclass(frozen=True)
class Source:
    """A CUDA file; its kernels go by their names without namespaces and template arguments."""

    path: Path
    kernels: Mapping[str, Kernel]

    @property
    def name(self) -> str:
        return self.path.name


def shipped_ops() -> list[str]:
    """The modules of kernels/triton that launch kernels, and the extension's sources."""
    modules = sorted((ROOT / "kernels" / "triton").glob("*.py"))
    return [path.stem for path in modules if launches_kernels(path.read_text("utf-8"))] + ["csrc"]


def launches_kernels(source: str) -> bool:
    """Whether ``kernel[grid](...)`` occurs."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return any(isinstance(call.func, ast.Subscript) for call in calls)


def load(op: str) -> ModuleType:
    try:
        return importlib.import_module(f"tests.kernels.compiled.{op}")
    except ModuleNotFoundError as error:
        if error.name != f"tests.kernels.compiled.{op}":
            raise
        raise LookupError(
            f"{op} launches kernels, but there is no tests/kernels/compiled/{op}.py"
        ) from None


def listed(op: str) -> dict[str, Variant | Source]:
    """What the file of ``op`` lists, by name."""
    module = load(op)
    works = [*getattr(module, "VARIANTS", ()), *getattr(module, "SOURCES", ())]
    by_name = {work.name: work for work in works}
    if len(by_name) != len(works):
        raise ValueError(f"tests/kernels/compiled/{op}.py lists two variants of one name")
    return by_name
