"""From a list of tensors to a launch: signatures, device tables, uploads, graph capture.

In the steady state a launch allocates nothing, waits for nothing and uploads nothing. Tables are kept per
(device, stream, ring, signature), the last 32 of them; none of them holds a reference to a gradient.
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from seedtriton.kernels import _plan

# The dtype codes of the kernels' runtime switch.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Tables kept; a training script needs one or two per monitor.
CACHED = 32
# Pinned buffers per table. An upload waits only for the one that was made this many uploads ago.
STAGES = 8
# FMA is asked for by name, because its default changes in Triton 3.10 and the bits with it. num_stages=1:
# more stages would turn plain 128-bit loads into cp.async with 16 to 192 KB of shared memory.
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}

_dtype_of = attrgetter("dtype")
_lock = threading.RLock()


class Unsupported(ValueError):  # noqa: N818 - it is caught as a condition, not reported as a mistake
    """A tensor that the kernels cannot take; ``index`` is its place in the list, ``reason`` says why."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"tensor {index} cannot be taken by the kernel: {reason}")
        self.index = index
        self.reason = reason


class Uncapturable(RuntimeError):  # noqa: N818 - as above
    """Addresses that a CUDA graph, while it is captured, cannot take up.

    Attributes:
        index: place of the one that moved among the tensors, or among the gains; None: never measured before.
        gain: whether it is a gain.
        fate: what happened to it and the way out, to be said after its name.
    """

    def __init__(self, fate: str, index: int | None = None, gain: bool = False) -> None:
        what = "these tensors" if index is None else f"{'gain' if gain else 'tensor'} {index}"
        super().__init__(f"{what} {fate}")
        self.index, self.gain, self.fate = index, gain, fate


class Signature(NamedTuple):
    """What a plan depends on. Addresses are not in it."""

    numels: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    # Shapes and strides, if any tensor is not contiguous: it may be dense today and have holes tomorrow.
    layouts: tuple[tuple[torch.Size, tuple[int, ...]], ...]


class Noted(NamedTuple):
    """Where a launch notes each tensor; none of it changes while tables live.

    Attributes:
        addresses: of the number of samples before, and of sums, last and first samples of the table of tensors.
        entries: the place of each tensor in it; None: the i-th has entry i.
    """

    addresses: tuple[int, ...] = (0,) * _plan.TABLE_ADDRESSES
    entries: tuple[int, ...] | None = None


NOWHERE = Noted()


@triton.jit
def _probe() -> None:
    """Never launched; its type says whether this process interprets."""


# Whether kernels run in Triton's interpreter, on CPU tensors, and not on a device.
INTERPRETED = not isinstance(_probe, triton.runtime.JITFunction)


@lru_cache(maxsize=8)
def warp_size(kind: str) -> int:
    """Threads per warp of the current target: 32, or 64 on AMD's data-centre GPUs; ``kind`` is a device type."""
    width: int = 32 if kind == "cpu" else triton.runtime.driver.active.get_current_target().warp_size
    return width


