"""What would the scores of the language model cost if they were written by hand?

The least that exact scores take in PyTorch, without queries, choices and checks: a forward pass, a
backward pass to the outputs of the layers and not to their weights, the gradient of each example in
full, and its products with vectors of as many queries as the workload has. Prints the seconds of
each part and of the whole, and of a plain forward and backward epoch, in turn.

    python benchmarks/by_hand.py --network benchmarks/.cache/ekfac-gpt-….safetensors [--bfloat16]
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch
from ekfac_workloads import Problem, plain_epoch
from torch import Tensor, nn


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", type=Path, required=True, help="a file of ekfac.py's cache")
    parser.add_argument("--n", type=int, default=2_000, help="training examples (default: 2000)")
    parser.add_argument("--queries", type=int, default=100, help="(default: 100)")
    parser.add_argument("--batch", type=int, default=32, help="(default: 32)")
    parser.add_argument("--together", type=int, default=2, help="batches per product (default: 2)")
    parser.add_argument("--bfloat16", action="store_true", help="of the gradients and products")
    parser.add_argument("--runs", type=int, default=3, help="(default: 3)")
    return parser.parse_args()


class ByHand:
    """The layers of one model, their vectors, and what they saw."""

    def __init__(self, problem: Problem, dtype: torch.dtype, queries: int, rows: int) -> None:
        self.problem, self.dtype = problem, dtype
        self.layers = {m: name for name, m in problem.workload.layers(problem.model).items()}
        self.seen: dict[nn.Module, list[Tensor]] = {}
        self.first: Tensor | None = None
        self.vectors = {m: torch.randn(queries, m.weight.numel()).to(dtype) for m in self.layers}
        self.ends = {m: torch.randn(queries, len(m.weight)).to(dtype) for m in self.layers}
        self.room = {m: torch.empty(rows, *m.weight.shape, dtype=dtype) for m in self.layers}
        self.bias = {m: torch.empty(rows, len(m.weight), dtype=dtype) for m in self.layers}
        for module in self.layers:
            module.register_forward_hook(self._after)

    def _after(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            self.first = output = output.detach().requires_grad_()
        self.seen[module] = [args[0].detach()]
        output.register_hook(lambda delta: self.seen[module].append(delta))
        return output

    def scores(self, batch: int, together: int, spent: dict[str, float]) -> Tensor:
        """[q, n], and the seconds of each part added to `spent`."""
        X, y = self.problem.X, self.problem.y
        out = torch.zeros(len(next(iter(self.vectors.values()))), len(X))
        held = first = 0
        for k in range(0, len(X), batch):
            marks = [time.perf_counter()]
            outputs, targets = self.problem.model(X[k : k + batch]), y[k : k + batch]
            loss = nn.functional.cross_entropy(
                outputs.flatten(0, 1), targets.flatten(), reduction="sum"
            )
            marks.append(time.perf_counter())
            torch.autograd.grad(loss, self.first)
            self.first = None
            marks.append(time.perf_counter())
            self._form(slice(held, held + len(targets)))
            held += len(targets)
            marks.append(time.perf_counter())
            if k // batch % together == together - 1 or first + held == len(X):
                self._multiply(out[:, first : first + held])
                first, held = first + held, 0
            marks.append(time.perf_counter())
            parts = ("forward", "backward", "gradients", "products")
            for part, begin, end in zip(parts, marks[:-1], marks[1:], strict=True):
                spent[part] += end - begin
        return out

    def _form(self, at: slice) -> None:
        for module, (a, delta) in self.seen.items():
            left, right = delta.to(self.dtype), a.to(self.dtype)
            torch.bmm(left.mT, right, out=self.room[module][at])
            torch.sum(left, dim=1, out=self.bias[module][at])

    def _multiply(self, out: Tensor) -> None:
        for module in self.layers:
            b = out.shape[1]
            out += self.vectors[module] @ self.room[module][:b].flatten(1).mT
            out += self.ends[module] @ self.bias[module][:b].mT


def main() -> None:
    """Run in turn; print seconds, and plain epochs."""
    given = arguments()
    problem = Problem.load(given.network, given.n, 1)
    plain = Problem.load(given.network, given.n, 1)
    for parameter in problem.model.parameters():
        parameter.requires_grad_(False)
    dtype = torch.bfloat16 if given.bfloat16 else torch.float32
    by_hand = ByHand(problem, dtype, given.queries, given.batch * given.together)
    for _ in range(given.runs):
        started = time.perf_counter()
        plain_epoch(plain)
        epoch = time.perf_counter() - started
        spent: dict[str, float] = defaultdict(float)
        started = time.perf_counter()
        by_hand.scores(given.batch, given.together, spent)
        whole = time.perf_counter() - started
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in spent.items())
        print(f"epoch {epoch:.2f} s; by hand {whole:.2f} s = {whole / epoch:.2f} epochs ({parts})")


if __name__ == "__main__":
    main()
