"""Draw the figures of docs/adapters/statsmodels.md and docs/applications/robustness.md.

The data are those that statsmodels ships.

python scripts/draw_statsmodels.py
"""

from pathlib import Path

import statsmodels.api as sm
import statsmodels.formula.api as smf

from upweight.adapters import statsmodels as smx
from upweight.applications import robustness

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"


def main() -> None:
    """Write the four figures."""
    states = sm.datasets.statecrime.load_pandas().data
    results = smf.ols("murder ~ urban + poverty + single + hs_grad", states).fit()
    found = smx.diagnostics(results)
    women = sm.datasets.fair.load_pandas().data.assign(had=lambda rows: (rows.affairs > 0) * 1.0)
    asked = "had ~ rate_marriage + age + yrs_married + children + religious + educ"
    affairs = smf.logit(asked, women).fit(disp=0)
    figures = {
        "statsmodels-influence": found.plot("influence"),
        "statsmodels-dfbetas": found.plot("dfbetas", coefficient="hs_grad"),
        "statsmodels-fragile": smx.fragile(results, "hs_grad").plot(),
        "robustness-path": robustness.amip(affairs, "children", target="both").plot(),
    }
    for name, ax in figures.items():
        ax.figure.set_size_inches(6.4, 3.6)
        ax.figure.savefig(IMAGES / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
