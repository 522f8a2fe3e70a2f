"""The documents are true: examples run, commands and links exist, tables agree with the code."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import pkgutil
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch

import fastattn
from benchmarks import end_to_end, report
from fastattn import dispatch
from tests import ROOT

DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "benchmarks" / "results" / "PENDING.md",
]
#: Where documents may point outside the repository: papers, PyTorch and the formats we follow.
PUBLIC_HOSTS = {"arxiv.org", "doi.org", "github.com", "keepachangelog.com"}


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """(line number of its first line, content) of every fenced block in ``language``."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.M | re.S)
    return [(text[: found.start(1)].count("\n"), found[1]) for found in fence.finditer(text)]


def marked(path: str, label: str) -> str:
    """What stands between the two comments of ``label`` in a document."""
    pattern = rf"<!-- {label}:start[^\n]*-->\n(.*?)<!-- {label}:end -->"
    found = re.findall(pattern, read(path), re.S)
    assert len(found) == 1, f"{path} must have one block marked {label}"
    return found[0].strip()


def schemas() -> str:
    """Every op's schema as torch has it, sorted, wrapped at commas."""
    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastattn::"))
    lines = []
    for qualified in names:
        schema = str(getattr(torch.ops.fastattn, qualified.split("::")[1]).default._schema)
        schema = schema.removeprefix("fastattn::")
        lines += textwrap.wrap(schema, 100, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(["```text", *lines, "```"])


# --------------------------------------------------------------------------------------- examples

WITH_EXAMPLES = [d for d in DOCUMENTS if blocks(d.read_text(encoding="utf-8"), "python")]


def test_the_documents_that_teach_have_examples() -> None:
    assert {"README.md", "docs/dropout.md", "docs/guide.md", "docs/math.md"} <= set(
        map(name, WITH_EXAMPLES)
    )


@pytest.mark.parametrize("document", WITH_EXAMPLES, ids=name)
def test_examples_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document's blocks share a namespace; those with prompts must print what they show."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for line, source in blocks(document.read_text(encoding="utf-8"), "python"):
        if source.startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(
                source, namespace, name(document), str(document), line
            )
            printed: list[str] = []
            failed, _ = runner.run(test, out=printed.append, clear_globs=False)
            assert not failed, "".join(printed)
            namespace.update(test.globs)
        else:
            exec(compile("\n" * line + source, str(document), "exec"), namespace)


# -------------------------------------------------------------------------------- commands, links


def option_source(command: list[str]) -> str:
    """The source that declares the options of ``python PATH ...`` or ``python -m MODULE ...``."""
    if command[1] != "-m":
        return read(command[1])
    spec = importlib.util.find_spec(command[2])
    assert spec is not None, f"no module {command[2]}"
    if spec.submodule_search_locations is None:
        return Path(spec.origin).read_text(encoding="utf-8")
    main = importlib.util.find_spec(f"{command[2]}.__main__")
    assert main is not None, f"python -m {command[2]} cannot run"
    return Path(main.origin).read_text(encoding="utf-8")


def check_command(command: list[str]) -> None:
    program = command[0]
    if program == "torchrun":  # its own options are before the script
        script = next(i for i, word in enumerate(command) if word.endswith(".py"))
        check_command(["python", *command[script:]])
    elif program in ("python", ".venv/bin/python"):
        source = option_source(command)
        options = (word.partition("=")[0] for word in command[2:] if word.startswith("--"))
        for option in options:
            assert f'"{option}"' in source, f"{shlex.join(command)}: no option {option}"
    elif program == "make":
        for target in (word for word in command[1:] if "=" not in word):
            assert re.search(rf"^{target}:", read("Makefile"), re.M), f"no target {target}"
    else:
        assert program in ("git", "pip", "cd"), f"unknown command {shlex.join(command)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_commands_exist(document: Path) -> None:
    for _, block in blocks(document.read_text(encoding="utf-8"), "sh"):
        for line in block.splitlines():
            command = shlex.split(line, comments=True)
            if command:
                check_command(command)


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_resolve(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            scheme, _, rest = target.partition("://")
            assert scheme == "https" and rest.split("/")[0] in PUBLIC_HOSTS, target
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.is_relative_to(ROOT) and file.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{target} has no heading"


# ---------------------------------------------------------------------------------- honest prose


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_prose_names_no_private_place_and_claims_no_unmeasured_speed(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    forbidden = {
        "a path of one machine": r"(?<![\w.<>/])/(home|root|work|tmp|opt|mnt|usr)/",
        "a bare issue number": r"(?<!pytorch )(?<!triton )#\d|\bissue \d",
        "a promise for later": r"\b(TODO|FIXME|XXX)\b",
        "a speed that no results file backs": r"\d\s?[x×%] (faster|slower|less memory|speed)",
    }
    prose = re.sub(r"<!-- results:start.*?<!-- results:end -->", "", text, flags=re.S)
    for what, pattern in forbidden.items():
        found = re.search(pattern, prose)
        assert found is None, f"{what}: {found[0]!r}"


@pytest.mark.parametrize("path", ["README.md", "docs/performance.md"])
def test_measured_tables_are_those_of_a_committed_results_file(path: str) -> None:
    block = marked(path, "results")
    source = re.search(r"From `([^`]+\.json)`", block)
    assert source is not None, f"{path} cites no results file"
    files = list((ROOT / "benchmarks" / "results").glob(f"*/{source[1]}"))
    assert len(files) == 1, f"{path} cites {source[1]}, which is {len(files)} files"
    opening = re.search(r"<!-- results:start[^\n]*-->", read(path))[0]
    expected = report.markdown(report.load(files[0]), source[1], report.Excerpt.asked_for(opening))
    assert block == expected.strip()


def test_end_to_end_table_is_that_of_a_committed_results_file() -> None:
    block = marked("docs/performance.md", "end-to-end")
    source = re.search(r"From `([^`]+\.json)`", block)
    assert source is not None
    [file] = (ROOT / "benchmarks" / "results").glob(f"*/{source[1]}")
    assert block == end_to_end.markdown(end_to_end.load(file), source[1])
    plot = file.with_suffix(".png").relative_to(ROOT).as_posix()
    assert file.with_suffix(".png").exists() and f"](../{plot})" in read("docs/performance.md")


def test_targets_are_complete_and_measured_figures_cite_their_file() -> None:
    rows = re.findall(r"^\| ([A-Z]\d) \|(.*)\|$", read("docs/performance.md"), re.M)
    expected = "A1 A2 A3 A4 A5 A6 F1 F2 N1 N2 L1 L2 L3 L4 M1 M2 C1 E1".split()
    assert [number for number, _ in rows] == expected
    for number, row in rows:
        _, _, _, measured = (cell.strip() for cell in row.split("|"))
        if measured == "not measured yet":
            continue
        link = re.search(r"\]\((\.\./benchmarks/results/[^)]+\.json)\)", measured)
        assert link, f"{number}: {measured!r} names no results file"


# ------------------------------------------------------------------------- agreement with the code


def test_schemas_are_frozen() -> None:
    """They are written out in docs/schemas.md; changing one is a decision, not an accident."""
    assert marked("docs/schemas.md", "schemas") == schemas()


def test_every_op_and_backend_is_documented() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\w, ]+) \|$", read("docs/design.md"), re.M)
    documented = {op: tuple(backends.split(", ")) for op, backends in rows}
    assert documented == dispatch.BACKENDS
    headings = ", ".join(re.findall(r"^## (.*)$", read("docs/math.md"), re.M)).split(", ")
    assert set(dispatch.BACKENDS) <= set(headings)


def test_every_schema_argument_is_explained_or_a_tensor_of_the_formula() -> None:
    formula = set(
        "query key value qkv input input_bias residual weight bias weight1 bias1 weight2 bias2 "
        "out grad grad_out grad_sum input_dtype".split()
    )
    explained = set(re.findall(r"`(\w+)`", read("docs/schemas.md").split("## What arguments")[1]))
    for schema in re.findall(r"\w+\(([^()]*)\) ->", " ".join(schemas().split())):
        arguments = {argument.split()[-1] for argument in schema.split(", ")}
        assert arguments <= formula | explained, arguments - formula - explained


def test_every_public_name_is_documented() -> None:
    text = read("README.md") + read("docs/design.md")
    assert [n for n in fastattn.__all__ if not re.search(rf"\b{n}\b", text)] == []


def is_there(dotted: str) -> bool:
    """Whether it is a module, or a name in one. Kernels are found, not imported."""
    if dotted.startswith("fastattn.kernels."):
        module, _, name = dotted.partition("fastattn.kernels.")[2].partition(".")
        path = ROOT / "kernels" / "triton" / f"{module}.py"
        return path.exists() and re.search(
            rf"^(def|class) {name or '.*'}\b|^{name}\b.* = ", path.read_text(encoding="utf-8"), re.M
        )
    try:
        pkgutil.resolve_name(dotted)
    except (ImportError, AttributeError):
        return False
    return True


def test_names_in_documents_and_docstrings_are_there() -> None:
    sources = [*ROOT.glob("fastattn/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    used = {
        found
        for path in (*DOCUMENTS, *sources, *ROOT.glob("examples/*.py"))
        for found in re.findall(
            r"(?<![\w.])fastattn(?:\.[A-Za-z_]\w*)+", path.read_text(encoding="utf-8")
        )
    }
    assert {"fastattn.tuning.load", "fastattn.dropout.draw_seed"} <= used
    assert sorted(name for name in used - {"fastattn._C"} if not is_there(name)) == []


def test_folder_map_names_what_is_there() -> None:
    (block,) = (content for _, content in blocks(read("README.md"), "text") if "csrc/" in content)
    named = [line.split()[0] for line in block.splitlines() if line.strip()]
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_documented_version_is_the_installed_one() -> None:
    project = read("pyproject.toml")
    version = ast.literal_eval(re.search(r"^version = (.*)$", project, re.M)[1])
    assert fastattn.__version__ == version
    assert version in read("README.md")
