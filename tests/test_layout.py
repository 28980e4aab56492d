"""Which file may import which, and how long the programs may grow: pytest tests/test_layout.py"""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# From the top down. A file imports only what stands on a later line, or what is in its own folder.
LEVELS = (
    ("scripts", "tests"),
    ("train", "eval"),
    ("training", "evaluation"),
    ("tasks",),
    ("sandbox",),
    ("common", "gmt_callback"),
    ("gmt", "gmt_triton"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def imports(path: Path) -> Iterator[str]:
    """The first part of the name of every module that a file imports: `common` for `from common.config import x`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@functools.cache
def sources() -> dict[Path, str]:
    """Every Python file but the tests, and the file or folder at the root that it belongs to."""
    folders = [ROOT / name for name in LEVEL if name != "tests"]
    files = [p.relative_to(ROOT) for p in (*ROOT.glob("*.py"), *(p for f in folders for p in f.rglob("*.py")))]
    return {p: name for p in files if (name := p.parts[0].removesuffix(".py")) in LEVEL}


def functions(name: str) -> dict[str, int]:
    """The lines of each function of a file."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    return {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def test_every_file_has_a_level():
    files = sources()
    assert set(files.values()) >= LEVEL.keys() - {"tests", "gmt_triton"} and len(files) > 40
    assert {p.stem for p in ROOT.glob("*.py")} <= LEVEL.keys()


@pytest.mark.parametrize("path", sources(), ids=str)
def test_nothing_is_imported_upward(path):
    unit = sources()[path]
    upward = {name for name in imports(ROOT / path) if LEVEL.get(name, len(LEVELS)) <= LEVEL[unit]} - {unit}
    assert not upward - {"gmt_triton"}, f"{path} imports {upward}"  # gmt.py and gmt_triton.py are one level


def imported_modules(path: Path) -> set[Path]:
    """The project's files that a file imports as it is loaded."""
    names = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:  # not those within functions
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {file for name in names if (file := Path(*name.split(".")).with_suffix(".py")) in sources()} - {path}


def test_no_circle_of_imports():
    """Which of its files is loaded first would decide whether it works."""
    left = {path: imported_modules(path) for path in sources()}
    while free := {path for path, needs in left.items() if not needs & left.keys()}:
        left = {path: needs for path, needs in left.items() if path not in free}
    assert not left, {str(path): sorted(map(str, needs & left.keys())) for path, needs in left.items()}


def test_scores_need_no_training():
    for path, unit in sources().items():
        if unit in ("eval", "evaluation", "tasks", "sandbox", "common"):
            assert not {"training", "train"} & set(imports(ROOT / path)), path


def test_the_method_needs_torch_and_numpy_alone():
    found = set(imports(ROOT / "gmt.py")) - {"gmt_triton"}  # which it uses where it is there
    assert found - set(sys.stdlib_module_names) == {"torch", "numpy"}


@pytest.mark.parametrize(("name", "most"), [("train.py", 350), ("eval.py", 300)])
def test_a_program_is_a_few_screens(name, most):
    assert (ROOT / name).read_text().count("\n") <= most


def test_the_loop_is_two_screens():
    assert functions("train.py")["train"] <= 120
