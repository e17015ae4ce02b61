"""Sum of squares of every tensor of a list, by operations of torch.

fp32 over tiles of a few thousand elements, row by row, and fp64 across tiles. `torch._foreach_norm` on a CPU is off by
1e-3 and more for large fp32 tensors, and rounds to the gradients' dtype for bf16 and fp16; this stays within 1e-6 of
fp64. How it came to be as fast is in bench/NOTES.md.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from operator import attrgetter, itemgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

# Squares summed in fp32 before fp64 takes over. Equal elements, and squares of the 8-bit mantissas of bf16,
# round the same way again and again: the worst relative error of a row of equal elements is 6e-7 at 256,
# 2e-6 at 1024 and 7e-6 at 4096 (torch 2.13 CPU).
ROW = 256
# The norms of this many rows, a tile, become one in fp32, too: fp64 over each row, and segment_reduce, which waits for
# every addition, would be 5 % of the whole. The worst relative error of a tile of equal elements is 7.4e-7.
TILE = 16
# Tensors of at most this many elements are copied behind each other and summed as one: what an operation costs
# whatever it does (2 µs, 10 µs once a few MB have gone through the caches) is more than a copy of so few; where they
# are also converted, one operation more. Larger ones are summed where they lie, as far as they are whole tiles; what
# remains of them is small again.
SMALL, SMALL_CONVERTED = 12 << 10, 32 << 10
# Elements that one torch.cat copies at most. From 1 << 15 on, and with more than one thread, it makes an iterator
# for every tensor where sizes differ (0.7 µs instead of 0.1).
COPY = (1 << 15) - ROW
# Elements summed or converted at a time after they have been copied (8 MiB of fp32). Smaller blocks, which would stay
# in the L2 cache, lose more to the operations than they gain: bf16 takes 60 % longer at 1 << 18. vector_norm(
# dtype=float32) of a bf16 tensor takes ten times as long, because it converts element by element.
BLOCK = 1 << 21
# A tensor of so many elements is converted and summed alone, in the middle of the buffer, so that each of two threads
# sums what it has itself converted, in memory that it had before. Where their cores have no cache in common, GPT-2 in
# bf16 took 52 ms otherwise, instead of 18. From 1 << 17 on, lists of a few hundred thousand elements each gain as much
# there, and lose up to a third everywhere else (bench/NOTES.md).
ALONE = 1 << 19
# On a CPU, tensors of at most a row are copied without the zeros that would fill it up, if there are so many of them or
# no others: half of what such a cat takes is taken by the zeros.
MANY = 32
# What divides the sizes of all that are copied at once makes rows if it is at least this; else each square is added in
# fp64, one after the other.
LEAST_ROW = 16


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of storage without holes and overlaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(tensor.stride(), tensor.shape) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def dense_view(tensor: Tensor) -> Tensor | None:
    """All elements as a contiguous 1-D view in storage order, or None when there is no such view.

    Covers contiguous, channels_last and every other dense layout; the order of the elements is the storage's,
    which a sum over all of them does not care about.
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else None


def flat_values(tensor: Tensor) -> Tensor:
    """The values whose squares count, as a contiguous 1-D real tensor.

    Complex numbers become pairs (|z|² = re² + im²), sparse COO tensors their coalesced values; what has
    no dense view (expanded, strided) is copied.
    """
    if tensor.layout == torch.sparse_coo:
        if not tensor.is_coalesced() and tensor.dtype.itemsize < 4:
            # Elements that are listed several times add up, and not in a dtype that rounds every sum.
            tensor = tensor.float()
        tensor = tensor.coalesce().values()
    if tensor.layout != torch.strided:
        raise ValueError(f"layout {tensor.layout} has no flat values")
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    view = dense_view(tensor)
    return tensor.contiguous().view(-1) if view is None else view


@lru_cache(maxsize=256)
def constant(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor of host-known numbers, made once per signature instead of once per call."""
    # inference_mode(False): a tensor cached inside somebody's inference block could not be used outside.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive runs of ``values`` (fp64, [n] or [n, columns]), in order: the same bits on every call."""
    # unsafe=True only skips the check that lengths are non-negative and add up, which would synchronise.
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0, unsafe=True)


# map() over these and over unbound methods takes half the time of a loop.
_device_of, _dtype_of, _layout_of = attrgetter("device"), attrgetter("dtype"), attrgetter("layout")
_WIDE = frozenset({torch.float64, torch.complex128})


