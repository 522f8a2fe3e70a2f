"""The compile gate: every kernel that ships keeps to its budget, and faults do not get past it.

The kernels are compiled in processes of their own, by ``python -m tests.kernels.compiled``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest

from tests import ROOT

triton = pytest.importorskip(
    "triton", reason="the compile gate needs the Triton wheel, which Linux has"
)

from tests.kernels.compiled import budgets, command, layouts, measure, sass, variants  # noqa: E402

FOLDER = Path(__file__).parent
FIXTURES = FOLDER / "fixtures"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc; none here")


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.kernels.compiled", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


# Slow (a compiler runs for every kernel, type and architecture), and the one test that knows what
# the kernels cost.
def test_every_kernel_that_ships_keeps_to_its_budget() -> None:
    written_with = budgets.read(budgets.PATH)["triton"]
    if triton.__version__ != written_with:
        pytest.skip(f"budgets are of Triton {written_with}; this is {triton.__version__}")
    done = report()
    assert done.returncode == 0, done.stdout + done.stderr


def table_rows(output: str) -> dict[tuple[str, int], list[str]]:
    """Cells right of the architecture, by kernel and architecture."""
    rows = re.findall(r"^(\S.*?)\s+(80|90|100)\s{2,}(.*)$", output, re.MULTILINE)
    return {(name, int(arch)): re.split(r"\s{2,}", cells) for name, arch, cells in rows}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What is reported of sound kernels once their budgets are written, and the budgets."""
    path = tmp_path_factory.mktemp("budgets") / "budgets.json"
    written = report("planted_sound", "--budgets", path, "--write")
    assert written.returncode == 0, written.stdout + written.stderr
    return written.stdout, path


