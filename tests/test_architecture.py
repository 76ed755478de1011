"""The house rules that a machine can check: imports, names, exports."""

import ast
from pathlib import Path

import pytest

import upweight

ROOT = Path(upweight.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Who may import whom, by folder or top-level file of the package.
MAY_IMPORT = {
    "errors": set(),
    "_typing": set(),
    "data": set(),
    "linalg": {"errors", "_typing"},
    "runtime": {"errors", "_typing"},
    "task": {"errors", "_typing", "linalg", "runtime"},
    "gradients": {"errors", "_typing", "linalg", "runtime", "task"},
    "curvature": {"errors", "_typing", "linalg", "task", "gradients"},
    "scores": {"errors", "_typing", "runtime", "task"},
    "method": {"scores", "task"},
    "methods": {
        "errors", "_typing", "linalg", "task", "gradients", "curvature", "scores", "method",
    },
    "evaluation": {"errors", "_typing", "runtime", "task", "scores", "method"},
    "applications": {"errors", "_typing", "task", "scores", "method"},
    "report": {"errors", "_typing", "task", "scores", "method"},
}  # fmt: skip
MATHS = {"linalg", "curvature", "gradients", "methods", "applications"}
NO_MATHS = {"os", "json", "pathlib", "safetensors", "torch.distributed", "logging"}
ONLY_ADAPTERS = {"sklearn", "statsmodels", "transformers", "scipy"}
BANNED_NAMES = {"utils", "helpers", "common", "misc", "core", "base"}
BANNED_PREFIXES = ("compute_", "get_", "calc_")


def imported(path: Path) -> list[str]:
    """Modules that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def room(path: Path) -> str:
    """The folder or top-level file that a path belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    allowed = MAY_IMPORT.get(room(path))
    if allowed is None:  # the leaves (adapters, cli, testing) and the package itself
        return
    for name in imported(path):
        if name.startswith("upweight."):
            other = name.split(".")[1]
            assert other == room(path) or other in allowed, f"{room(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_keep_to_their_subject(path):
    names = imported(path)
    if room(path) in MATHS:
        assert not {n for n in names if n in NO_MATHS or n.split(".")[0] in NO_MATHS}
    if room(path) != "adapters":
        assert not {n for n in names if n.split(".")[0] in ONLY_ADAPTERS}
    assert path.stem not in BANNED_NAMES


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_named_by_what_they_return(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert not node.name.lstrip("_").startswith(BANNED_PREFIXES), node.name


def test_leaves_are_imported_by_nobody():
    for path in FILES:
        if room(path) in {"adapters", "cli", "testing", "__init__"}:
            continue
        leaves = ("upweight.adapters", "upweight.cli", "upweight.testing")
        assert not [n for n in imported(path) if n.startswith(leaves)], path


def test_every_export_resolves_and_is_listed_in_order():
    assert sorted(upweight.__all__) == sorted(set(upweight.__all__))
    for name in upweight.__all__:
        assert getattr(upweight, name) is not None
    public = {
        alias.asname or alias.name
        for node in ast.parse((ROOT / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert public == set(upweight.__all__)