def tensor_sumsq(
    tensors: Sequence[Tensor], lanes: torch.dtype, device: torch.device, sizes: tuple[int, ...] | None = None
) -> Tensor:
    """Sum of squares of each tensor, float64 [len(tensors)] on ``device``; tensors may lie on several. Under no_grad.

    ``lanes`` is the dtype inside a row; of float64 tensors it is float64 whatever it says. ``sizes``, the elements of
    each, saves the look at them. A ValueError says that one of them is no gradient, but not which.
    """
    if tensors[0].device.type == "cpu":
        sizes = tuple(map(Tensor.numel, tensors)) if sizes is None else sizes
        found = _sumsq_of_tiny(tensors, _tiny(sizes), lanes)
        if found is not None:
            return found.to(device)
    return _sumsq_of_any(tensors, lanes, device)


class _Cat:
    """Consecutive tiny tensors that one torch.cat copies behind each other; it holds none of them."""

    def __init__(self, begin: int, sizes: Sequence[int]) -> None:
        self.these, self.size = slice(begin, begin + len(sizes)), sum(sizes)
        unit = math.gcd(*sizes)
        self.row = unit if unit >= LEAST_ROW else 0
        self.lengths = constant(tuple(size // (self.row or 1) for size in sizes), torch.int64, torch.device("cpu"))
        self.shaped = False  # whether some were not 1-D: then they are flattened first, which takes twice as long

    def sumsq(self, tensors: Sequence[Tensor], lanes: torch.dtype) -> Tensor | None:
        """float64 [len(self.these)]; None where they are not what can be joined."""
        values = self._joined(list(tensors[self.these]))
        if values is None:
            return None
        if values.dtype not in (lanes, torch.float64):
            values = values.to(lanes)
        if self.row:
            values = torch.linalg.vector_norm(values.view(-1, self.row), dim=1).double()
        # Squares in the dtype of the lanes, as everywhere: what overflows there is to be infinite.
        return segment_sum(values.square().double(), self.lengths)

    def _joined(self, tensors: list[Tensor]) -> Tensor | None:
        """Their elements, 1-D, in a dtype that holds those of each; possibly the tensor itself, if there is one.

        What they are is seen by what comes out, because looking at each of them takes longer than to copy it.
        """
        for flatten in (False, True) if not self.shaped else (True,):
            try:
                joined = _flatten_dense_tensors(tensors) if flatten else torch.cat(tensors)
            except RuntimeError:  # sparse ones, not all on one device, or not all 1-D
                continue
            self.shaped = flatten
            if joined.dim() == 1 and joined.numel() == self.size:
                known = type(joined) is Tensor and joined.layout == torch.strided and joined.is_cpu
                return joined if known and joined.is_floating_point() else None
        return None


@dataclass(frozen=True)
class _Tiny:
    """Which tensors of a list are tiny; it depends on their sizes alone.

    Attributes:
        cats: of those.
        pick: takes them from the list, and ``others`` all the rest; None: there is no rest.
        back: int64, where among them and then the rest each tensor of the list is.
    """

    cats: tuple[_Cat, ...]
    pick: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] | None = None
    others: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] | None = None
    back: Tensor | None = None


@lru_cache(maxsize=256)
def _tiny(sizes: tuple[int, ...]) -> _Tiny | None:
    """None: too few of them are tiny."""
    tiny = [index for index, size in enumerate(sizes) if size <= ROW]
    own = [sizes[index] for index in tiny]
    cats = tuple(_Cat(one.start, own[one]) for one in _packed(own, COPY))
    if len(tiny) == len(sizes):
        return _Tiny(cats)
    if len(tiny) < MANY:
        return None
    rest = [index for index, size in enumerate(sizes) if size > ROW]
    place = {index: n for n, index in enumerate(tiny + rest)}
    back = constant(tuple(place[index] for index in range(len(sizes))), torch.int64, torch.device("cpu"))
    return _Tiny(cats, _picker(tiny), _picker(rest), back)


def _sumsq_of_tiny(tensors: Sequence[Tensor], plan: _Tiny | None, lanes: torch.dtype) -> Tensor | None:
    """``tensor_sumsq`` where all of them, or many, are tiny; None where they are not, or cannot be joined."""
    if plan is None:
        return None
    mine = tensors if plan.pick is None else plan.pick(tensors)
    sums = [cat.sumsq(mine, lanes) for cat in plan.cats]
    found = [one for one in sums if one is not None]
    if len(found) < len(sums):
        return None
    if plan.others is None or plan.back is None:
        return found[0] if len(found) == 1 else torch.cat(found)
    rest = _sumsq_of_any(plan.others(tensors), lanes, plan.back.device)
    return torch.cat([*found, rest]).index_select(0, plan.back)