def test_report_of_sound_kernels(sound: tuple[str, Path]) -> None:
    rows = table_rows(sound[0])
    kinds = {arch: rows["product: matmul_kernel", arch][5] for arch in (80, 90, 100)}
    assert kinds == {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
    assert {cells[1] for cells in rows.values()} == {"0"}  # stack
    assert {cells[2] for cells in rows.values()} == {"0"}  # spills
    # Two stages of two 128 x 64 tiles of bf16 on sm_80; three where the tensor cores read them.
    assert rows["product: matmul_kernel", 80][3:5] == ["65536", "166912"]
    assert rows["product: matmul_kernel", 90][3:5] == ["98304", "232448"]
    assert rows["row sum: row_sum_kernel", 90][7] == "20.0"  # its target
    assert rows["row sum: row_sum_kernel", 80][7] == "-"


@needs_nvcc
def test_dropout_contract_compiles_for_the_gpu(sound: tuple[str, Path]) -> None:
    rows = table_rows(sound[0])
    kernel = "sound.cu: fastattn::adjacent_decisions"
    # Seven rounds are 14 wide products, 14 xors of three inputs and two steps of the key, shared by
    # eight elements; taking their lanes apart costs as much again.
    counts = [float(rows[kernel, arch][6]) for arch in (80, 90, 100)]
    assert all(5 <= count <= 16 for count in counts)


def test_written_budgets_have_a_little_headroom(sound: tuple[str, Path]) -> None:
    rows = table_rows(sound[0])
    written = json.loads(sound[1].read_text())["budgets"]["planted_sound"]
    for name, kernel in (("product", "matmul_kernel"), ("row sum", "row_sum_kernel")):
        for arch in (80, 90, 100):
            cells, budget = rows[f"{name}: {kernel}", arch], written[name][f"sm_{arch}"][kernel]
            assert 0 <= budget["registers"] - int(cells[0]) < 8
            assert 0 <= budget["shared"] - int(cells[3]) < 1024
            assert -0.05 <= budget["instructions"][0] - float(cells[6]) <= 0.55


def test_planted_faults_fail_the_gate(tmp_path: Path) -> None:
    """One run: what is wrong is said with variant, architecture, figure and ceiling."""
    row_sum = {"registers": 64, "shared": 1024, "instructions": [9.0], "tensor_cores": None}
    tight = {"registers": 8, "shared": 0, "instructions": [0.5], "tensor_cores": "HGMMA"}
    kernels = {
        "over target": {"row_sum_kernel": row_sum},
        "over budget": {"row_sum_kernel": tight},
        "one launch fewer": {"row_sum_kernel": row_sum, "row_sum_kernel#2": row_sum},
        "no such variant": {"row_sum_kernel": row_sum},
    }
    path = tmp_path / "budgets.json"
    budgets.write(
        path,
        {
            "triton": "0.0",
            "budgets": {"planted_faults": {name: {"sm_90": k} for name, k in kernels.items()}},
        },
    )
    done = report("planted_faults", "absent", "--arch", "90", "--budgets", path)
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    expected = [
        r"the budgets were written with triton 0\.0",
        r"absent launches kernels, but there is no tests/kernels/compiled/absent\.py",
        r"planted_faults, no such variant: a budget without a variant",
        r"spills, sm_90, matmul_kernel: \d+ bytes of stack, the ceiling is 0",
        r"spills, sm_90, matmul_kernel: \d+ loads and stores of spilled registers, "
        r"the ceiling is 0",
        r"no tensor cores, sm_90, matmul_kernel: no tensor-core instruction",
        r"too much shared memory, sm_90, matmul_kernel: 262144 bytes of shared memory, "
        r"the limit is 232448",
        r"over target, sm_90, row_sum_kernel: [\d.]+ instructions an element, the target is 1",
        r"over budget, sm_90, row_sum_kernel: \d+ registers, the ceiling is 8",
        r"over budget, sm_90, row_sum_kernel: 16 bytes of shared memory, the ceiling is 0",
        r"over budget, sm_90, row_sum_kernel: [\d.]+ instructions an element, the ceiling is 0\.5",
        r"over budget, sm_90, row_sum_kernel: tensor-core instructions: None, "
        r"the budget has HGMMA",
        r"one launch fewer, sm_90: a budget for row_sum_kernel#2, which is not launched",
        r"no budget, sm_90, row_sum_kernel: no budget; --write makes one",
        r"kernel not listed, sm_90: LookupError: row_sum_kernel is not among the kernels",
        r"no launch, sm_90: LookupError: the call launches no kernel",
        r"waits for the device, sm_90: RuntimeError: .*cannot be called on meta tensors",
        r"no loop, sm_90: LookupError: row_sum_kernel has no loop to count",
        r"autotuned, sm_90: RuntimeError: an autotuned kernel cannot be timed here",
        r"over budget, sm_90, row_sum_kernel, beyond no budget: 0 instructions an element, "
        r"the target is -1",
    ]
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):  # mended there
        expected += [
            r"planted_faults, depth 16, masked_product_kernel, sm_90: "
            r"an operand of 32 x 16 with kWidth 8",
            r"planted_faults, depth 16, masked_product_kernel, sm_90: "
            r"an operand of 16 x 32 with kWidth 8",
        ]
    if shutil.which("nvcc"):
        expected += [
            r"spilling\.cu, sm_90, stir<float>: \d+ bytes of stack, the ceiling is 0",
            r"spilling\.cu, sm_90, stir<float>: \d+ loads and stores of spilled registers",
        ]
    assert done.returncode == 1, done.stdout + done.stderr
    for pattern in expected:
        assert any(re.search(pattern, line) for line in failures), f"{pattern}\n{done.stdout}"
    # Nothing else is wrong: beside these, the four that have no budget of their own say so.
    without_budget = sum("no budget; " in line for line in failures)
    assert len(failures) == len(expected) - 1 + without_budget


