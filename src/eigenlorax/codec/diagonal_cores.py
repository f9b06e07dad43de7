"""Diagonal cores of updates between two given factors, as least squares with a ridge."""

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-12
"""Weight of the squared cores beside the squared error, at least.

Without it, pairs of rows that nearly coincide get large cores of either sign, which cancel except for their rounding.
"""


def normal_equations(
    down: Float[Tensor, "n r n_in"],
    up: Float[Tensor, "n r n_out"],
    rows: tuple[Float[Tensor, "k n_in"], Float[Tensor, "k n_out"]],
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "k k"]]:
    """Return the inner products of updates with the terms, and those of the terms with each other.

    Update i is up[i].mT @ down[i]; term j is the outer product of row j of both factors.
    """
    # the inner product of rank-1 matrices is the product of those of their vectors: no out × in matrix is formed
    with_terms = ((down @ rows[0].mT) * (up @ rows[1].mT)).sum(1)
    return with_terms, (rows[0] @ rows[0].mT) * (rows[1] @ rows[1].mT)


def solve(with_terms: Float[Tensor, "n k"], gram: Float[Tensor, "k k"], ridge: float) -> Float[Tensor, "n k"]:
    """Return the cores with the least squared error, given `normal_equations`."""
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    cores: Tensor = torch.cholesky_solve(with_terms.mT, torch.linalg.cholesky(gram + ridge * identity)).mT
    return cores
