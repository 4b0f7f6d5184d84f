"""Shapes as clients see them ↔ shapes as the model has them, where config.pbtxt states a `reshape`.

Both sides of a reshape have the same variable dims, in order, and as many elements between them (checked when the
configuration is read); so the bytes stay as they are and only the shape is written differently.
"""

from __future__ import annotations


def reshaped(shape: tuple[int, ...], of: tuple[int, ...], to: tuple[int, ...]) -> tuple[int, ...]:
    """`shape`, which fits the dims `of` (−1: variable), in the dims `to`.

    Raises:
        ValueError: it does not fit, or the dims differ in how many are variable.
    """
    if not fits(shape, of):
        raise ValueError(f"shape {list(shape)} where {list(of)} was expected")
    variable = [size for size, dim in zip(shape, of, strict=True) if dim == -1]
    if len(variable) != to.count(-1):
        raise ValueError(f"dims {list(of)} and {list(to)} differ in their variable dims")
    sizes = iter(variable)
    return tuple(next(sizes) if dim == -1 else dim for dim in to)


def fits(shape: tuple[int, ...], dims: tuple[int, ...]) -> bool:
    """Whether every dim that is fixed in `dims` has that size."""
    return len(shape) == len(dims) and all(dim in (-1, size) for size, dim in zip(shape, dims, strict=True))
