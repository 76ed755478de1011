"""Do solvers gain by recurrences in float64, where the products with A are in float32?

A is the Hessian of logistic regressions of large condition number, or the GGN of a small network
with damping. Each solver has the same float32 products twice: of an operator of float32, and of one
of float64 that rounds its argument. Errors are against a direct solve in float64 of the same data,
residuals with that A, both of x rounded to float32; means and maxima of three right-hand sides.

    python benchmarks/recurrences.py
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from upweight.linalg import CG, MINRES, BlockCG, LinearOperator, Tag

LOW, HIGH = torch.float32, torch.float64
MAX_STEPS = 1000


@dataclass(frozen=True, eq=False)
class Rounded(LinearOperator):
    """Products in float32, whatever the dtype of the recurrences."""

    product: Callable[[Tensor], Tensor]
    size: int
    recurrences: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    @property
    def dtype(self) -> torch.dtype:
        return self.recurrences

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def tags(self) -> frozenset[Tag]:
        return frozenset({Tag.PSD})

    def transpose(self) -> LinearOperator:
        return self

    def mv(self, v: Tensor) -> Tensor:
        rows = v.to(LOW).reshape(-1, self.size)
        return torch.stack([self.product(row) for row in rows]).reshape(v.shape).to(self.dtype)


def compare(name: str, product: Callable[[Tensor], Tensor], A: Tensor, b: Tensor) -> None:
    b = b / b.norm(dim=1, keepdim=True)
    direct = torch.linalg.solve(A, b.mT).mT
    ends = torch.linalg.eigvalsh(A)
    for solver in (CG, BlockCG, MINRES):
        for rtol in (1e-4, 1e-6):
            for dtype in (LOW, HIGH):
                made = solver(rtol=rtol, max_steps=MAX_STEPS)
                solution = made.solve(made.init(Rounded(product, len(A), dtype)), b.to(dtype))
                x = solution.value.to(LOW).double()
                error = ((x - direct).norm(dim=1) / direct.norm(dim=1)).mean()
                print(
                    f"{name:9} condition {float(ends[-1] / ends[0]):.0e} {solver.__name__:8} "
                    f"rtol {rtol:.0e} {str(dtype)[6:]} error {float(error):.1e} residual "
                    f"{float((x @ A.mT - b).norm(dim=1).max()):.1e} {solution.result.name} "
                    f"{solution.stats.steps}",
                    flush=True,
                )


def logistic(spread: float, damping: float, n: int = 2000, p: int = 120) -> None:
    """Features whose second moments reach over `spread`."""
    draw = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(p, p, generator=draw, dtype=HIGH))[0]
    scale = torch.logspace(0, -0.5 * float(torch.tensor(spread).log10()), p, dtype=HIGH)
    X = torch.randn(n, p, generator=draw, dtype=HIGH) @ (basis * scale) @ basis.mT
    theta = torch.randn(p, generator=draw, dtype=HIGH)
    low = X.float()

    def product(X: Tensor, theta: Tensor, v: Tensor) -> Tensor:
        share = torch.sigmoid(X @ theta)
        return X.mT @ (share * (1 - share) * (X @ v)) / n + damping * v

    X, theta = low.double(), theta.float().double()
    A = torch.stack([product(X, theta, unit) for unit in torch.eye(p, dtype=HIGH)])
    compare("logistic", lambda v: product(low, theta.float(), v), A, X[:3])


def network(dampings: tuple[float, ...]) -> None:
    """GGN of a trained MLP of 276 parameters, and gradients of three of its examples."""
    torch.manual_seed(0)
    X = torch.randn(400, 12)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    y = (X[:, :4] + 0.5 * torch.randn(400, 4)).argmax(1)
    steps = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        steps.zero_grad()
        nn.functional.cross_entropy(model(X), y).backward()
        steps.step()

    def parts(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        theta = {name: value.detach().to(dtype) for name, value in model.named_parameters()}
        each = vmap(jacrev(lambda t, x: functional_call(model, t, (x[None],))[0]), (None, 0))
        outputs = functional_call(model, theta, (X.to(dtype),)).softmax(1)
        J = torch.cat(
            [part.reshape(len(X), 4, -1) for part in each(theta, X.to(dtype)).values()], 2
        )
        return J, outputs

    def product(J: Tensor, share: Tensor, v: Tensor) -> Tensor:
        u = J @ v
        u = share * u - share * (share * u).sum(1, keepdim=True)
        return torch.einsum("nkp,nk->p", J, u) / len(J)

    (J, share), (low, low_share) = parts(HIGH), parts(LOW)
    eye = torch.eye(J.shape[2], dtype=HIGH)
    G = torch.stack([product(J, share, unit) for unit in eye])
    gradients = torch.einsum("nkp,nk->np", J, share - nn.functional.one_hot(y, 4))[:3]
    for damping in dampings:

        def damped(v: Tensor, damping: float = damping) -> Tensor:
            return product(low, low_share, v) + damping * v

        compare("network", damped, G + damping * eye, gradients)


if __name__ == "__main__":
    logistic(1e6, 0.0)
    logistic(1e8, 0.0)
    logistic(1e6, 1e-6)
    network((1e-1, 1e-3, 1e-5))
