"""Comparing saved states."""

import math

import torch


def same(left, right):
    """Equal in every bit, NaN included."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(
            left.nan_to_num(nan=12345.0), right.nan_to_num(nan=12345.0)
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(*pair) for pair in zip(left, right))
    return left == right or (isinstance(left, float) and math.isnan(left) and math.isnan(right))