def _sumsq_of_any(tensors: Sequence[Tensor], lanes: torch.dtype, device: torch.device) -> Tensor:
    """``tensor_sumsq`` of tensors of any size."""
    devices, dtypes = tuple(map(_device_of, tensors)), tuple(map(_dtype_of, tensors))
    wide = _WIDE.intersection(dtypes) if lanes != torch.float64 else ()
    if not wide and len(set(devices)) == 1:
        return _sumsq_on(devices[0], tensors, dtypes, lanes).to(device)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, (place, dtype) in enumerate(zip(devices, dtypes)):
        groups.setdefault((place, torch.float64 if dtype in wide else lanes), []).append(index)
    sums = torch.empty(len(tensors), dtype=torch.float64, device=device)
    for (place, own_lanes), mine in groups.items():
        found = _sumsq_on(place, [tensors[i] for i in mine], tuple(dtypes[i] for i in mine), own_lanes)
        sums.index_copy_(0, constant(tuple(mine), torch.int64, device), found.to(device))
    return sums


class _Way(IntEnum):
    """What happens to a large tensor, in the order of their rows."""

    AS_IT_IS = 0
    CONVERTED_ALONE = 1
    CONVERTED = 2


class _Large(NamedTuple):
    """A tensor that is not copied behind others, but for its last elements."""

    way: _Way
    which: int
    rows: int  # whole tiles of them
    row: int  # elements
    rest: int  # elements beyond them


class _Joined(NamedTuple):
    """Small tensors of one dtype, each filled up to whole rows with zeros, copied behind each other."""

    dtype: torch.dtype
    parts: tuple[Callable[[Sequence[Tensor]], tuple[Tensor, ...]], ...]  # what each cat copies
    rows: tuple[int, ...]  # of each cat


class _Plan(NamedTuple):
    """How tensors on one device are summed. It depends on their signature and holds none of them.

    Rows come in this order: large tensors by their way, then joined ones, those of converted dtypes first.
    What ``_Joined.parts`` picks from is the tensors, then the rests of large ones, then ``pads``.
    """

    large: tuple[_Large, ...]
    joined: tuple[_Joined, ...]
    converted: frozenset[torch.dtype]  # what vector_norm would convert element by element
    shaped: tuple[int, ...]  # small tensors that are not 1-D
    pads: tuple[Tensor, ...]
    rows: tuple[int, ...]  # that each vector_norm takes
    in_tiles: int  # so many rows, the first, are those of large tensors
    lengths: Tensor  # int64, tiles of every large tensor, then rows of every part of the joined ones
    owners: Tensor | None  # int64, the tensor of each of these; None: the tensors in their order


def _packed(rows: Iterable[int], most: int) -> list[slice]:
    """Consecutive items together, as many as have at most ``most`` rows; at least one."""
    begins, used, number = [], most + 1, 0
    for number, count in enumerate(rows, 1):
        used += count
        if used > most:
            begins.append(number - 1)
            used = count
    return [slice(*ends) for ends in zip(begins, [*begins[1:], number])]


