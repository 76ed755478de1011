"""Draw the figures of docs/adapters/statsmodels.md, of data that statsmodels ships.

python scripts/draw_statsmodels.py
"""

from pathlib import Path

import statsmodels.api as sm
import statsmodels.formula.api as smf

from upweight.adapters import statsmodels as smx

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"


def main() -> None:
    """Write the three figures."""
    states = sm.datasets.statecrime.load_pandas().data
    results = smf.ols("murder ~ urban + poverty + single + hs_grad", states).fit()
    found = smx.diagnostics(results)
    figures = {
        "statsmodels-influence": found.plot("influence"),
        "statsmodels-dfbetas": found.plot("dfbetas", coefficient="hs_grad"),
        "statsmodels-fragile": smx.fragile(results, "hs_grad").plot(),
    }
    for name, ax in figures.items():
        ax.figure.set_size_inches(6.4, 3.6)
        ax.figure.savefig(IMAGES / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
