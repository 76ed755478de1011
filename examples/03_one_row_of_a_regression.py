"""Does a finding hang on a few rows? Stack loss, the classic: 21 days of a chemical plant.

Cook's distance finds the rows; the influence curve says by how much each moves a coefficient;
really leaving the row out says whether that is true.
"""

import statsmodels.api as sm

import upweight as uw
from upweight.adapters import statsmodels as smx

loaded = sm.datasets.stackloss.load_pandas()
y, X = loaded.endog, sm.add_constant(loaded.exog)
results = sm.OLS(y, X).fit()
table = smx.diagnostics(results)
print(table)  # the rows of the largest Cook's distance; table.plot("influence") draws them
print()
print(smx.fragile(results, "ACIDCONC", targets=["sign"]))

row = int(table.cooks_distance.argmax())
name = table.names.index("AIRFLOW")
first_order = -table.influence_curve[row, name] / len(y)
corrected = -table.dfbeta[row, name]
kept = [i for i in range(len(y)) if i != row]
refitted = sm.OLS(y.iloc[kept], X.iloc[kept]).fit().params["AIRFLOW"]
print(f"\nwithout row {row} the coefficient of AIRFLOW changes by")
print(f"  influence curve      {first_order:+.4f}")
print(f"  leverage-corrected   {corrected:+.4f}")
print(f"  refitted             {refitted - results.params['AIRFLOW']:+.4f}")

task, train = smx.task(results)
fitted = uw.Influence().fit(task, train)
step = fitted.removal_step([row])["weight"][0, name]
print(f"  upweight.Influence   {step:+.4f}")
assert abs(step - (refitted - results.params["AIRFLOW"])) < 1e-10
