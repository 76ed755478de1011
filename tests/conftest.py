"""What holds for every test: float64, one thread, one seed, and where shapes are checked."""

import gc
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook

from tests.annotations import jaxtyped

# These folders check the types and shapes written in their annotations whenever a test calls them.
# The others meet users: there a wrong argument must reach an error of our own, which tests ask for.
CHECKED = ("linalg", "gradients", "curvature")

# Tests of these call them with every kind of model, layer, loss and solver. The rest of the suite
# would check the same calls again, for a fifth of its time.
CHECKING = {*CHECKED, "exactness", "methods", "test_annotations.py"}
assert "upweight" not in sys.modules, "imported too early for its annotations to be checked"
jaxtyping.jaxtyped = jaxtyped  # by this name the hook's code finds its decorator
install_import_hook([f"upweight.{folder}" for folder in CHECKED], "beartype.beartype")

# The same laws over every model, method, solver and way in, kills, processes, a browser, and the
# blocks of the docs: more than half of the suite's time. `pytest` alone leaves them out,
# `pytest -m breadth` runs them, and .ci/run both.
BREADTH = {
    "adapters/test_lightning.py",
    "adapters/test_sklearn.py",
    "adapters/test_transformers.py",
    "adapters/test_transformers_trainer.py",
    "applications/test_running_statistics.py",
    "applications/test_saliency.py",
    "applications/test_selection.py",
    "cli/test_chosen.py",
    "cli/test_damaged_runs.py",
    "cli/test_demo.py",
    "cli/test_index.py",
    "cli/test_stranger.py",
    "cli/test_verbs.py",
    "curvature/test_matrices.py",
    "distributed/test_ranks.py",
    "distributed/test_sharded.py",
    "exactness/test_curvatures.py",
    "exactness/test_layerwise_curvatures.py",
    "exactness/test_layerwise_scores.py",
    "exactness/test_removal.py",
    "exactness/test_second_way.py",
    "examples/test_projects.py",
    "front/test_scripts.py",
    "gradients/test_routing.py",
    "gradients/test_transformers.py",
    "laws/test_10_linearity.py",
    "laws/test_11_point.py",
    "laws/test_3_batch_invariance.py",
    "laws/test_3_padding.py",
    "laws/test_6_zero.py",
    "laws/test_8_reparametrization.py",
    "laws/test_9_large_damping.py",
    "laws/test_methods.py",
    "laws/test_two_floors.py",
    "linalg/test_iterative.py",
    "linalg/test_solver_conformance.py",
    "methods/test_assumptions.py",
    "methods/test_changed_after_fit.py",
    "methods/test_ensemble.py",
    "methods/test_every_verb.py",
    "methods/test_functionals.py",
    "methods/test_layerwise_models.py",
    "methods/test_layerwise_store.py",
    "methods/test_method_conformance.py",
    "methods/test_plugin.py",
    "methods/test_preconditioned.py",
    "methods/test_solvers.py",
    "methods/test_stranger.py",
    "methods/test_tracin.py",
    "report/test_browser.py",
    "runs/test_kill.py",
    "scoring/test_tolerance.py",
    "task/test_target_dtypes.py",
    "test_docs.py",
    "test_fails_loudly.py",
    "test_missing_packages.py",
    "training/test_dask.py",
    "training/test_function.py",
    "training/test_kept.py",
    "training/test_pbrf.py",
    "training/test_record.py",
    "training/test_retrain.py",
}
assert all((Path(__file__).parent / name).is_file() for name in BREADTH), "one was renamed"

# At import, not in a fixture: tensors are also made while tests are collected.
torch.set_default_dtype(torch.float64)

# The suite has a process per core already.
torch.set_num_threads(1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of whole folders, only the files that `-m` will choose are imported: a third of each run."""
    chosen = {"breadth": True, "not breadth": False}.get(config.getoption("markexpr"))
    if chosen is None or not collection_path.name.startswith("test_"):
        return None
    name = collection_path.relative_to(Path(__file__).parent).as_posix()
    return True if (name in BREADTH) is not chosen else None


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Models of tests are random where training would change nothing that is tested.

    Their scores come with a warning that θ̂ is at no minimum; every other warning is an error. Not
    in pyproject.toml: there the name of the class would import the package before the hook above.
    """
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix() in BREADTH:
            item.add_marker(pytest.mark.breadth)
        expected = pytest.mark.filterwarnings("ignore::upweight.errors.AssumptionWarning")
        item.add_marker(expected, append=False)


def pytest_collection_finish() -> None:
    """What is imported and collected stays to the end: not to be searched for garbage each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Annotations are checked in the tests that are there for it, and their fixtures."""
    first = item.path.relative_to(Path(__file__).parent).parts[0]
    jaxtyping.config.update("jaxtyping_disable", first not in CHECKING)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Each test starts from one seed, and leaves the default dtype as it was."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float64, "the test changed the default dtype"


CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One headless Chromium for all tests: the one that is installed."""
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()
