"""How (H + λI)x = b is solved: by factorization, by iteration, or as the size decides (`Auto`)."""

from upweight.linalg.block_cg import BlockCG
from upweight.linalg.cg import CG
from upweight.linalg.cholesky import Cholesky
from upweight.linalg.minres import MINRES
from upweight.linalg.solve import Auto

__all__ = ["CG", "MINRES", "Auto", "BlockCG", "Cholesky"]