def unsupported(tensor: Tensor, device: torch.device | None = None) -> str | None:
    """Why the kernels cannot take ``tensor`` (on ``device``, if given), or None when they can."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"it is a {type(tensor).__name__}, not a plain tensor"
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}"
    if tensor.dtype not in DTYPES:
        return f"its dtype is {tensor.dtype}; the kernels take float32, bfloat16 and float16"
    if device is not None and tensor.device != device:
        return f"it is on {tensor.device}, not on {device}"
    if tensor.device.type not in ("cuda", "xpu") and not (INTERPRETED and tensor.device.type == "cpu"):
        return f"it is on {tensor.device}, for which Triton has no compiler here"
    if tensor.is_neg():
        return "it is a lazily negated view"
    if not _dense(tensor):
        return f"its elements overlap or have holes between them (strides {tensor.stride()})"
    if tensor.numel() and tensor.data_ptr() % tensor.element_size():
        return "its address is not a multiple of its element size"
    return None


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of storage without holes and overlaps, in any order of dimensions."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(tensor.stride(), tensor.shape) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _signature(tensors: Sequence[Tensor]) -> Signature:
    # map() over unbound methods: 20 µs for 300 tensors and one property on a 2-core CPU, half of a loop.
    contiguous = all(map(Tensor.is_contiguous, tensors))
    return Signature(
        tuple(map(Tensor.numel, tensors)),
        tuple(map(_dtype_of, tensors)),
        () if contiguous else tuple((t.shape, t.stride()) for t in tensors),
    )


def _check_all(tensors: Sequence[Tensor], device: torch.device) -> None:
    for index, tensor in enumerate(tensors):
        reason = unsupported(tensor, device)
        if reason is not None:
            raise Unsupported(index, reason)


class _AddressTable:
    """int64 values on the device, rewritten through pinned buffers that events guard.

    A pinned buffer must not change while a copy of it is under way, and the copy is asynchronous: each is
    used again only after the event behind its copy has passed.
    """

    def __init__(self, size: int, device: torch.device, module: Any, pin: bool) -> None:
        self.values = torch.zeros(max(size, 1), dtype=torch.int64, device=device)
        self._staged: list[tuple[Tensor, Any, Any]] = []
        self._turn = 0
        self._size = size
        self._module = module
        self._pin = pin

    def write(self, values: Sequence[int]) -> None:
        if not values:
            return
        if self._module is None:
            _view(self.values, self._size)[:] = values
            return
        buffer, view, event = self._next_buffer()
        view[:] = values
        self.values[: self._size].copy_(buffer, non_blocking=True)
        event.record()

    def _next_buffer(self) -> tuple[Tensor, Any, Any]:
        if len(self._staged) < STAGES:
            buffer = torch.empty(self._size, dtype=torch.int64, device="cpu", pin_memory=self._pin)
            self._staged.append((buffer, _view(buffer, self._size), self._module.Event()))
            return self._staged[-1]
        staged = self._staged[self._turn]
        self._turn = (self._turn + 1) % STAGES
        staged[2].synchronize()
        return staged


def _view(buffer: Tensor, size: int) -> Any:
    """The host memory of an int64 tensor as a ctypes array: written without a temporary tensor."""
    return (ctypes.c_int64 * size).from_address(buffer.data_ptr())


class Tables:
    """What launches for one signature need on the device, made once."""

    def __init__(
        self,
        plan: _plan.Plan,
        device: torch.device,
        extras: int,
        outside: Sequence[tuple[int, int]],
        noted: Noted = NOWHERE,
    ) -> None:
        cpu = device.type == "cpu"
        module = None if cpu else torch.get_device_module(device)
        segments = plan.num_segments
        self.plan = plan
        self.kind = device.type
        self.items = len(plan.lengths)
        self.slots = len(plan.tensors)
        # The busy path compares these with the current addresses; None: nothing uploaded yet.
        self.pointers: tuple[int, ...] | None = None
        self.base_offsets: tuple[int, ...] | None = None
        self._addresses = _AddressTable(self.slots + extras, device, module, pin=not cpu)
        columns = (plan.lengths, plan.segments, plan.dtypes, plan.slots, plan.pieces, plan.parts)
        starts = (plan.segment_starts, plan.slot_starts)
        entries = plan.tensors if noted.entries is None else [noted.entries[index] for index in plan.tensors]
        # device="cpu" said: whoever called torch.set_default_device would otherwise be asked.
        host: dict[str, Any] = {"device": "cpu"}
        meta = [value for column in (*columns, *starts, entries or (-1,)) for value in column]
        self._meta = torch.tensor(meta, dtype=torch.int32, **host).to(device)
        tensors, elements = list(plan.tensor_counts), list(plan.element_counts)
        for segment, (more_tensors, more_elements) in enumerate(outside):
            tensors[segment] += more_tensors
            elements[segment] += more_elements
        # Partial sums, closed segments (two columns), the two counts of each segment, what of it is gone, the addresses
        # of the table of tensors, which stay, and marks: as many as there are, no rectangle. The item of a plan without
        # elements marks a tensor that is not there.
        marked = max(self.slots, 1)
        fixed = torch.tensor([*tensors, *elements, *[0] * segments], dtype=torch.float64, **host).view(torch.int64)
        fixed = torch.cat([fixed, torch.tensor(noted.addresses, dtype=torch.int64, **host)]).view(torch.float64)
        begin = self.items + 2 * segments
        self.work = torch.zeros(begin + len(fixed) + marked, dtype=torch.float64, device=device)
        self.work[begin:-marked] = fixed
        self.counters = torch.zeros(segments + 1 + marked, dtype=torch.int32, device=device)
        self.busy_segments = plan.busy_segments
        self.work_address = self.work.data_ptr()
        self.counters_address = self.counters.data_ptr()
        self.addresses = self._addresses.values.data_ptr()
        self.meta = self._meta.data_ptr()
        self._runners: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def upload(self, pointers: tuple[int, ...], tensors: int, extras: Sequence[int]) -> None:
        """Write the addresses of the planned tensors (the first ``tensors`` pointers) and the extra ones."""
        if self.base_offsets is not None:
            values: list[int] = [self.base_offsets[index] for index in self.plan.tensors]
        else:
            values = [pointers[index] for index in self.plan.tensors]
        # Forgotten first: if the copy fails, the table on the device is no longer what it was.
        self.pointers = None
        self._addresses.write([*values, *extras])
        self.pointers = pointers

    def launch(self, kernel: Any, programs: int, arguments: tuple[Any, ...], constants: tuple[Any, ...]) -> None:
        """Launch on the current stream, through the compiled kernel itself from the second time on.

        The JIT's own dispatch looks at every argument again, for 10 to 27 µs (triton#7771); nothing here is
        specialised on values, so one compiled kernel serves all arguments.
        """
        key = (kernel, programs, constants)
        runner = self._runners.get(key)
        if runner is not None:
            runner(*arguments, *constants)
            return
        compiled = kernel[(programs,)](*arguments, *constants, **OPTIONS)
        # The interpreter returns nothing and has nothing to keep.
        if isinstance(compiled, triton.compiler.CompiledKernel):
            self._runners[key] = compiled[(programs, 1, 1)]


class _Cache:
    """The last tables used, and those that CUDA graphs own."""

    def __init__(self) -> None:
        self._recent: OrderedDict[tuple[int, Any], Tables] = OrderedDict()
        # A graph replays with the tables it was captured with, for as long as it lives, which nobody tells
        # us. They leave the cache, so that no upload and no other stream ever touches them, and stay.
        self._captured: dict[Any, list[Tables]] = {}

    def clear(self) -> None:
        self._recent.clear()
        self._captured.clear()

    def __len__(self) -> int:
        return len(self._recent)

    def get(self, stream: int, what: Any) -> Tables | None:
        found = self._recent.get((stream, what))
        if found is not None:
            self._recent.move_to_end((stream, what))
        return found

    def put(self, stream: int, what: Any, tables: Tables) -> None:
        self._recent[(stream, what)] = tables
        while len(self._recent) > CACHED:
            self._recent.popitem(last=False)

    def for_capture(self, what: Any, pointers: tuple[int, ...], tensors: int) -> Tables:
        """Tables that hold exactly these addresses, made before the capture on whatever stream."""
        for tables in self._captured.get(what, ()):
            if tables.pointers == pointers:
                return tables
        known = [(key, tables) for key, tables in self._recent.items() if key[1] == what]
        for key, tables in known:
            if tables.pointers == pointers:
                del self._recent[key]
                self._captured.setdefault(what, []).append(tables)
                return tables
        others = [tables for _, tables in known] + self._captured.get(what, [])
        raise _uncapturable(others, pointers, tensors)


def _uncapturable(known: Sequence[Tables], pointers: tuple[int, ...], tensors: int) -> Uncapturable:
    advice = (
        "addresses cannot be uploaded while a CUDA graph is captured. Run one measurement before the capture "
        "with the very same gradients, and keep them in place: zero_grad(set_to_none=False)"
    )
    # Several may be known: of other streams and graphs, or of a ring that lay at the same address once. The one that
    # differs least says what moved.
    tables = max(known, key=lambda each: sum(map(int.__eq__, each.pointers or (), pointers)), default=None)
    for index, (old, new) in enumerate(zip((tables and tables.pointers) or (), pointers)):
        if old != new:
            gain = index >= tensors
            fate = f"moved from {old:#x} to {new:#x} since the last measurement; {advice}"
            return Uncapturable(fate, index - tensors if gain else index, gain)
    return Uncapturable(f"were not measured before the capture; {advice}")


_cache = _Cache()


def release() -> None:
    """Drop all tables and workspaces, those of captured graphs too: no graph may be replayed afterwards.

    Also the way back to clean counters after a kernel was killed half way.
    """
    with _lock:
        _cache.clear()


def guard(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` current for a launch; free when it already is."""
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    if module.current_device() == device.index:
        return nullcontext()
    context: AbstractContextManager[Any] = module.device(device.index)
    return context


