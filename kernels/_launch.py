"""From a list of tensors to a launch: what they are, their signature, the tables that hold their addresses.

In the steady state a launch allocates nothing, waits for nothing and uploads nothing.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from seedtriton.kernels import _plan
from seedtriton.kernels._known import Key, KnownLists
from seedtriton.kernels._tables import NOWHERE, OPTIONS, Noted, Tables, Uncapturable, _Cache

__all__ = ["NOWHERE", "OPTIONS", "Noted", "Tables", "Uncapturable", "Unsupported", "find_tables", "unsupported"]

# The dtype codes of the kernels' runtime switch.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Types that are what they say; every other one may stand for something else.
PLAIN = frozenset((Tensor, torch.nn.Parameter))

_dtype_of = attrgetter("dtype")
_lock = threading.RLock()


class Unsupported(ValueError):  # noqa: N818 - it is caught as a condition, not reported as a mistake
    """A tensor that the kernels cannot take; ``index`` is its place in the list, ``reason`` says why."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"tensor {index} cannot be taken by the kernel: {reason}")
        self.index = index
        self.reason = reason


class Signature(NamedTuple):
    """What a plan depends on. Addresses are not in it."""

    numels: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    # Shapes and strides, if any tensor is not contiguous: it may be dense today and have holes tomorrow.
    layouts: tuple[tuple[torch.Size, tuple[int, ...]], ...]


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
    if type(tensor) not in PLAIN:
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


def _check_all(tensors: Sequence[Tensor], device: torch.device | None = None) -> None:
    for index, tensor in enumerate(tensors):
        reason = unsupported(tensor, device)
        if reason is not None:
            raise Unsupported(index, reason)


_cache = _Cache()
_known = KnownLists()


def release() -> None:
    """Drop all tables and workspaces, those of captured graphs too: no graph may be replayed afterwards."""
    with _lock:
        _cache.clear()
        _known.clear()


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


def _stream(device: torch.device) -> tuple[int, int]:
    """The current stream's handle, and the number of the capture that it is in; 0: none."""
    if device.type == "cpu":
        return 0, 0
    module = torch.get_device_module(device)
    capturing = getattr(module, "is_current_stream_capturing", None)
    stream: int = triton.runtime.driver.active.get_current_stream(device.index)
    return stream, capture_number(stream) if capturing is not None and capturing() else 0


def capture_number(stream: int) -> int:
    """By which the driver tells captures apart: torch says only that there is one.

    1 for all of them where it does not say; then two graphs over the same tensors must not be replayed side by side.
    """
    library, name = ("libamdhip64.so", "hip") if torch.version.hip else ("libcuda.so.1", "cu")
    try:
        ask = ctypes.CDLL(library)[f"{name}StreamGetCaptureInfo_v2"]
    except (OSError, AttributeError):
        return 1
    status, number = ctypes.c_int(), ctypes.c_uint64()
    error = ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
    return 1 if error else number.value


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
    stream, capture = _stream(device)
    what, pointers = _look(tensors, segments, (domain, device.index, num_segments, tuple(outside)), flat, settled)
    pointers = (*pointers, *extra_pointers)
    if capture:
        return _cache.for_capture((capture, stream), what, pointers, len(pointers) - len(extra_pointers))
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


def _look(
    tensors: Sequence[Tensor],
    segments: Sequence[int],
    others: tuple[Any, ...],
    flat: Tensor | None,
    settled: bool,
) -> tuple[Key, tuple[int, ...]]:
    """What tables are kept by, ``others`` among it, and where the tensors are: in the buffer, if there is one."""
    if flat is not None and settled:
        return Key(*others, tuple(segments), _flat_signature(tensors, flat)), ()
    if flat is not None:
        others = (*others, flat.device, flat.dtype)
    key = _known.find(others, tensors, segments)
    if key is not None:
        pointers = tuple(map(Tensor.data_ptr, tensors))
    else:
        pointers, signature = _moving_signature(tensors)
        segments = tuple(segments)
        key = Key(*others, segments, signature)
        _known.keep(others, tensors, segments, key)
    if not all(pointers):
        _refuse_homeless(tensors, pointers)
    if flat is not None:  # places for addresses: a buffer that moved is no change
        start = flat.data_ptr()
        pointers = tuple([pointer - start for pointer in pointers])
    return key, pointers


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
        _check_all(tensors)  # sparse tensors and the like have no address; say which one it was
        raise
    # What a signature does not say, and may differ between tensors of one: what stands for other tensors has another
    # type; a lazy minus is no part of the memory.
    if not PLAIN.issuperset(map(type, tensors)) or any(map(Tensor.is_neg, tensors)):
        _check_all(tensors)
    return pointers, signature


def _refuse_homeless(tensors: Sequence[Tensor], pointers: Sequence[int]) -> None:
    for index, (tensor, pointer) in enumerate(zip(tensors, pointers)):
        if not pointer and tensor.numel():
            raise Unsupported(index, unsupported(tensor) or "it has elements and no address")


def _flat_signature(tensors: Sequence[Tensor], flat: Tensor) -> tuple[Any, ...]:
    """No look at every tensor: the caller promises views that stay; the ends catch a list that changed."""
    start = flat.data_ptr()
    ends = (tensors[0].data_ptr() - start, tensors[-1].data_ptr() - start) if tensors else ()
    return "flat", flat.numel(), flat.dtype, len(tensors), ends


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
