"""How suspicious is each label? By the outputs of the model that never saw the row.

With ℓ(f, c) the loss of label c, and f₋ᵢ the outputs of the model that never saw row i,

    mᵢ = ℓ(f₋ᵢ(xᵢ), yᵢ) − min_{c≠yᵢ} ℓ(f₋ᵢ(xᵢ), c)         > 0: it favours another label

is taken again and again. f₋ᵢ is `Fitted.loo_outputs` at first. Wrong labels stand together, and a
model that has learned many of them confirms each: so all rows U with mᵢ > 0 are then left out at
once, by one Newton step Δθ_U, and the outputs of the model without all of them,

    f̃(xᵢ) = f(xᵢ; θ̂ + Δθ_U)                      for i in U
    f̃(xᵢ) = f(xᵢ; θ̂ + Δθ_U) + (f₋ᵢ − f)(xᵢ)      for the others,

give mᵢ and U anew, three times at most; the last are the suspicion mᵢ and the proposed label
argmin_c ℓ(f̃(xᵢ), c).

A curvature by layer of a network gives steps that are too long, by more the earlier its training
stopped. Where Δθ_U does not lower the loss of the rows that stay, outputs without a row are not
believed either. With U the rows whose own label the model denies although it was trained on them,
t of 1, ½, …, ¹⁄₁₆ or 0 what lowers the loss of the others most, and hᵢ the leverage, rows are then
judged by the margin of the moved model, of which a share hᵢ is a row's own doing:

    mᵢ = m(f(xᵢ; θ̂ + tΔθ_U)) · (1 where it is > 0, else 1 − hᵢ)

A refit in place of steps is one fit from the start without the rows U of the last mᵢ > 0; rows are
then judged by the margin of that model.

With trusted rows ℓ is calibrated to them, at every θ anew: see `upweight.applications.calibration`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.applications.calibration import Calibration, calibration
from upweight.applications.labels import Classes, outputs_at
from upweight.applications.subject import curvature_left_out
from upweight.errors import NonFinite
from upweight.methods.fitted import Fitted
from upweight.task.data import Data
from upweight.task.recipe import Trained
from upweight.task.task import Task

SHORTER = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
"""Shares of a step that are tried where steps are too long."""

ROUNDS = 3
"""How often the rows whose labels the model does not favour are left out anew, at most."""


def suspicions(
    fitted: Fitted,
    classes: Classes,
    outputs: Float[Tensor, "n *o"],
    labels: Int[Tensor, " n"],
    held: Data | None = None,
) -> tuple[Float[Tensor, "n c"], Float[Tensor, " n"], tuple[str, ...]]:
    """ℓ of every label without the row, mᵢ, and notes; see the top of this file.

    `outputs` are f(xᵢ) of the model as it is, and `held` trusted rows.

    Raises:
        NonFinite: Without a row the minimum is not determined.
    """
    given = own_losses(labels, classes.losses(outputs))
    alone = fitted.loo_outputs(curvature_left_out(fitted))
    trusted = _Trusted(fitted, classes, held)
    n, left_out = len(labels), -1
    calibrated = trusted.calibration(fitted.task, fitted.theta)
    losses = calibrated(classes.losses(alone))
    for _ in range(ROUNDS):
        against = _margins(losses, labels) > 0
        rows = against.nonzero()[:, 0].tolist()
        if not rows or len(rows) == left_out:
            break
        why = (
            f"the model favours another label for {len(rows)} of {n} rows, too many to leave out "
            "together"
        )
        if len(rows) > n // 2:
            return _by_shares(trusted, outputs, labels, given, why)
        left_out = len(rows)
        try:
            # Not `removal_step`: where the step falls short it orders rows all the same.
            step = fitted.scorer.step(rows)
        except NonFinite:
            why = (
                f"without the {len(rows)} rows whose label the model does not favour, θ is not "
                "determined"
            )
            return _by_shares(trusted, outputs, labels, given, why)
        theta = fitted.theta + step.to(fitted.theta)
        moved, _ = outputs_at(fitted.task, theta, fitted.train)
        stay = own_losses(labels, classes.losses(moved))[~against].mean()
        if not bool(stay < given[~against].mean()):
            why = (
                f"a step without the {len(rows)} rows whose label the model does not favour does "
                "not lower the loss of the others, so that predicted sizes may be too large"
            )
            return _by_shares(trusted, outputs, labels, given, why)
        own = torch.where(against.reshape(-1, *[1] * (alone.ndim - 1)), 0.0, alone - outputs)
        calibrated = trusted.calibration(fitted.task, theta)
        losses = calibrated(classes.losses(moved + own))
    return losses, _margins(losses, labels), trusted.notes(calibrated)


@dataclass(frozen=True, eq=False)
class _Trusted:
    """Rows whose labels are believed, if there are any, and who is judged by them."""

    fitted: Fitted
    classes: Classes
    held: Data | None

    def calibration(self, task: Task, theta: Float[Tensor, " p"]) -> Calibration:
        """That of the task's model at θ; none without trusted rows."""
        if self.held is None:
            return Calibration(1.0, torch.zeros(len(self.classes.names), dtype=torch.float64))
        outputs, targets = outputs_at(task, theta, self.held)
        labels = torch.cat([self.classes.indices(each) for each in targets])
        return calibration(self.classes.losses(outputs), labels)

    def notes(self, found: Calibration) -> tuple[str, ...]:
        """How far the calibration goes."""
        if self.held is None:
            return ()
        low, high = (f(found.shifts) for f in (torch.argmin, torch.argmax))
        names, b = self.classes.names, found.shifts
        return (
            f"labels are judged by probabilities fitted to the {len(self.held)} validation rows: "
            f"log p of the model times {found.scale:.2g}, and from {float(b[low]):+.2g} for class "
            f"{names[int(low)]} to {float(b[high]):+.2g} for class {names[int(high)]}",
        )