def lock() -> AbstractContextManager[Any]:
    """Held from the look-up of tables to the launch, because an upload in between would change them."""
    return _lock


def _stream(device: torch.device) -> tuple[int, bool]:
    """The current stream's handle, and whether it is being captured."""
    if device.type == "cpu":
        return 0, False
    module = torch.get_device_module(device)
    capturing = getattr(module, "is_current_stream_capturing", None)
    stream: int = triton.runtime.driver.active.get_current_stream(device.index)
    return stream, capturing is not None and capturing()


def find_tables(
    tensors: Sequence[Tensor],
    segments: Sequence[int],
    num_segments: int,
    device: torch.device,
    domain: tuple[Any, ...],
    extra_pointers: Sequence[int] = (),
    extras: Sequence[int] = (),
    outside: Sequence[tuple[int, int]] = (),
    flat: Tensor | None = None,
    settled: bool = True,
    distinct: bool = False,
    noted: Noted = NOWHERE,
) -> Tables:
    """Tables with the current addresses of ``tensors`` in them; the current device must be ``device``.

    Args:
        tensors: as the caller got them; what they are is checked whenever the signature is new.
        segments: of each tensor.
        num_segments: how many segments there are.
        device: where all tensors lie.
        domain: what else keeps launches apart: the kernel's name, the ring's address, the gains' segments.
        extra_pointers: compared like the tensors' addresses, and named "gain" in errors.
        extras: written to the table behind the tensors' addresses, always as many.
        outside: (tensors, elements) of each segment that the kernel does not see but the row counts.
        flat: a buffer of which all tensors are views.
        settled: they never move within it, and are not looked at. False: their places are compared in every call.
        distinct: refuse two tensors at one address, which a kernel that writes would race on.
        noted: where each tensor is noted; belongs into ``domain`` too.
    """
    stream, capturing = _stream(device)
    if flat is None:
        pointers, signature = _moving_signature(tensors)
    elif settled:
        pointers, signature = _flat_signature(tensors, flat)
    else:
        pointers, signature = _placed_signature(tensors, flat)
    segments = tuple(segments)
    what = (domain, device.index, num_segments, segments, tuple(outside), signature)
    pointers = (*pointers, *extra_pointers)
    if capturing:
        return _cache.for_capture(what, pointers, len(pointers) - len(extra_pointers))
    tables = _cache.get(stream, what)
    if tables is None:
        tables = _make_tables(tensors, segments, num_segments, device, len(extras), outside, noted)
        if flat is not None:
            tables.base_offsets = _flat_offsets(tensors, flat)
        _cache.put(stream, what, tables)
    elif tables.pointers == pointers:
        return tables
    elif flat is None:
        _check_moved(tensors, pointers, device)
    else:
        tables.base_offsets = _flat_offsets(tensors, flat)
    if distinct:
        _check_distinct(tensors)
    with torch.inference_mode(False), torch.no_grad():
        tables.upload(pointers, len(tensors), extras)
    return tables