def test_writing_cannot_allow_what_code_forbids(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    done = report(
        *("planted_faults", "--only", "over target", "--arch", "90", "--write"),
        *("--budgets", path),
    )
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    assert done.returncode == 1
    assert len(failures) == 1 and "the target is 1" in failures[0]


# Layouts

TTGIR = """
#blocked = #ttg.blocked<{sizePerThread = [1, 8]}>
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [1, 8]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1]}>
    %x = tt.dot %a, %b, %c : LEFT * RIGHT -> tensor<64x32xf32, #mma> loc(#loc)
"""


@pytest.mark.parametrize(
    ("left", "right", "found"),
    [
        ("64x16 0 #mma 8", "16x32 1 #mma 8", ["64 x 16 with kWidth 8", "16 x 32 with kWidth 8"]),
        ("64x16 0 #mma 4", "16x32 1 #mma 4", []),
        ("16x32 0 #mma 8", "32x16 1 #mma 8", []),
        ("64x16 0 #mma1 8", "16x32 1 #mma1 8", []),
        ("64x16 0 #blocked", "16x32 1 #blocked", []),
    ],
)
def test_operands_longer_than_their_product(left: str, right: str, found: list[str]) -> None:
    text = TTGIR
    for side, operand in (("LEFT", left), ("RIGHT", right)):
        shape, index, parent, *width = operand.split()
        layout = ", ".join(
            [f"opIdx = {index}, parent = {parent}", *(f"kWidth = {w}" for w in width)]
        )
        text = text.replace(side, f"tensor<{shape}xbf16, #ttg.dot_op<{{{layout}}}>>")
    assert layouts.overlong(text) == found
    with pytest.raises(ValueError, match="a product is written in another way"):
        layouts.overlong(text.replace("dot_op", "dot_operand"))


# Machine code


def addresses(code: sass.Code, numbers: frozenset[int]) -> list[int]:
    return [code[i].address for i in sorted(numbers)]


def test_instructions_of_a_disassembly() -> None:
    text = (FIXTURES / "product_sm100.sass").read_text()
    code = sass.parse(text)
    by_address = {i.address: i for i in code}
    assert by_address[0x0].opcode == "LDC" and by_address[0x30].target == 0x280
    assert by_address[0x30].falls_through  # @P1 BRA
    assert by_address[0x1B0].falls_through  # BRA.U !UP0
    assert not by_address[0x220].falls_through  # BRA
    assert not by_address[0x2470].falls_through  # EXIT
    assert by_address[0x2570].is_padding and by_address[0x2580].is_padding
    assert by_address[0x260].target is None and by_address[0x260].falls_through  # CALL
    assert sass.tensor_cores(code) == "UTCHMMA"
    assert sass.spills(code) == 0


def test_tensor_core_loop_with_a_wait_out_of_line() -> None:
    """The loop is from 0x1120 to 0x1730; it waits at 0x2480, a loop of its own, and comes back."""
    code = sass.parse((FIXTURES / "product_sm100.sass").read_text())
    loops = [addresses(code, nodes) for nodes in sass.natural_loops(code)]
    main = next(loop for loop in loops if 0x1390 in loop)
    assert min(main) == 0x1120 and main[-4:] == [0x1730, 0x2480, 0x2490, 0x24A0]
    assert [0x2480, 0x2490] in loops
    assert not any(0x17D0 in loop for loop in loops)  # 0x24d0 jumps back there, but that is no loop
    (region,) = sass.counted_regions(code, loop=True)
    assert [i.address for i in region] == [a for a in main if a != 0x13E0]  # a NOP


def test_unrolled_loops_without_tensor_cores() -> None:
    text = (FIXTURES / "row_sum_sm80.sass").read_text()
    code = sass.parse(text)
    regions = sass.counted_regions(code, loop=True)
    assert [(r[0].address, r[-1].address) for r in regions] == [(0x1D0, 0x8B0), (0x1170, 0x19B0)]
    loads = [variants.Region("rows", {}, 128, r).count("LDG.E.128") for r in regions]
    assert loads == [4, 4]  # of one in the source
    assert variants.Region("rows", {}, 128, code).count("LDG.E") == 14
    assert variants.Region("rows", {}, 128, code).count("LDG.E.12") == 0
    assert sass.global_accesses(code) == (21, 21)
    (whole,) = sass.counted_regions(code, loop=False)
    assert len(whole) == len(code) - 2  # the last branch and a NOP
    assert sass.parse_resources(text) == {"rows": sass.Resources(32, 0, 0)}


def test_nested_loops_count_the_inner_one() -> None:
    code = sass.parse(
        """
        /*0000*/                   MOV R0, RZ ;
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/                   STL [R1+0x4], R2 ;
        /*0030*/              @!P0 BRA 0x30 ;
        /*0040*/                   FADD R2, R2, R2 ;
        /*0050*/              @!P1 BRA 0x40 ;
        /*0060*/               @P2 BRA 0x10 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
        """
    )
    regions = sass.counted_regions(code, loop=True)
    assert [[i.address for i in r] for r in regions] == [[0x30], [0x40, 0x50]]
    assert len(sass.natural_loops(code)) == 3
    assert sass.spills(code) == 1
    assert sass.global_accesses(code) == (1, 0)


def test_a_loop_that_waits_is_part_of_the_loop_around_it() -> None:
    code = sass.parse(
        """
        /*0000*/                   LDS R2, [R4] ;
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0020*/              @!P0 BRA 0x10 ;
        /*0030*/                   FADD R2, R2, R2 ;
        /*0040*/              @!P1 BRA 0x0 ;
        /*0050*/                   EXIT ;
        """
    )
    (region,) = sass.counted_regions(code, loop=True)
    assert [i.address for i in region] == [0x0, 0x10, 0x20, 0x30, 0x40]


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HMMA.16816.F32.BF16", "HMMA"),
        ("HGMMA.64x128x16.F32.BF16", "HGMMA"),
        ("UTCHMMA", "UTCHMMA"),
        ("IMMA.16832.S8.S8", "IMMA"),
        ("HFMA2.MMA", None),  # moves a constant
        ("FFMA", None),
    ],
)
def test_tensor_core_instructions(opcode: str, kind: str | None) -> None:
    assert sass.tensor_cores([sass.Instruction(0, opcode)]) == kind


