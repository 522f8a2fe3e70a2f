"""The floors of docs/design.md, options by the names of schemas, and the form of the tests."""

from __future__ import annotations

import ast
import importlib
import pickle
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.arguments import AttentionArguments, AttentionDropout, TokenDropout
from fastattn.dispatch import BACKENDS
from fastattn.ops import (
    bias_activation_dropout,
    dropout_add,
    dropout_add_layer_norm,
    feed_forward,
    layer_norm,
)
from tests import ROOT
from tests.ops.backends import parameters

FLOORS = (  # from the ground up; on a floor with several corridors none imports another
    "dropout dispatch packing tracing tuned version",
    "arguments",
    "pytorch",
    "extension kernels",
    "ops",
    "layers",
    "__init__ models objectives tuning __main__",
)
CORRIDORS = ("extension", "kernels")
MODULES = {
    ".".join((package, *path.relative_to(folder).with_suffix("").parts)): path
    for package, folder in (
        ("fastattn", ROOT / "fastattn"),
        ("fastattn.kernels", ROOT / "kernels" / "triton"),
    )
    for path in folder.rglob("*.py")
}


def place(module: str) -> tuple[int, str]:
    """Its floor, and its name or its folder's."""
    part = module.split(".")[1]
    return next(number for number, names in enumerate(FLOORS) if part in names.split()), part


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports from a folder by dots"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastattn":
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                found.add(inner if inner in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "fastattn"}
    return {name if name in MODULES else f"{name}.__init__" for name in found}


IMPORTS = {module: imported(path) for module, path in MODULES.items()}


def test_imports_only_go_down() -> None:
    climbs = []
    for module, targets in IMPORTS.items():
        floor, part = place(module)
        for target in targets:
            below, other = place(target)
            if below > floor or (below == floor and part != other and part in CORRIDORS):
                climbs.append(f"{module} imports {target}")
    assert climbs == []


def test_imports_form_no_circle() -> None:
    assert set(TopologicalSorter(IMPORTS).static_order()) == set(MODULES)  # or raises CycleError


def test_one_call_goes_up() -> None:
    """A multiplier of dropout is an op, which the floor below runs by its name."""
    up = [
        module
        for module, path in MODULES.items()
        if "torch.ops.fastattn" in path.read_text(encoding="utf-8") and place(module) < (4, "")
    ]
    assert up == ["fastattn.arguments"]


def test_pickles_name_public_classes_by_the_package() -> None:
    """So that they are found again when the code has moved."""
    classes = [x for x in map(fastattn.__dict__.get, fastattn.__all__) if isinstance(x, type)]
    assert classes == [fastattn.FusedEncoderLayer, fastattn.FusedLayerNorm]
    for kind in classes:
        dumped = pickle.dumps(kind, protocol=0).decode()
        assert dumped.startswith(f"cfastattn\n{kind.__name__}\n")
        assert pickle.loads(dumped.encode()) is kind


#: What every op's implementation takes as one tuple, by a name for each field.
OPTIONS = {
    "attention_fwd": AttentionArguments,
    "attention_bwd": AttentionArguments,
    "attention_packed_fwd": AttentionArguments,
    "attention_packed_bwd": AttentionArguments,
    "feed_forward_fwd": feed_forward.Options,
    "feed_forward_bwd": feed_forward.Options,
    "bias_activation_dropout_fwd": bias_activation_dropout.Options,
    "bias_activation_dropout_bwd": bias_activation_dropout.Options,
    "layer_norm_fwd": layer_norm.Options,
    "layer_norm_bwd": layer_norm.BackwardOptions,
    "dropout_add_fwd": dropout_add.Options,
    "dropout_add_bwd": dropout_add.Options,
    "dropout_add_layer_norm_fwd": dropout_add_layer_norm.Options,
    "dropout_add_layer_norm_bwd": dropout_add_layer_norm.BackwardOptions,
    "attention_dropout_factor": AttentionDropout,
    "token_dropout_factor": TokenDropout,
}


def test_every_op_has_options() -> None:
    names = {name.removeprefix("fastattn::") for name in torch._C._dispatch_get_all_op_names()}
    assert {name for name in names if hasattr(torch.ops.fastattn, name)} == set(OPTIONS)


@pytest.mark.parametrize("op", OPTIONS)
def test_options_are_those_of_the_schema(op: str) -> None:
    """In its order, and one after the other: the tuple is handed over as it is."""
    schema = [
        argument.name for argument in getattr(torch.ops.fastattn, op).default._schema.arguments
    ]
    fields = list(OPTIONS[op]._fields)
    if "weight" in fields:  # autograd Functions give the gradients of the first two
        assert fields[:2] == ["weight", "bias"]
    first = schema.index(fields[0])
    assert schema[first : first + len(fields)] == fields


# ------------------------------------------------------------------------------------ the tests

TESTS = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "tests").rglob("*.py"))}
MOST_LINES = 500


def test_no_file_of_tests_is_too_long() -> None:
    """None is excepted: a long one is split by subject."""
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in TESTS.items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_tests_import_one_another_from_packages() -> None:
    """By the whole name, wherever pytest was started; and two may have files of one name."""
    stems = {path.stem for path in TESTS.values()}
    faults = []
    for name, path in TESTS.items():
        packages = path.relative_to(ROOT).parents[:-1]
        faults += [f"no {x}/__init__.py" for x in packages if f"{x}/__init__.py" not in TESTS]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found = ["." * node.level + (node.module or "")]
            else:
                found = [x.name for x in node.names] if isinstance(node, ast.Import) else []
            faults += [f"{name} imports {x}" for x in found if x.split(".")[0] in {"", *stems}]
    assert faults == []


CHECKS = [name for name in TESTS if name.endswith("_checks.py")]


def test_every_backend_of_an_op_runs_its_checks() -> None:
    checked = set()
    for name in CHECKS:
        ops = importlib.import_module(name.removesuffix(".py").replace("/", ".")).OPS
        checked |= {(op, x.values[0].name) for op in ops for x in parameters(*ops)}
    registered = {(op, name) for op, names in BACKENDS.items() for name in names}
    left = {op for op, _ in registered - checked}
    assert left == {"dropout_factor"}  # no kernel of its own: tests/ops/test_dropout.py


@pytest.mark.parametrize("name", CHECKS)
def test_checks_name_no_backend(name: str) -> None:
    """What one of them does otherwise is a quirk in its line, so that a new one is a line too."""
    compared = re.findall(r"backend\.(?:name|how|fixture) *[!=]=", TESTS[name].read_text("utf-8"))
    assert compared == []