def _make_tables(
    tensors: Sequence[Tensor],
    segments: Sequence[int],
    num_segments: int,
    device: torch.device,
    extras: int,
    outside: Sequence[tuple[int, int]],
    noted: Noted,
) -> Tables:
    """Tables for tensors of a new signature, which are looked at one by one; no address is in them yet."""
    _check_all(tensors, device)
    plan = _plan.make_plan([t.numel() for t in tensors], [DTYPES[t.dtype] for t in tensors], segments, num_segments)
    # inference_mode(False): tables made inside somebody's inference block are used outside as well.
    with torch.inference_mode(False), torch.no_grad():
        return Tables(plan, device, extras, outside, noted)


def _moving_signature(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], Any]:
    try:
        pointers, signature = tuple(map(Tensor.data_ptr, tensors)), _signature(tensors)
    except (RuntimeError, NotImplementedError):
        # Sparse tensors and the like have no address; say which one it was.
        for index, tensor in enumerate(tensors):
            reason = unsupported(tensor)
            if reason is not None:
                raise Unsupported(index, reason) from None
        raise
    if not all(pointers):  # what stands for other tensors (DTensor) gives 0, whatever signature is known
        for index, (tensor, pointer) in enumerate(zip(tensors, pointers)):
            if not pointer and tensor.numel():
                raise Unsupported(index, unsupported(tensor) or "it has elements and no address")
    return pointers, signature