# nvcc

TWO_FUNCTIONS = """
__global__ void scale(float* x, float s) { for (int i = 0; i < 100; i++) x[i * i] *= s; }
__global__ void quotient(int* x, int n) { x[n] = x[0] / n; }
"""


@needs_nvcc
@pytest.mark.parametrize("arch", variants.ARCHITECTURES)
def test_cubins_disassembled_together_are_those_disassembled_one_by_one(
    tmp_path: Path, arch: int
) -> None:
    cubins, one_by_one = [], []
    for number, function in enumerate(TWO_FUNCTIONS.strip().splitlines()):
        source, cubin = tmp_path / f"{number}.cu", tmp_path / f"{number}.cubin"
        source.write_text(function)
        subprocess.run(["nvcc", "-cubin", f"-arch=sm_{arch}", "-o", cubin, source], check=True)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", cubin]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        cubins.append(cubin.read_bytes())
        one_by_one.append(sass.parse(done.stdout))

    codes = measure.disassemble(cubins, arch)
    assert [name for cubin in cubins for name in codes[cubin]] == ["_Z5scalePff", "_Z8quotientPii"]
    for cubin, expected in zip(cubins, one_by_one, strict=True):
        (code,) = codes[cubin].values()
        assert [(i.opcode, i.guarded) for i in code] == [(i.opcode, i.guarded) for i in expected]
        first = code[0].address
        assert [i.target and i.target - first for i in code] == [i.target for i in expected]
        assert sum(i.target is not None for i in code) > 0


PTXAS_LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5spillPKfPfi' for 'sm_90'
ptxas info    : Function properties for helper
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z5spillPKfPfi
    776 bytes stack frame, 1088 bytes spill stores, 1120 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 776 bytes cumulative stack size
