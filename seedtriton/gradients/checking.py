"""Which lists of tensors the operations refuse, with the tensor that is at fault."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import ConfigurationError
from .reference import overlaps_itself

LANES = (torch.float32, torch.float64)
_LAYOUTS = {torch.strided, torch.sparse_coo}


def check_segments(tensors: Sequence[Tensor], segments: Sequence[int], num_segments: int) -> None:
    """ConfigurationError unless each tensor has a segment that exists."""
    if len(tensors) != len(segments):
        raise ConfigurationError(f"{len(tensors)} tensors but {len(segments)} segments: give one for each")
    if num_segments < 1:
        raise ConfigurationError(f"num_segments must be at least 1, got {num_segments}")
    if segments and not 0 <= min(segments) <= max(segments) < num_segments:
        index = next(index for index, segment in enumerate(segments) if not 0 <= segment < num_segments)
        raise ConfigurationError(f"segment {segments[index]} of tensor {index} is outside [0, {num_segments})")


def check_lists(tensors: Sequence[Tensor], segments: Sequence[int], num_segments: int) -> None:
    """The same, and unless each tensor can have a sum of squares."""
    check_segments(tensors, segments, num_segments)
    if not _are_gradients(tensors):
        for index, tensor in enumerate(tensors):
            _check_tensor(index, tensor)


def _are_gradients(tensors: Sequence[Tensor]) -> bool:
    """``_check_tensor`` of each kind once: of each tensor it would take longer than to scale a small one."""
    return {tensor.layout for tensor in tensors} <= _LAYOUTS and have_squares(tensors)


def have_squares(tensors: Sequence[Tensor]) -> bool:
    """Whether the dtype of each is that of a gradient."""
    return all(map(_has_squares, {tensor.dtype for tensor in tensors}))


def _has_squares(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _check_tensor(index: int, tensor: Tensor) -> None:
    if not _has_squares(tensor.dtype):
        raise ConfigurationError(
            f"tensor {index} has dtype {tensor.dtype}; gradients are floating point or complex: convert it first"
        )
    if tensor.layout not in _LAYOUTS:
        raise ConfigurationError(
            f"tensor {index} has layout {tensor.layout}; use a dense or sparse COO tensor (.to_sparse_coo())"
        )


def check_scalable(tensors: Sequence[Tensor]) -> None:
    """ConfigurationError unless each tensor can be scaled in place."""
    # The loop takes longer than scaling small tensors: not for contiguous ones of common kinds.
    if _are_gradients(tensors) and all(map(Tensor.is_contiguous, tensors)):
        return
    for index, tensor in enumerate(tensors):
        _check_tensor(index, tensor)
        if tensor.layout == torch.strided and overlaps_itself(tensor):
            raise ConfigurationError(
                f"tensor {index} (shape {tuple(tensor.shape)}, strides {tensor.stride()}) has elements that "
                "share memory; scaling it in place would scale them more than once: pass a contiguous tensor"
            )


def check_lanes(lanes: torch.dtype) -> None:
    """ConfigurationError unless rows may be summed in this dtype."""
    if lanes not in LANES:
        raise ConfigurationError(f"lanes must be one of {LANES}, got {lanes}")
