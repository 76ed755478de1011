"""What do explanations by training rows tell of who was trained on, and what stops it?

Bundled digits: 600 were trained on, 600 were not. An explanation shows the five rows with the
largest effect on a query's loss; who asks about a training row often sees that row itself.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import upweight as uw
from upweight.applications import privacy
from upweight.task.data import as_data

X, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
X, y = (X / 16)[order], y[order]
train, outsiders = (X[:600], y[:600]), (X[600:1200], y[600:1200])

blank = uw.Task(nn.Linear(64, 10).double(), uw.CrossEntropy(), uw.L2(1e-4))
made = uw.training.Newton().prepare(blank, as_data(train))(torch.ones(1, 600).double())
task = blank.moved_to(made.theta[0])
fitted = uw.Influence(uw.Hessian()).fit(task, train)
leakage = privacy.audit(fitted, range(600), outsiders, k=5)
print(leakage)
columns = ["redaction", "attack", "auc", "tpr at 1 %", "members shown", "rows revealed", "overlap"]
print(leakage.frame()[columns].round(3).to_string(index=False))

# What a page may show of ten outsiders: near-duplicates withheld, the order alone.
scores = fitted.attribute((X[600:610], y[600:610]))
shown = privacy.redacted(scores, k=5, withhold="near-duplicates", values=False)
print(shown.rows)

before, after = (leakage.predicted[name, "own row"]
                 for name in ("records and values", "near-duplicates withheld"))  # fmt: skip
print(f"\nown-row attack: AUC {before:.3f} → {after:.3f} with near-duplicates withheld")