ptxas info    : Compile time = 35.986 ms
ptxas info    : Compiling entry function '_Z5cleanIfLi4EEvPKT_PS0_i' for 'sm_90'
ptxas info    : Function properties for _Z5cleanIfLi4EEvPKT_PS0_i
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 1024 bytes smem, 372 bytes cmem[0]
"""


def test_ptxas_log() -> None:
    assert measure.parse_ptxas(PTXAS_LOG) == {
        "_Z5spillPKfPfi": sass.Resources(registers=32, stack=776, shared=0),
        "_Z5cleanIfLi4EEvPKT_PS0_i": sass.Resources(registers=12, stack=0, shared=1024),
    }


@pytest.mark.parametrize(
    "signature",
    ["void rows<float, 4>(float*)", "rows(int)", "void fastattn::cpu::rows<int>()", "rows#2"],
)
def test_kernel_name(signature: str) -> None:
    assert measure.kernel_name(signature) == "rows"


# Verdicts

FIGURES = measure.Figures(
    registers=100,
    stack=0,
    spills=0,
    shared=32768,
    tensor_cores="HGMMA",
    instructions=(7.25, 3.0),
    accesses=4,
    wide_accesses=4,
)
KERNEL = variants.Kernel(lambda region: 1, loop=True, tensor_cores=True, at_most={90: 7.5})


def verdicts(figures: measure.Figures, **changed: object) -> list[str]:
    result = measure.Measured("op", "variant", 90, {"kernel": figures})
    ceilings = {**budgets.budget_of(FIGURES), **changed}
    committed = {"budgets": {"op": {"variant": {"sm_90": {"kernel": ceilings}}}}}
    return budgets.verdicts(result, {"kernel": KERNEL}, committed)


def test_figures_at_their_ceilings_pass() -> None:
    assert budgets.budget_of(FIGURES) == {
        "registers": 104,
        "shared": 32768,
        "instructions": [7.5, 3.0],
        "tensor_cores": "HGMMA",
    }
    assert verdicts(replace(FIGURES, registers=104, instructions=(7.5, 3.0))) == []


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"registers": 105}, "105 registers, the ceiling is 104"),
        ({"shared": 32769}, "32769 bytes of shared memory, the ceiling is 32768"),
        ({"instructions": (7.0, 3.01)}, "3.01 instructions an element, the ceiling is 3"),
        ({"instructions": (7.0,)}, "1 innermost loops, the budget has 2"),
        ({"stack": 8}, "8 bytes of stack, the ceiling is 0"),
        ({"spills": 1}, "1 loads and stores of spilled registers, the ceiling is 0"),
        ({"tensor_cores": "HMMA"}, "tensor-core instructions: HMMA, the budget has HGMMA"),
    ],
)
def test_a_figure_over_its_ceiling(figures: dict, said: str) -> None:
    assert verdicts(replace(FIGURES, **figures)) == [f"op, variant, sm_90, kernel: {said}"]


def test_a_target_holds_whatever_the_budget() -> None:
    assert verdicts(replace(FIGURES, instructions=(8.0, 3.0)), instructions=[9.0, 3.0]) == [
        "op, variant, sm_90, kernel: 8 instructions an element, the target is 7.5"
    ]


def test_tensor_cores_are_needed_whatever_the_budget() -> None:
    assert verdicts(replace(FIGURES, tensor_cores=None), tensor_cores=None) == [
        "op, variant, sm_90, kernel: no tensor-core instruction"
    ]


def test_renewing_keeps_what_was_not_measured() -> None:
    committed = {"triton": "3.6.0", "budgets": {"op": {"gone": {}, "kept": {"sm_80": {}}}}}
    result = measure.Measured("op", "variant", 90, {"kernel": FIGURES})
    renewed = budgets.renewed(committed, [result], {"op": ["kept", "variant"]}, "3.7.1")
    kernel = {"sm_90": {"kernel": budgets.budget_of(FIGURES)}}
    assert renewed == {
        "triton": "3.7.1",
        "budgets": {"op": {"kept": {"sm_80": {}}, "variant": kernel}},
    }


def test_a_crash_of_the_compiler_is_a_failure() -> None:
    future: Future[list[measure.Measured]] = Future()
    future.set_exception(BrokenProcessPool())
    (result,) = command.outcome([("op", "variant")], 90, future)
    assert budgets.verdicts(result, {}, {"budgets": {}}) == [
        "op, variant, sm_90: the compiler crashed, here or a little before"
    ]


def test_nothing_that_compiles_is_nothing_to_disassemble() -> None:
    assert measure.disassemble([], 90) == {}


def test_modules_that_launch_kernels() -> None:
    assert variants.launches_kernels("def f(x):\n    kernel[(1,)](x, num_warps=4)\n")
    assert not variants.launches_kernels("def f(x):\n    return table[1] + g(x)\n")