def _flat_signature(tensors: Sequence[Tensor], flat: Tensor) -> tuple[tuple[int, ...], Any]:
    """No look at every tensor: the caller promises views that stay; the ends catch a list that changed."""
    start = flat.data_ptr()
    ends = (tensors[0].data_ptr() - start, tensors[-1].data_ptr() - start) if tensors else ()
    return (), ("flat", flat.numel(), flat.dtype, len(tensors), ends)


def _placed_signature(tensors: Sequence[Tensor], flat: Tensor) -> tuple[tuple[int, ...], Any]:
    """As ``_moving_signature``, with places in the buffer for addresses: a buffer that moved is no change."""
    pointers, signature = _moving_signature(tensors)
    start = flat.data_ptr()
    return tuple([pointer - start for pointer in pointers]), ("placed", flat.device, flat.dtype, signature)


def _flat_offsets(tensors: Sequence[Tensor], flat: Tensor) -> tuple[int, ...]:
    start, size = flat.data_ptr(), flat.numel() * flat.element_size()
    offsets = tuple(t.data_ptr() - start if t.numel() else 0 for t in tensors)
    for index, (offset, tensor) in enumerate(zip(offsets, tensors)):
        if offset < 0 or offset + tensor.numel() * tensor.element_size() > size:
            raise ValueError(
                f"tensor {index} does not lie in the flat buffer; pass flat=None, or views of that buffer only"
            )
    return offsets


def _check_moved(tensors: Sequence[Tensor], pointers: Sequence[int], device: torch.device) -> None:
    """The little that can go wrong when shapes and dtypes are known and only addresses are new."""
    for index, (tensor, pointer) in enumerate(zip(tensors, pointers)):
        if tensor.device != device or pointer % tensor.itemsize:
            raise Unsupported(index, unsupported(tensor, device) or "it moved to an odd address")


def _check_distinct(tensors: Sequence[Tensor]) -> None:
    seen: dict[int, int] = {}
    for index, tensor in enumerate(tensors):
        first = seen.setdefault(tensor.data_ptr(), index) if tensor.numel() else index
        if first != index:
            raise Unsupported(index, f"it lies where tensor {first} does")
