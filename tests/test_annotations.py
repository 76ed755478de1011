"""Are the shapes in annotations checked, also of a function that is defined again and again?"""

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from tests.annotations import jaxtyped
from upweight.linalg.cholesky import Cholesky


def defined_again(shape):
    @jaxtyped()
    def added(x: Float[Tensor, " a"], y: Float[Tensor, shape]) -> Float[Tensor, " a"]:
        return x + y

    return added


def test_every_definition_is_held_to_its_own_annotations():
    three, two = torch.ones(3), torch.ones(2)
    for _ in range(2):
        assert defined_again(" a")(three, three).sum() == 6
        assert defined_again(" 1")(three, torch.ones(1)).sum() == 6
        with pytest.raises(TypeCheckError):
            defined_again(" a")(three, two)
        with pytest.raises(TypeCheckError):
            defined_again(" 1")(three, three)


def test_functions_of_one_definition_may_call_each_other():
    def made(inner):
        @jaxtyped()
        def total(x: Float[Tensor, " a"]) -> Float[Tensor, ""]:
            return x.sum() if inner is None else 2 * inner(x[1:])

        return total

    outer = made(made(made(None)))
    with pytest.raises(TypeCheckError):
        outer(torch.ones(4, 4))
    assert outer(torch.ones(4)) == 8


def test_the_mathematics_is_imported_with_its_annotations_checked():
    with pytest.raises(TypeCheckError):
        Cholesky().init("no operator")
