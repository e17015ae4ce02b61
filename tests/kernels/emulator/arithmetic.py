"""What instructions on registers mean: numpy over the 32 lanes of a warp.

A register is an array of its bits, unsigned; a predicate is an array of bool. Whatever has no entry here is unknown.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .ptx import Instruction, UnknownInstruction

LANES = 32
# What a register holds before anything is written to it: NaN in every float, absurd as an index.
POISON = 0x7FF4DEAD7FE4DEAD

_FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
_SIGNED = {"s16": np.int16, "s32": np.int32, "s64": np.int64}
_BITS = {16: np.uint16, 32: np.uint32, 64: np.uint64}


def bits(kind: str) -> int:
    """Width of ``b32`` and the like; a predicate has 1."""
    if kind == "pred":
        return 1
    return int(kind.lstrip("bsuf"))


def stored(kind: str) -> type:
    """The numpy type in which a register of that kind is kept."""
    return np.bool_ if kind == "pred" else _BITS[bits(kind)]


def constant(text: str, kind: str) -> np.ndarray:
    """An immediate operand in all lanes."""
    if text[:2] in ("0f", "0d"):
        value = int(text[2:], 16)
    elif kind in _FLOATS:
        value = struct.unpack("<Q", struct.pack("<d", float(text)))[0]
    else:
        value = int(text, 0)
    if kind == "pred":
        return np.full(LANES, value != 0)
    return np.full(LANES, value & ((1 << bits(kind)) - 1), stored(kind))


class Meaning(NamedTuple):
    """Kinds of the operands behind the destination, the destination's kind, and a function of arrays of bits."""

    sources: tuple[str, ...]
    result: str
    function: Callable[..., np.ndarray]