@lru_cache(maxsize=256)
def _plan(
    numels: tuple[int, ...],
    dims: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    lanes: torch.dtype,
    device: torch.device,
) -> _Plan:
    """Large tensors stay where they are; small ones, and what the large ones have beyond whole tiles, are joined."""
    if not all(dtype.is_floating_point for dtype in set(dtypes)):
        raise ValueError(f"one dtype of {set(dtypes)} has no squares to sum")
    on_cpu = device.type == "cpu"
    converted = frozenset(one for one in set(dtypes) if one != lanes and (on_cpu or one.itemsize == 1))
    least = [SMALL_CONVERTED if dtype in converted else SMALL for dtype in dtypes]
    large = [_large(n, size, dtypes[n] in converted) for n, size in enumerate(numels) if size > least[n]]
    large.sort(key=lambda one: one.way)
    rests = [one for one in large if one.rest]

    # Whatever is copied: its place in what is picked from, whose it is, its elements.
    pieces = [(index, index, size) for index, size in enumerate(numels) if size <= least[index]]
    pieces += [(len(numels) + place, one.which, one.rest) for place, one in enumerate(rests)]
    by_dtype: dict[torch.dtype, list[tuple[int, int, int]]] = {}
    for piece in pieces:
        by_dtype.setdefault(dtypes[piece[1]], []).append(piece)
    joined: list[_Joined] = []
    pads: list[Tensor] = []
    pieces = []  # now in the order of their rows
    for dtype in sorted(by_dtype, key=lambda one: one not in converted):
        mine = by_dtype[dtype]
        pieces += mine
        zeros = torch.zeros(ROW, dtype=dtype, device=device)
        lacks = sorted({-size % ROW for _, _, size in mine} - {0})
        pad_of = {lack: [len(numels) + len(rests) + len(pads) + n] for n, lack in enumerate(lacks)}
        pads += [zeros[:lack] for lack in lacks]
        cats = [mine[one] for one in _packed((_rows(size) for *_, size in mine), (COPY if on_cpu else BLOCK) // ROW)]
        rows = [sum(_rows(size) for *_, size in cat) for cat in cats]
        parts = [_picker([n for place, _, size in cat for n in [place, *pad_of.get(-size % ROW, ())]]) for cat in cats]
        joined += [_Joined(dtype, tuple(parts[one]), tuple(rows[one])) for one in _packed(rows, BLOCK // ROW)]

    calls = [rows for one in large if one.way != _Way.CONVERTED for rows in _calls(one)]
    together = sum(one.rows for one in large if one.way == _Way.CONVERTED)
    together += sum(sum(one.rows) for one in joined if one.dtype in converted)
    calls += [BLOCK // ROW] * (together * ROW // BLOCK) + [together % (BLOCK // ROW)] * (together * ROW % BLOCK > 0)
    calls += [sum(one.rows) for one in joined if one.dtype not in converted]
    lengths = [one.rows // TILE for one in large] + [_rows(size) for *_, size in pieces]
    owners = tuple([one.which for one in large] + [owner for _, owner, _ in pieces])
    return _Plan(
        tuple(large),
        tuple(joined),
        converted,
        tuple(index for index, dim in enumerate(dims) if numels[index] <= least[index] and dim != 1),
        tuple(pads),
        tuple(calls),
        sum(one.rows for one in large),
        constant(tuple(lengths), torch.int64, device),
        None if owners == tuple(range(len(numels))) else constant(owners, torch.int64, device),
    )


def _large(which: int, size: int, is_converted: bool) -> _Large:
    """In rows of at most ROW elements that leave no rest, if there are such; in the buffer, all rows are of ROW."""
    for row in range(ROW, ROW // 2, -1) if not is_converted else ():
        if size % (TILE * row) == 0:
            return _Large(_Way.AS_IT_IS, which, size // row, row, 0)
    way = _Way.AS_IT_IS if not is_converted else _Way.CONVERTED_ALONE if size >= ALONE else _Way.CONVERTED
    return _Large(way, which, size // (TILE * ROW) * TILE, ROW, size % (TILE * ROW))


def _calls(one: _Large) -> list[int]:
    """Rows of each of the parts that ``_convert_alone`` makes of a tensor; the whole where it is not converted."""
    most = BLOCK // ROW if one.way == _Way.CONVERTED_ALONE else one.rows
    even = -(-one.rows // -(-one.rows // most))
    return [min(even, one.rows - begin) for begin in range(0, one.rows, even)]


def _rows(size: int) -> int:
    return -(-size // ROW)


def _picker(places: Sequence[int]) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    """Takes what lies at ``places``; itemgetter of one place alone would not make a tuple."""
    return itemgetter(*places) if len(places) > 1 else lambda pool: (pool[places[0]],)


def _sumsq_on(
    device: torch.device, tensors: Sequence[Tensor], dtypes: tuple[torch.dtype, ...], lanes: torch.dtype
) -> Tensor:
    """``tensor_sumsq`` for tensors that all lie on ``device``; none is wider than ``lanes``."""
    pool = list(tensors)
    if set(map(_layout_of, pool)) != {torch.strided} or any(dtype.is_complex for dtype in set(dtypes)):
        plain = [tensor.layout == torch.strided and not tensor.is_complex() for tensor in pool]
        pool = [tensor if kept else flat_values(tensor) for tensor, kept in zip(pool, plain)]
        dtypes = tuple(map(_dtype_of, pool))
    plan = _plan(tuple(map(Tensor.numel, pool)), tuple(map(Tensor.dim, pool)), dtypes, lanes, device)
    # All views first: between sums, which push code out of the caches, an operation takes 10 µs instead of 2.
    for index in plan.shaped:
        pool[index] = pool[index].ravel()
    large: tuple[list[Tensor], ...] = ([], [], [])  # by their way
    for way, index, rows, row, rest in plan.large:
        tensor = pool[index] if pool[index].is_contiguous() else flat_values(pool[index])
        large[way].append(tensor.as_strided((rows, row), (row, 1)))
        if rest:
            pool.append(tensor.as_strided((rest,), (1,), tensor.storage_offset() + rows * row))
    pool += plan.pads
    converted: Iterable[Tensor] = ()
    if plan.converted:
        small = (_join(one, pool, device) for one in plan.joined if one.dtype in plan.converted)
        converted = itertools.chain(
            _convert_alone(large[_Way.CONVERTED_ALONE], lanes, device),
            _convert(itertools.chain(large[_Way.CONVERTED], small), lanes, device),
        )
    joined = (_join(one, pool, device) for one in plan.joined if one.dtype not in plan.converted)
    to_sum = itertools.chain(large[_Way.AS_IT_IS], converted, joined)

    norms, pieces = _norms(plan, lanes, device)
    for values, out in zip(to_sum, pieces, strict=True):
        torch.linalg.vector_norm(values, dim=1, dtype=lanes, out=out)
    if plan.in_tiles:
        tiles = torch.linalg.vector_norm(norms[: plan.in_tiles].view(-1, TILE), dim=1)
        norms = torch.cat([tiles, norms[plan.in_tiles :]])
    sums = segment_sum(norms.double().square_(), plan.lengths)
    if plan.owners is None:
        return sums
    # At most two pieces of each: a + b is b + a, in whatever order they arrive.
    return sums.new_zeros(len(tensors)).index_add_(0, plan.owners, sums)


def _join(one: _Joined, pool: Sequence[Tensor], device: torch.device) -> Tensor:
    """[rows, ROW] in the buffer of the dtype, until the next one of that dtype."""
    rows = _buffer("rows", ROW * sum(one.rows), one.dtype, device).view(-1, ROW)
    for pick, piece in zip(one.parts, rows.split(one.rows)):
        torch.cat(pick(pool), out=piece.view(-1))
    return rows


def _convert_alone(several: Iterable[Tensor], lanes: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """The rows of each [rows, ROW] in ``lanes``, in the middle of the buffer of that dtype, in parts as it has room."""
    buffer = _buffer("rows", BLOCK, lanes, device).view(-1, ROW)
    middles: dict[int, Tensor] = {}  # by their rows: models have many tensors of one size
    for values in several:
        parts = (values,) if len(values) <= len(buffer) else values.chunk(-(-len(values) // len(buffer)))
        for part in parts:
            rows = len(part)
            if rows not in middles:
                begin = (len(buffer) - rows) // 2
                middles[rows] = buffer[begin : begin + rows]
            yield middles[rows].copy_(part)


def _convert(several: Iterable[Tensor], lanes: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """The rows of several [rows, ROW] in ``lanes``, as many at a time as the buffer of that dtype holds."""
    buffer = _buffer("rows", BLOCK, lanes, device).view(-1, ROW)
    used = 0
    for values in several:
        begin = 0
        while begin < len(values):
            end = min(len(values), begin + len(buffer) - used)
            buffer[used : used + end - begin].copy_(values[begin:end])
            used, begin = used + end - begin, end
            if used == len(buffer):
                yield buffer
                used = 0
    if used:
        yield buffer[:used]


def _norms(plan: _Plan, lanes: torch.dtype, device: torch.device) -> tuple[Tensor, Sequence[Tensor]]:
    """[rows], and a piece of it for each vector_norm; kept for the next call, which is usually of the same plan."""
    size = sum(plan.rows)
    if device.type != "cpu" or size > BLOCK:
        norms = torch.empty(size, dtype=lanes, device=device)
        return norms, norms.split(plan.rows)
    kept: tuple[_Plan, Tensor, Sequence[Tensor]] | None = getattr(_local, "norms", None)
    if kept is None or kept[0] is not plan:
        norms = _buffer("norms", size, lanes, device)
        kept = _local.norms = (plan, norms, norms.split(plan.rows))
    return kept[1:]


_local = threading.local()


def _buffer(use: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size]; on the CPU one per thread, use and dtype: fresh memory costs a page fault every 4 KiB."""
    if device.type != "cpu" or size > BLOCK:
        return torch.empty(size, dtype=dtype, device=device)
    name = f"{use} {dtype}"
    found: Tensor | None = getattr(_local, name, None)
    if found is None:
        with torch.inference_mode(False):
            found = torch.empty(BLOCK, dtype=dtype, device=device)
        setattr(_local, name, found)
    return found[:size]
