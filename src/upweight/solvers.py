"""How (H + λI)x = b is solved: by factorization, iteration, a few directions of H, or `Auto`."""

from upweight.linalg.block_cg import BlockCG
from upweight.linalg.cg import CG
from upweight.linalg.cholesky import Cholesky
from upweight.linalg.lanczos_inverse import Lanczos
from upweight.linalg.lissa import LiSSA
from upweight.linalg.minres import MINRES
from upweight.linalg.neumann import Neumann
from upweight.linalg.nystrom import Nystrom
from upweight.linalg.solve import Auto

__all__ = [
    "CG",
    "MINRES",
    "Auto",
    "BlockCG",
    "Cholesky",
    "Lanczos",
    "LiSSA",
    "Neumann",
    "Nystrom",
]