def _typed(function: Callable[..., np.ndarray], kind: str, count: int, result: str | None = None) -> Meaning:
    """``function`` of values of that kind, read from and put back into bits."""
    view, back = _FLOATS.get(kind) or _SIGNED.get(kind) or stored(kind), stored(result or kind)
    of_values = {
        1: lambda a: function(a.view(view)).view(back),
        2: lambda a, b: function(a.view(view), b.view(view)).view(back),
        3: lambda a, b, c: function(a.view(view), b.view(view), c.view(view)).view(back),
    }
    return Meaning((kind,) * count, result or kind, function if view is back else of_values[count])


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    # fp32 products are exact in fp64; fp64 is rounded twice here and once on a GPU, 1e-16 beside tolerances of 1e-6.
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _ordered(compare: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda a, b: compare(a, b) & ~(np.isnan(a) | np.isnan(b))


def _unordered(compare: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


_COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_OF_FLOATS = {
    **{name: _ordered(compare) for name, compare in _COMPARISONS.items()},
    **{f"{name}u": _unordered(compare) for name, compare in _COMPARISONS.items()},
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


def _shifted(shift: Callable[..., np.ndarray], kind: str) -> Meaning:
    """A shift by the width or more leaves zeros, or the sign; numpy would leave anything."""
    width = bits(kind)
    view = _SIGNED.get(kind, stored(kind))

    def run(value: np.ndarray, count: np.ndarray) -> np.ndarray:
        moved = shift(value.view(view), np.minimum(count, width - 1).astype(view))
        return (moved if kind in _SIGNED else np.where(count < width, moved, view(0))).view(stored(kind))

    return Meaning((kind, "u32"), kind, run)


def _wide(kind: str, third: bool) -> Meaning:
    double = f"{kind[0]}{2 * bits(kind)}"
    narrow, wide = (_SIGNED.get(k, stored(k)) for k in (kind, double))

    def run(a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> np.ndarray:
        product = (a.view(narrow).astype(wide) * b.view(narrow).astype(wide)).view(stored(double))
        return product if c is None else product + c

    return Meaning((kind, kind, double) if third else (kind, kind), double, run)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    pattern = values.astype(np.float32).view(np.uint32)
    rounded = (pattern + 0x7FFF + (pattern >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def _converted(target: str, source: str) -> Meaning:
    view = _FLOATS.get(source) or _SIGNED.get(source) or stored(source)
    made = _FLOATS.get(target) or _SIGNED.get(target) or stored(target)
    back = stored(target)
    kinds = ((f"b{bits(source)}",), target)
    if source == "bf16":
        return Meaning(*kinds, lambda a: (a.astype(np.uint32) << 16).view(np.float32).astype(made).view(back))
    if target == "bf16":
        return Meaning(*kinds, lambda a: _to_bf16(a.view(view)))
    return Meaning(*kinds, lambda a: a.view(view).astype(made).view(back))


def _convert(modifiers: tuple[str, ...]) -> Meaning:
    *rounding, target, source = modifiers
    # numpy rounds to nearest even between floats and cuts off on the way to integers, and so do these.
    if rounding not in ([], ["rn"], ["rzi"]) or (rounding == ["rzi"]) != (target[0] in "us" and "f" in source):
        raise KeyError
    return _converted(target, source)


def _shuffle(modifiers: tuple[str, ...]) -> Meaning:
    if modifiers != ("sync", "bfly", "b32"):
        raise KeyError

    def run(value: np.ndarray, mask: np.ndarray, clamp: np.ndarray, members: np.ndarray) -> np.ndarray:
        _check_whole(members, clamp[0] == LANES - 1)
        return value[np.arange(LANES) ^ int(mask[0])]

    return Meaning(("b32", "u32", "u32", "u32"), "b32", run)


def _reduction(modifiers: tuple[str, ...], kind: str) -> Meaning:
    _, name, _ = modifiers
    reduce = {"max": np.max, "min": np.min}[name]
    if modifiers != ("sync", name, kind) or kind not in ("s32", "u32"):
        raise KeyError
    view = _SIGNED.get(kind, stored(kind))

    def run(value: np.ndarray, members: np.ndarray) -> np.ndarray:
        _check_whole(members)
        return np.full(LANES, reduce(value.view(view))).view(stored(kind))

    return Meaning((kind, "u32"), kind, run)


def _check_whole(members: np.ndarray, whole: bool = True) -> None:
    if not whole or members[0] != 0xFFFFFFFF:
        raise UnknownInstruction("lanes that exchange numbers with less than their warp")


def _field(kind: str) -> Meaning:
    """``length`` bits from ``start`` on, the highest of them the sign where the kind has one."""
    width = bits(kind)
    view = _SIGNED.get(kind, stored(kind))

    def run(value: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        if (length == 0).any() or (start.astype(np.uint64) + length > width).any():
            raise UnknownInstruction("a field of no bits, or of more than there are")
        left = (width - length - start).astype(value.dtype)
        return ((value << left).view(view) >> (width - length).astype(view)).view(stored(kind))

    return Meaning((kind, "u32", "u32"), kind, run)


# Of two numbers the one that is not NaN, as PTX has it without ``.NaN``.
_REALS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "min": np.fmin, "max": np.fmax}
_INTEGERS = {"add": operator.add, "sub": operator.sub, "and": operator.and_, "or": operator.or_, "xor": operator.xor}
_INTEGERS |= {"min": np.minimum, "max": np.maximum, "rem": np.fmod}
_ALONE = {"neg": operator.neg, "not": operator.invert, "abs": np.abs}


def meaning(instruction: Instruction) -> Meaning:
    """What an instruction on registers does; UnknownInstruction if nobody has said."""
    name, *rest = instruction.parts
    modifiers = tuple(rest)
    try:
        return _meaning(name, modifiers, modifiers[-1])
    except (KeyError, ValueError, IndexError):
        raise UnknownInstruction(instruction.text) from None


def _meaning(name: str, modifiers: tuple[str, ...], kind: str) -> Meaning:
    if name == "cvt":
        return _convert(modifiers)
    if name == "shfl":
        return _shuffle(modifiers)
    if name == "redux":
        return _reduction(modifiers, kind)
    if name == "setp":
        compare, _ = modifiers
        return _typed((_OF_FLOATS if kind in _FLOATS else _COMPARISONS)[compare], kind, 2, "pred")
    if name == "selp" and len(modifiers) == 1:
        return Meaning((kind, kind, "pred"), kind, lambda a, b, chosen: np.where(chosen, a, b))
    if name in ("mul", "mad") and modifiers[0] == "wide" and len(modifiers) == 2:
        return _wide(kind, name == "mad")
    if kind in _FLOATS:
        return _of_reals(name, modifiers, kind)
    if name == "mul" and modifiers == ("lo", kind):
        return _typed(operator.mul, kind, 2)
    if name == "mad" and modifiers == ("lo", kind):
        return _typed(lambda a, b, c: a * b + c, kind, 3)
    if len(modifiers) != 1:
        raise KeyError
    if name == "shl":
        return _shifted(operator.lshift, kind)
    if name == "shr":
        return _shifted(operator.rshift, kind)
    if name == "bfe":
        return _field(kind)
    if name in _ALONE:
        return _typed(_ALONE[name], kind, 1)
    return _typed(_INTEGERS[name], kind, 2)


def _of_reals(name: str, modifiers: tuple[str, ...], kind: str) -> Meaning:
    if modifiers not in ((kind,), ("rn", kind)):
        raise KeyError
    if name == "fma":
        return _typed(_fma, kind, 3)
    if name == "div":
        return _typed(np.divide, kind, 2)
    if name == "sqrt":
        return _typed(np.sqrt, kind, 1)
    if name in ("neg", "abs"):
        return _typed(_ALONE[name], kind, 1)
    return _typed(_REALS[name], kind, 2)
