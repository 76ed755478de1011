"""Robustness: which few people carry a conclusion of a regression?

The survey on extramarital affairs that statsmodels ships (6 366 women; Fair 1978). A logistic
regression says what goes with having had one. For each coefficient: how few rows must leave before
its sign or its significance changes? Each answer is fitted again by statsmodels without them.
"""

import statsmodels.api as sm

from upweight.applications import robustness

data = sm.datasets.fair.load_pandas().data
columns = ["rate_marriage", "age", "yrs_married", "children", "religious", "educ"]
X, y = sm.add_constant(data[columns]), (data.affairs > 0).astype(float)
results = sm.Logit(y, X).fit(disp=0)

# One question, in a sentence to quote.
found = robustness.amip(results, "children", target="sign")
print(found)
print("\nThe rows that leave:")
print(data.loc[list(found.rows), [*columns, "affairs"]].to_string())
print("\nThe coefficient as they leave, predicted by one linearization and refitted:")
print(found.frame().to_string(index=False, float_format="%.4f"))

# The table of a paper's appendix.
table = robustness.table(results, ["children", "educ"], targets=["sign", "significance"])
print()
print(table)
shown = ["coefficient", "estimate", "asked", "one_shot", "k", "share", "estimate_without"]
print(table.frame()[shown].to_string(index=False, float_format="%.4f"))

# The same, by a fit of one's own.
again = sm.Logit(y.drop(list(found.rows)), X.drop(index=list(found.rows))).fit(disp=0)
before, after = results.params["children"], again.params["children"]
assert found.is_confirmed and before * after < 0
print(f"\n{found.k} of {len(data)} rows change the sign: {before:.4f} becomes {after:.4f}")
