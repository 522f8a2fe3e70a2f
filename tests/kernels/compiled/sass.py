"""Machine code as ``nvdisasm`` and ``cuobjdump`` print it: instructions, loops, resources."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:(?P<guard>@!?U?P\w+)\s+)?"
    r"(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
)
RESOURCES = re.compile(r"^\s*Function (\S+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", re.MULTILINE)

#: mma.sync on sm_80 (HMMA, ...), wgmma on sm_90 (HGMMA, ...), tcgen05 on sm_100 (UTCHMMA, ...)
TENSOR_CORE = re.compile(r"(UTC[A-Z]*|[A-Z])G?MMA")
SPILL = re.compile(r"LDL|STL")
EXCHANGE = re.compile(r"SHFL|STS|LDS|STSM|LDSM")
GLOBAL_ACCESS = re.compile(r"LDG|STG|LDGSTS")
WIDE = re.compile(r"\.(128|256)\b")

#: On every architecture since 7.0.
INSTRUCTION_BYTES = 16

#: The most instructions of a loop that only waits for a barrier.
LONGEST_WAIT = 8


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers: LDG.E.128
    operands: str = ""
    guarded: bool = False  # runs only where a predicate holds

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a direct branch goes."""
        if self.base not in ("BRA", "JMP"):
            return None
        address = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(address[1], 16) if address else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow. A branch can also carry a second predicate."""
        if self.base in ("BRA", "JMP"):
            return self.guarded or not self.operands.strip().startswith("0x")
        return self.guarded or self.base not in ("EXIT", "RET", "BRX", "JMX")

    @property
    def is_padding(self) -> bool:
        """NOPs, and the branch to itself that ends every function."""
        return self.base == "NOP" or (self.target == self.address and not self.guarded)


Code = Sequence[Instruction]


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int
    shared: int  # bytes of static shared memory, with what the system reserves


def parse(text: str) -> list[Instruction]:
    return [
        Instruction(
            int(found["address"], 16),
            found["opcode"],
            found["operands"].strip(),
            found["guard"] is not None,
        )
        for found in map(INSTRUCTION.match, text.splitlines())
        if found
    ]


def functions_in(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """The mangled name and the machine code of every function in a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, of_names = struct.unpack_from("<3H", cubin, 0x3A)
    # Of each: name, type, flags, address, offset, size.
    sections = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)]
    names = sections[of_names][4]
    for name, _, _, _, offset, length in sections:
        start = names + name
        title = cubin[start : cubin.index(b"\0", start)].decode()
        if title.startswith(".text."):
            yield title.removeprefix(".text."), cubin[offset : offset + length]


def parse_resources(text: str) -> dict[str, Resources]:
    return {name: Resources(*map(int, numbers)) for name, *numbers in RESOURCES.findall(text)}


def tensor_cores(code: Code) -> str | None:
    """The kinds of tensor-core instruction in ``code``, None without any."""
    return "+".join(sorted({i.base for i in code if TENSOR_CORE.fullmatch(i.base)})) or None


def spills(code: Code) -> int:
    """Loads from and stores to local memory: spilled registers, and arrays that found none."""
    return sum(SPILL.fullmatch(i.base) is not None for i in code)


def global_accesses(code: Code) -> tuple[int, int]:
    """How many loads and stores of global memory there are, and how many of 16 bytes or more."""
    accesses = [i for i in code if GLOBAL_ACCESS.fullmatch(i.base)]
    return len(accesses), sum(WIDE.search(i.opcode) is not None for i in accesses)


def exchanges(code: Code) -> int:
    """How many instructions pass values between threads: shuffles, and shared memory."""
    return sum(EXCHANGE.fullmatch(i.base) is not None for i in code)


def without_padding(code: Code) -> list[Instruction]:
    return [i for i in code if not i.is_padding]


def counted_regions(code: Code, loop: bool) -> list[list[Instruction]]:
    """The whole function, or its innermost loops: those with tensor-core work if any has it.

    A loop that only waits for a barrier is no loop here; inside another it is a part of that.
    """
    if not loop:
        return [without_padding(code)]
    loops = natural_loops(code)
    waits = [nodes for nodes in _innermost(loops) if _waits([code[i] for i in nodes])]
    working = [nodes for nodes in loops if nodes not in waits]
    busy = [nodes for nodes in working if tensor_cores([code[i] for i in nodes])]
    return [
        without_padding([code[i] for i in sorted(nodes)]) for nodes in _innermost(busy or working)
    ]


def _innermost(loops: list[frozenset[int]]) -> list[frozenset[int]]:
    return [nodes for nodes in loops if not any(other < nodes for other in loops)]


def _waits(code: Code) -> bool:
    return len(code) <= LONGEST_WAIT and any(i.base == "SYNCS" for i in code)


def natural_loops(code: Code) -> list[frozenset[int]]:
    """Loops as sets of instruction numbers, in the order of their heads.

    A branch backwards makes a loop only where its target is on every path to it. A cold block at
    the end of a function, which jumps back to where it was left, makes none.
    """
    starts = _block_starts(code)
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    successors = _successors(code, blocks)
    dominators = _dominators(successors)
    bodies: dict[int, set[int]] = {}
    for tail, heads in enumerate(successors):
        for head in heads:
            if tail in dominators and head in dominators[tail]:
                bodies.setdefault(head, {head}).update(_body(head, tail, successors))
    return [
        frozenset(i for block in body for i in blocks[block]) for _, body in sorted(bodies.items())
    ]


def _block_starts(code: Code) -> list[int]:
    index = {instruction.address: i for i, instruction in enumerate(code)}
    starts = {0} if code else set()
    for i, instruction in enumerate(code):
        if instruction.target in index:
            starts.add(index[instruction.target])
        ends_block = instruction.target is not None or not instruction.falls_through
        if ends_block and i + 1 < len(code):
            starts.add(i + 1)
    return sorted(starts)


def _successors(code: Code, blocks: list[range]) -> list[set[int]]:
    block_at = {code[block.start].address: number for number, block in enumerate(blocks)}
    successors = []
    for number, block in enumerate(blocks):
        last = code[block.stop - 1]
        following = {block_at[last.target]} if last.target in block_at else set()
        if last.falls_through and number + 1 < len(blocks):
            following.add(number + 1)
        successors.append(following)
    return successors


def _dominators(successors: list[set[int]]) -> dict[int, set[int]]:
    """The blocks on every path to a block, for every block that can be reached."""
    reached = _reach({0} if successors else set(), successors)
    predecessors = _reversed(successors)
    dominators = {block: set(reached) for block in reached}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached):
            arriving = [dominators[p] for p in predecessors[block] if p in reached]
            common = set.intersection(*arriving) if arriving and block else set()
            if common | {block} != dominators[block]:
                dominators[block] = common | {block}
                changed = True
    return dominators


def _body(head: int, tail: int, successors: list[set[int]]) -> set[int]:
    """The blocks from which ``tail`` is reached without passing ``head``."""
    backwards = _reversed(successors)
    backwards[head] = set()
    return _reach({tail}, backwards)


def _reach(start: set[int], successors: list[set[int]]) -> set[int]:
    reached, pending = set(start), list(start)
    while pending:
        for block in successors[pending.pop()] - reached:
            reached.add(block)
            pending.append(block)
    return reached


def _reversed(successors: list[set[int]]) -> list[set[int]]:
    predecessors: list[set[int]] = [set() for _ in successors]
    for block, following in enumerate(successors):
        for successor in following:
            predecessors[successor].add(block)
    return predecessors
