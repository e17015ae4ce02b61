"""Lists of tensors that were looked at before, recognised by one call into torch and not by three for each tensor."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Lists kept; a training script has one or two per monitor.
KEPT = 32


class Key:
    """A tuple that is hashed once: with thousands of sizes in it that costs more than the launch."""

    __slots__ = ("_hash", "parts")

    def __init__(self, *parts: Hashable) -> None:
        self.parts = parts
        self._hash = hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self.parts == other.parts)


class _List(NamedTuple):
    check: Callable[..., bool]
    segments: tuple[int, ...]
    key: Key


class KnownLists:
    """What was found out of lists of tensors, by what they are for; holds no tensor."""

    def __init__(self) -> None:
        self._lists: OrderedDict[Hashable, _List] = OrderedDict()

    def find(self, what: Hashable, tensors: Sequence[Tensor], segments: Sequence[int]) -> Key | None:
        """The key of the last list for ``what``, if these tensors are of the same kinds, shapes and layouts."""
        known = self._lists.get(what)
        if known is None or not (known.segments is segments or known.segments == tuple(segments)):
            return None
        return known.key if len(tensors) == len(known.segments) and known.check(*tensors) else None

    def keep(self, what: Hashable, tensors: Sequence[Tensor], segments: tuple[int, ...], key: Key) -> None:
        """After these tensors were looked at one by one."""
        check = _check_of(tensors)
        self._lists.pop(what, None)
        if check is not None:
            self._lists[what] = _List(check, segments, key)
            while len(self._lists) > KEPT:
                self._lists.popitem(last=False)

    def clear(self) -> None:
        self._lists.clear()


def _check_of(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Whether others have the types, dispatch keys, dtypes, devices, shapes and strides of these, said in C++.

    It is what torch.compile guards its code with, and no public name: without it, or where it takes other arguments,
    every tensor is asked from Python.
    """
    maker: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    try:
        guards = maker.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        check: Callable[..., bool] = guards.check
        return check if check(*tensors) is True else None
    except Exception:
        return None
