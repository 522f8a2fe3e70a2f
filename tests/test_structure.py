"""The floors of docs/design.md: imports only go down, and in no circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (  # from the ground up; on a floor with several corridors none imports another
    "dropout dispatch packing tracing tuned",
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
