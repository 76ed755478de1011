"""Products of queries with a shard of rows."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from upweight.index.codes import Codes


def products(
    queries: Float[Tensor, "q K"], shard: Mapping[str, Tensor], codes: Codes
) -> Float[Tensor, "q b"]:
    """u_q · v_i."""
    rows = codes.decode(shard)
    return queries.to(rows) @ rows.mT
