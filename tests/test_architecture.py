"""The house rules that a machine can check: imports, names, exports, and what files may mention."""

import ast
import functools
import re
from pathlib import Path

import pytest

import upweight

PACKAGE = Path(upweight.__file__).parent
TREE = Path(__file__).parents[1]
FILES = sorted(PACKAGE.rglob("*.py"))

# Who may import whom, by folder or top-level file of the package.
MAY_IMPORT = {
    "errors": set(),
    "_typing": set(),
    "_text": set(),
    "data": set(),
    "verdict": set(),
    "notation": set(),
    "_html": set(),
    "facts": {"notation"},
    "linalg": {"errors", "_typing", "runtime"},
    "runtime": {"errors", "_typing"},
    "task": {"errors", "_typing", "linalg", "runtime"},
    "gradients": {"errors", "_typing", "linalg", "runtime", "task"},
    "curvature": {"errors", "_typing", "linalg", "runtime", "task", "gradients"},
    "scoring": {
        "errors", "_typing", "linalg", "runtime", "task", "gradients", "curvature",
    },
    "plot": {"errors", "_typing", "_text", "runtime"},
    "provenance": {"errors", "facts", "task", "_html", "notation"},
    "effects": {"errors", "notation", "provenance", "runtime"},
    "scores": {
        "errors", "_typing", "_text", "_html", "notation", "verdict", "runtime", "plot",
        "provenance", "effects",
    },
    "methods": {
        "errors", "_typing", "linalg", "runtime", "task", "gradients", "curvature", "scoring",
        "scores", "effects", "provenance", "training", "facts", "notation", "_html",
    },
    "shards": {"_typing", "runtime", "methods", "scores"},
    "index": {
        "errors", "_typing", "runtime", "task", "gradients", "curvature", "scoring", "methods",
        "scores", "provenance", "evaluation",
    },
    "labels": {"curvature"},
    "solvers": {"linalg"},
    "training": {"errors", "_typing", "linalg", "runtime", "task", "gradients", "curvature"},
    "evaluation": {
        "errors", "_typing", "_html", "verdict", "runtime", "task", "plot", "scores", "effects",
        "training",
    },
    "applications": {
        "errors", "_typing", "_text", "_html", "notation", "verdict", "plot", "runtime", "linalg",
        "task",
        "gradients", "curvature", "scores", "effects", "provenance", "methods", "training",
        "evaluation", "front", "index",
    },
    "report": {
        "errors", "_typing", "_text", "notation", "facts", "provenance", "verdict", "runtime",
        "task", "scores", "effects", "methods", "applications",
    },
    "runs": {
        "errors", "_typing", "linalg", "runtime", "task", "gradients", "curvature", "scoring",
        "scores", "methods", "evaluation", "shards", "index",
    },
    "front": {
        "errors", "_typing", "notation", "runtime", "linalg", "task", "gradients", "curvature",
        "labels", "methods", "training", "evaluation", "runs", "scores", "provenance", "_html",
    },
    "view": {
        "errors", "_typing", "runtime", "task", "scores", "effects", "report", "methods", "index",
    },
}  # fmt: skip
SHORT_FORMS = {
    "methods/fitted.py": {"evaluation"},  # `fitted.check` calls `upweight.check`
    "methods/combination.py": {"evaluation"},  # for Student's t
    "front/answer.py": {"applications", "report"},  # verbs of scores that need them
    "front/opened.py": {"adapters"},  # loaded for a model of the library that they translate
    "cli/opened_index.py": {"adapters"},  # the same, for the folder of a model of transformers
    "front/refits.py": {"adapters"},  # the same, for an estimator that is fitted again
    "applications/subject.py": {"adapters"},  # the same, for its own fit
    "applications/confident.py": {"adapters"},  # for probabilities by cross-validation
    "applications/cross_validation.py": {"adapters"},  # fits on the rows that are left
    "applications/robustness_coefficient.py": {
        "adapters"
    },  # for the standard errors that it reports
}
LEAVES = {"adapters", "cli", "testing"}  # may import everything but each other
MATHS = {"linalg", "curvature", "gradients", "scoring", "methods", "applications"}
AT_A_POINT = {"linalg", "gradients", "curvature", "scoring"}
RECIPES = {"newton.py", "objective.py"}  # start from the model's own parameters, as training does
NOT_IN_MATHS = {"os", "json", "pathlib", "safetensors", "torch.distributed", "logging"}
FILE_FORMATS = {"atomic", "headers", "lock", "matrix", "store"}
ONLY_IN_ADAPTERS = {"lightning", "pytorch_lightning", "sklearn", "statsmodels", "transformers"}
SCIPY_WHEN_CALLED = {"adapters", "applications"}
ONLY_WHEN_CALLED = {
    "captum",
    "lime",
    "shap",
    "pandas",
    "matplotlib",
    "scipy",
    "numba",
    "llvmlite",
    "torch.distributed",
    "upweight.runtime.tables",
}  # outside adapters: not when a module is loaded
LOADS = {"runtime/tables.py": {"pandas"}}  # and is itself loaded only when called
# What is still wrong. A rule also fails on an entry that is no longer needed: both only shrink.
CIRCLES: set[frozenset[str]] = set()
BANNED_NAMES = {"utils", "helpers", "common", "misc", "core", "base"}
BANNED_PREFIXES = ("compute_", "get_", "calc_")
NAMED_BY_LIBRARIES = {"get_command"}  # which click calls
TEXT = {".css", ".html", ".js", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
HOMES = re.compile(r"""(?<![\w.~/<>*-])(/(work|root|home|Users|mnt|opt)/|[A-Z]:\\Users\\)""")


def targets(node):
    """Modules that one import statement names; `from a import b` may mean a or a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import hides its folder"
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


@functools.cache
def tree(path):
    return ast.parse(path.read_text())


@functools.cache
def imported(path):
    """Modules that a file imports, anywhere in it."""
    return {name for node in ast.walk(tree(path)) for name in targets(node)}


def imported_when_loaded(path):
    """Modules that importing the file imports: not in a function, nor for type checkers only."""
    names, nodes = set(), [tree(path)]
    while nodes:
        node = nodes.pop()
        names.update(targets(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes.extend(node.orelse)
        else:
            nodes.extend(ast.iter_child_nodes(node))
    return names


def within(names, packages):
    """The names that are one of the packages or inside one."""
    return {n for n in names for p in packages if n == p or n.startswith(f"{p}.")}


def room(path):
    """The folder or top-level file of the package that a path belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module(path):
    """The name that a path is imported by."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_of(path, names):
    """Which of the modules `names` a file imports: `from a import b` is a.b if there is one."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            found |= {name if name in names else node.module for name in targets(node)[1:]}
        else:
            found.update(targets(node))
    return found & names


def circles(ahead):
    """Sets of modules, each of which leads to every other; `ahead` is what each of them imports."""

    def reached(start):
        seen, left = set(), [start]
        while left:
            new = ahead[left.pop()] - seen
            seen |= new
            left.extend(new)
        return seen

    after = {name: reached(name) for name in ahead}
    found = {frozenset(b for b in after[a] if a in after[b]) for a in ahead}
    return found - {frozenset()}


def offenders(rule):
    """What `rule` finds wrong, by file: one test asks all files."""
    assert FILES
    found = {str(path.relative_to(PACKAGE)): rule(path) for path in FILES}
    return {path: wrong for path, wrong in found.items() if wrong}


def test_imports_go_one_way():
    def wrong(path):
        here = room(path)
        if here in ("__init__", "__main__", "_public"):
            return set()
        if here not in MAY_IMPORT and here not in LEAVES:
            return {f"{here} has no place in the import law"}
        allowed = MAY_IMPORT[here] if here in MAY_IMPORT else set(MAY_IMPORT)
        rooms = {name.split(".")[1] for name in within(imported(path), {"upweight"}) if "." in name}
        # `from upweight import __version__` is the package's own; anything else hides a folder.
        called = SHORT_FORMS.get(path.relative_to(PACKAGE).as_posix(), set())
        loaded = {f"upweight.{room}" for room in called}
        assert not within(imported_when_loaded(path), loaded), f"{path} loads {called}"
        return rooms - allowed - called - {here, "__version__"}

    assert offenders(wrong) == {}


def test_no_file_imports_one_that_imports_it():
    names = {module(path) for path in FILES}
    assert circles({module(path): imported_of(path, names) for path in FILES}) == CIRCLES


def test_mathematics_touches_no_files_and_no_network():
    banned = NOT_IN_MATHS | {f"upweight.runtime.{name}" for name in FILE_FORMATS}
    assert FILE_FORMATS <= {p.stem for p in (PACKAGE / "runtime").glob("*.py")}

    def wrong(path):
        return {b for b in banned if room(path) in MATHS and within(imported(path), {b})}

    assert offenders(wrong) == {}


def test_mathematics_is_told_where_theta_is():
    """θ is an argument there: `task.theta()` is asked once, by who makes the point."""

    def wrong(path):
        if room(path) not in AT_A_POINT or path.name in RECIPES:
            return set()
        return {
            f"line {node.lineno}"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "theta"
        }

    assert offenders(wrong) == {}


def test_optional_packages_are_imported_where_they_belong():
    def wrong(path):
        if room(path) == "adapters":
            return set()
        loaded = within(imported_when_loaded(path), ONLY_WHEN_CALLED)
        scipy = {"scipy"} - ({"scipy"} if room(path) in SCIPY_WHEN_CALLED else set())
        loaded -= LOADS.get(path.relative_to(PACKAGE).as_posix(), set())
        return within(imported(path), ONLY_IN_ADAPTERS | scipy) | loaded

    assert offenders(wrong) == {}


def test_files_have_a_subject():
    def wrong(path):
        return BANNED_NAMES & {part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts}

    assert offenders(wrong) == {}


def test_functions_are_named_by_what_they_return():
    def wrong(path):
        return {
            node.name
            for node in ast.walk(tree(path))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.name.lstrip("_").startswith(BANNED_PREFIXES)
            and node.name not in NAMED_BY_LIBRARIES
        }

    assert offenders(wrong) == {}


def test_exports_are_what_the_package_imports_and_each_resolves():
    public = [
        alias.asname or alias.name
        for node in tree(PACKAGE / "_public.py").body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(public) == sorted(upweight.__all__)
    assert len(set(upweight.__all__)) == len(upweight.__all__)
    for name in upweight.__all__:
        assert hasattr(upweight, name), name


def test_an_installed_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_no_file_names_a_place_on_somebodys_machine():
    folders = [".ci", "benchmarks", "docs", "examples", "scripts", "src", "tests"]
    paths = [p for folder in folders for p in (TREE / folder).rglob("*")]
    paths += TREE.glob("*.*")
    read = 0
    for path in paths:
        hidden = {".cache", "__pycache__"} & set(path.relative_to(TREE).parts)
        if path.is_file() and not hidden and (path.suffix in TEXT or path.parent.name == ".ci"):
            read += 1
            found = HOMES.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{path.relative_to(TREE)} mentions {found}"
    assert read > len(FILES)


def test_circles_are_recognized():
    ahead = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set(), "f": {"f"}}
    assert circles(ahead) == {frozenset("abc"), frozenset("f")}


@pytest.mark.parametrize(
    "text", ["open('/wo" "rk/x')", "see /ho" "me/ann/x", "C:\\Us" "ers\\ann", "cd /ro" "ot/x"]
)  # fmt: skip
def test_places_are_recognized(text):
    assert HOMES.search(text)


@pytest.mark.parametrize(
    "source, loaded",
    [
        ("import pandas", {"pandas"}),
        ("def f():\n    import pandas", set()),
        ("if TYPE_CHECKING:\n    import pandas", set()),
        ("try:\n    import pandas\nexcept ImportError:\n    pass", {"pandas"}),
        ("from torch import distributed", {"torch", "torch.distributed"}),
    ],
)
def test_imports_are_recognized(source, loaded, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert imported_when_loaded(path) == loaded
