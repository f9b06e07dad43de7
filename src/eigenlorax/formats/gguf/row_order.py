"""The order in which llama.cpp has the rows of query and key of some architectures.

transformers' rotary embedding pairs row i of a head with row i + d/2, llama.cpp's pairs rows 2i and 2i + 1. So the two
halves of each head are interleaved. The rows of the up factor B are those of the weight, and A stays as it is.
"""

from torch import Tensor

from ...errors import ShapeError


def interleave(up: Tensor, n_heads: int, where: str) -> Tensor:
    """Return the up factor (out, r) with the two halves of each head interleaved.

    Raises:
        ShapeError: The rows are not those of `n_heads` heads.
    """
    return _by_heads(up, n_heads, where).transpose(1, 2).reshape(up.shape)


def separate(up: Tensor, n_heads: int, where: str) -> Tensor:
    """Return the up factor (out, r) with the rows that `interleave` had moved in their place."""
    heads = _by_heads(up, n_heads, where)
    return heads.reshape(heads.shape[0], heads.shape[2], 2, -1).transpose(1, 2).reshape(up.shape)


def check(out_features: int, n_heads: int, where: str) -> None:
    """Raise `ShapeError` if a number of rows is not that of `n_heads` heads, each with two halves."""
    if out_features % (2 * n_heads):
        raise ShapeError(
            f"{where} has {out_features} rows, which are not those of {n_heads} heads. The config is that of another "
            "base model."
        )


def _by_heads(up: Tensor, n_heads: int, where: str) -> Tensor:
    """Return the rows by head, half, and position in the half: (heads, 2, d/2, r)."""
    check(len(up), n_heads, where)
    return up.reshape(n_heads, 2, len(up) // n_heads // 2, up.shape[1])