def _by_shares(
    trusted: _Trusted,
    outputs: Float[Tensor, "n *o"],
    labels: Int[Tensor, " n"],
    given: Float[Tensor, " n"],
    why: str,
) -> tuple[Float[Tensor, "n c"], Float[Tensor, " n"], tuple[str, ...]]:
    """The same where steps are too long: by the model's own margins, and a note of why."""
    fitted, classes = trusted.fitted, trusted.classes
    theta, taken = fitted.theta, 0.0
    losses = trusted.calibration(fitted.task, theta)(classes.losses(outputs))
    against = _margins(losses, labels) > 0
    rows = against.nonzero()[:, 0].tolist()
    if 0 < len(rows) <= len(labels) // 2:
        try:
            step = fitted.scorer.step(rows).to(fitted.theta)
        except NonFinite:
            step = torch.zeros_like(fitted.theta)
        least = given[~against].mean()
        for share in SHORTER:
            there, _ = outputs_at(fitted.task, fitted.theta + share * step, fitted.train)
            stay = own_losses(labels, classes.losses(there))[~against].mean()
            if bool(stay < least):
                least, outputs, taken, theta = stay, there, share, fitted.theta + share * step
    calibrated = trusted.calibration(fitted.task, theta)
    losses = calibrated(classes.losses(outputs))
    margins = _margins(losses, labels)
    h = fitted.leverage("others")  # below 1 whatever the curvature by layer is
    inside = (h >= 0) & (h < 1)
    left = torch.where(inside & (margins <= 0), 1 - h, 1.0)
    note = (
        f"{why}: rows are ranked by the margin of the model itself"
        f"{f', moved {taken:g} of a step without {len(rows)} rows' * (taken > 0)}, less the share "
        "that is their own doing"
    )
    if not bool(inside.all()):
        note += f", but for {int((~inside).sum())} rows whose leverage is not between 0 and 1"
    return losses, margins * left, (note, *trusted.notes(calibrated))


def by_refit(
    fitted: Fitted,
    classes: Classes,
    labels: Int[Tensor, " n"],
    model: Trained,
    held: Data | None,
) -> tuple[Float[Tensor, "n c"], Float[Tensor, " n"], tuple[str, ...]]:
    """ℓ of every label, mᵢ and notes, by a fit without the suspects."""
    trusted, here = _Trusted(fitted, classes, held), (model.task_of(fitted.task, 0), model.theta[0])
    calibrated = trusted.calibration(*here)
    losses = calibrated(classes.losses(outputs_at(*here, fitted.train)[0]))
    return losses, _margins(losses, labels), trusted.notes(calibrated)


def own_losses(labels: Int[Tensor, " n"], losses: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """ℓ of the label that each row has."""
    return losses.gather(1, labels[:, None])[:, 0]


def _margins(losses: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """ℓ of the label less the least of the others."""
    others = losses.scatter(1, labels[:, None], torch.inf)
    return own_losses(labels, losses) - others.min(dim=1).values
