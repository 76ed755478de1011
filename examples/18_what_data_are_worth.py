"""Eight people label digits, one of them carelessly: what is each paid, and what is a lot worth?

Values of neighbours share out the accuracy on a validation set. The statement adds up to the cent;
refits without each person say whether it should be believed; a third split reports the accuracy.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import upweight as uw
from upweight.applications import payout, valuation

X, y = load_digits(return_X_y=True)
X, truth = torch.tensor(X / 16), torch.tensor(y)
order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
train, held, test = order[:800], order[800:1300], order[1300:]
people = [f"person {i % 8}" for i in range(800)]

draw = torch.Generator().manual_seed(1)
careless = torch.tensor([name == "person 5" for name in people])
wrong = careless & (torch.rand(800, generator=draw) < 0.6)
labels = torch.where(wrong, torch.randint(10, (800,), generator=draw), truth[train])

recipe = uw.training.Newton()
task = uw.Task(nn.Linear(64, 10).double(), uw.CrossEntropy(), uw.L2(1e-2))
trainer = recipe.prepare(task, uw.as_data((X[train], labels)))
task = task.moved_to(trainer(torch.ones(1, 800).double()).theta[0])
data, validation = (X[train], labels), (X[held], truth[held])

scores = uw.KNNShapley(k=5).fit(task, data).attribute(validation)
print(valuation.values(scores), end="\n\n")
paid = payout.statement(scores, people, budget=1000, recipe=recipe)
print(paid, paid.frame()[["payout", "low", "high", "worth"]], sep="\n", end="\n\n")
print(payout.if_copied(scores, people, 1000, who="person 0"), end="\n\n")

fitted = uw.Influence(uw.Hessian()).fit(task, data)
lots = {name: [i for i, other in enumerate(people) if other == name] for name in set(people)}
dropped = valuation.worth(fitted, lots, validation, recipe=recipe)
print(dropped, end="\n\n")

kept = torch.tensor([name != "person 5" for name in people])
theta = trainer(kept.double()[None]).theta[0]
right = [float(valuation.Correct()(task, task.named(t), (X[test], truth[test])).mean())
         for t in (task.theta(), theta)]  # fmt: skip
least = min(paid.payouts[name] for name in set(people) - {"person 5"})
print(f"paid to the careless person {paid.payouts['person 5']} of 1000, to the others {least} or "
      f"more; accuracy on the third split with their labels {right[0]:.3f}, without "
      f"{right[1]:.3f}")  # fmt: skip
