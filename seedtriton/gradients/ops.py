"""The public operations: they check their arguments, pick the backend and count no step.

``segmented_sumsq`` and ``scale_`` are for everybody; ``record_`` is what one measurement of the monitor is.
All four are registered with ``torch.library`` for torch.compile and torch.export; an eager call does not
go through the dispatcher, which costs 20 µs and more for a list of 300 tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigurationError, WiringError
from . import backend, reference
from .checking import LANES as LANES  # public here
from .checking import check_lanes, check_lists, check_scalable, check_segments, have_squares
from .row import (
    APPEND,
    CLIP_EPS,
    EXPLODING_RMS,
    GUARDED,
    LAYOUT,
    SUMSQ,
    TOTAL_NORM,
    UNSCALED,
    VANISHING_RMS,
    Flat,
    Listed,
    LossScale,
    Outside,
    Rules,
    TensorTable,
    Window,
    coefficients_of,
    kept_of,
)


def backend_of(device: torch.device | str) -> backend.Backend:
    """What runs for tensors on ``device`` ("triton" or "torch"), and why.

    Raises:
        ConfigurationError: ``SEEDTRITON_BACKEND`` asks for what cannot be.
    """
    try:
        return backend.choose(torch.device(device))
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


def segmented_sumsq(
    tensors: Sequence[Tensor],
    segments: Sequence[int],
    num_segments: int,
    *,
    lanes: torch.dtype = torch.float32,
) -> Tensor:
    """Sum of squares by segment: ``out[k]`` = sum of g² over all elements g of the tensors of segment k.

    Args:
        tensors: any shapes, layouts and dtypes, mixed; fp8, bf16, fp16, fp32, fp64, complex and sparse COO.
            Complex numbers count |z|²; elements of an expanded tensor count as often as they appear.
        segments: the segment of each tensor, in [0, num_segments).
        num_segments: length of the result; a segment without tensors is 0.
        lanes: dtype in which squares are first summed: float32, good for magnitudes from 1e-19 to 1e17, or
            float64. Sums of sums are float64 always.

    Returns:
        float64 [num_segments], on the first tensor's device (CPU for an empty list). Within 1e-6 of the
        sum in float64; NaN if and only if an element is NaN, infinite if one is, or if float32 overflowed.

    Raises:
        ConfigurationError: lengths that differ, a segment out of range, a dtype without squares.
        WiringError: an address that a CUDA graph, while it is captured, cannot take up.
    """
    check_lanes(lanes)
    if _traced(tensors):
        check_lists(tensors, segments, num_segments)
        found: Tensor = torch.ops.seedtriton.segmented_sumsq(
            list(tensors), list(segments), num_segments, lanes == torch.float64
        )
        return found
    return _segmented_sumsq(tensors, segments, num_segments, lanes)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor | float) -> None:
    """Multiply every tensor in place by ``coefficient``; exactly 1 leaves memory untouched.

    Args:
        tensors: any shapes and floating dtypes, on any devices.
        coefficient: a number, or a 0-dim floating tensor (on a GPU it is read there, without waiting).

    Raises:
        ConfigurationError: a tensor that overlaps itself (expanded), is not floating point, or a coefficient
            that is not one number.
        WiringError: an address that a CUDA graph, while it is captured, cannot take up.
    """
    tensors = list(tensors)
    if not tensors:
        return
    if not isinstance(coefficient, Tensor):
        if coefficient == 1.0:
            return
        # Filled, because a number that is copied to a GPU waits for it.
        coefficient = torch.full((), float(coefficient), dtype=torch.float64, device=tensors[0].device)
    if coefficient.numel() != 1 or not coefficient.is_floating_point():
        raise ConfigurationError(
            "coefficient must be a number or a floating tensor with one element, got "
            f"{coefficient.dtype} of shape {tuple(coefficient.shape)}"
        )
    coefficient = coefficient.detach().reshape(())
    if _traced(tensors):
        torch.ops.seedtriton.scale_(tensors, coefficient)
    else:
        _scale_impl(tensors, coefficient)


def clip_(gradients: Listed, summary: Tensor, names: Callable[[Tensor], str] | None = None) -> Tensor:
    """Scale every segment by its clip coefficient; for the monitor, in one launch.

    Args:
        gradients: what was measured. Where a guarded segment is not finite, they become zeros.
        summary: float64, as ``record_`` or ``reference.summarize`` made it for these gradients.
        names: as ``record_``'s.

    Returns:
        A copy of its total norm, float32 0-dim: the next measurement overwrites the summary.
    """
    if not gradients.tensors:
        return summary[TOTAL_NORM].float()
    coefficients = coefficients_of(summary)
    if _traced((summary,)):
        torch.ops.seedtriton.scale_segments_(list(gradients.tensors), list(gradients.segments), coefficients)
        return summary[TOTAL_NORM].float()
    total = torch.empty((), dtype=torch.float32, device=summary.device)
    _scale_(gradients, coefficients, clear=True, names=names, copy=(summary[TOTAL_NORM], total))
    return total


def record_(
    gradients: Listed,
    gains: Listed,
    window: Window,
    rules: Rules,
    scale: LossScale = UNSCALED,
    *,
    flat: Flat | None = None,
    names: Callable[[Tensor], str] | None = None,
) -> None:
    """Measure one sample; arguments as ``reference.record_``. For the monitor: it checks nothing again.

    ``flat`` is a buffer of which all gradients are views; ``names`` says what to call a gradient or a gain in an error.

    Raises:
        WiringError: an address that a CUDA graph, while it is captured, cannot take up.
    """
    if _traced((*gradients.tensors[:1], window.ring)):
        # The operation has the tensors of the table alone; what is kept beside them is of the sample before.
        window.table.newest, window.table.numbered = None, False
        torch.ops.seedtriton.record_(
            *map(list, gradients[:2]), *map(list, gains[:2]), *window[:3], *window.table.columns,
            window.table.numbers, rules.max_norm, rules.eps, *scale, rules.lanes == torch.float64,
            rules.vanishing_rms, rules.exploding_rms, list(rules.modes), window.replace,
            None if gradients.entries is None else list(gradients.entries),
        )  # fmt: skip
    else:
        _record_(gradients, gains, window, rules, scale, flat, names)


def _traced(tensors: Sequence[Tensor]) -> bool:
    """Whether somebody is tracing: then the dispatcher has to see one operation, not what it does inside."""
    return torch.compiler.is_compiling() or any(type(t) not in _PLAIN for t in tensors[:1])


_PLAIN = (Tensor, torch.nn.Parameter)


def _segmented_sumsq(
    tensors: Sequence[Tensor], segments: Sequence[int], num_segments: int, lanes: torch.dtype
) -> Tensor:
    if tensors and backend_of(tensors[0].device).name == "triton":
        with suppress(backend.LaunchError):
            # The kernel looks at what the tensors are only when their signature is new; checking each of them
            # here, in every call, would cost more than the launch.
            try:
                return _launch_sumsq(Listed(tensors, segments), num_segments, lanes)
            except ValueError:  # Unsupported, or lists that the check below explains
                check_lists(tensors, segments, num_segments)
            inside, outside = _split(Listed(tensors, segments), tensors[0].device)
            if not inside.tensors:
                return reference.segmented_sumsq(tensors, segments, num_segments, lanes)
            rest = reference.segmented_sumsq(*outside[:2], num_segments, lanes, tensors[0].device)
            return _launch_sumsq(inside, num_segments, lanes, rest.view(-1, 1))
    check_segments(tensors, segments, num_segments)
    try:
        # What is joined with others is summed in a dtype that holds both: integers among them would not be refused.
        if not have_squares(tensors):
            raise ValueError("not every dtype has squares to sum")
        return reference.segmented_sumsq(tensors, segments, num_segments, lanes)
    except ValueError:
        check_lists(tensors, segments, num_segments)
        raise


@contextmanager
def _launching(device: torch.device) -> Iterator[None]:
    """Around a launch: what is wrong with its arguments passes, and of anything else eager torch takes over.

    Not in a CUDA graph that is captured, which such an error has ended, nor when memory has run out.
    """
    from ..kernels import _launch

    try:
        yield
    except (ValueError, _launch.Uncapturable, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise
        backend.give_up(device, error)
        raise backend.LaunchError from error


def _launch_sumsq(listed: Listed, num_segments: int, lanes: torch.dtype, outside: Tensor | None = None) -> Tensor:
    from ..kernels import _launch, gradient_sums

    try:
        with _launching(listed.tensors[0].device):
            return gradient_sums.segmented_sumsq(*listed[:2], num_segments, lanes, outside)
    except _launch.Uncapturable as error:
        raise _named(error, listed.tensors, (), None) from error


def _scale_(
    listed: Listed,
    coefficients: Tensor,
    clear: bool = False,
    names: Callable[[Tensor], str] | None = None,
    copy: tuple[Tensor, Tensor] | None = None,
) -> None:
    """``reference.scale_segments_``, in one launch where it can be; ``copy[0]``, float64, is copied to ``copy[1]``."""
    if backend_of(coefficients.device).name == "triton" and any(map(Tensor.numel, listed.tensors)):
        from ..kernels import gradient_scale

        with suppress(backend.LaunchError):
            try:
                _launch_scale(listed, coefficients, clear, names, copy)
                return
            except gradient_scale.Unsupported:
                check_scalable(listed.tensors)
            inside, outside = _split(listed, coefficients.device)
            # A tensor that is listed twice is scaled twice, which programs side by side cannot do.
            places = [tensor.data_ptr() for tensor in inside.tensors if tensor.numel()]
            if len(set(places)) == len(places):
                _launch_scale(inside, coefficients, clear, names)
                listed = outside
    check_scalable(listed.tensors)
    reference.scale_segments_(listed, coefficients, clear)
    if copy is not None:
        copy[1].copy_(copy[0])


def _launch_scale(
    listed: Listed,
    coefficients: Tensor,
    clear: bool,
    names: Callable[[Tensor], str] | None,
    copy: tuple[Tensor, Tensor] | None = None,
) -> None:
    from ..kernels import _launch, gradient_scale

    try:
        with _launching(coefficients.device):
            gradient_scale.scale_segments_(*listed[:2], coefficients, clear=clear, copy=copy)
    except _launch.Uncapturable as error:
        raise _named(error, listed.tensors, (), names) from error


def _record_(
    gradients: Listed,
    gains: Listed,
    window: Window,
    rules: Rules,
    scale: LossScale,
    flat: Flat | None,
    names: Callable[[Tensor], str] | None,
) -> None:
    device, num_segments = window.ring.device, window.ring.shape[1]
    if backend_of(device).name == "torch" or not _plain(gains.tensors, device):
        reference.record_(gradients, gains, window, rules, scale)
        return
    from ..kernels import gradient_sums

    with suppress(backend.LaunchError):
        try:
            _launch_record(gradients, gains, window, rules, scale, flat, names)
            return
        except gradient_sums.Unsupported:
            inside, rest = _split(gradients, device)
        elements = list(map(Tensor.numel, rest.tensors))
        with torch.no_grad():
            sums = reference.sums_of(rest, rules, device)
            columns = reference.columns_of_sums(sums, elements, rest.segments, num_segments, rules, scale.gradients)
        counts = reference.count_by_segment(elements, rest.segments, num_segments)
        _launch_record(inside, gains, window, rules, scale, None, names, Outside(columns, counts))
        reference.note_tensors_(window.table, window.written, sums, rest.entries)
        reference.quarantine_(rest, window.summary, rules)
        return
    reference.record_(gradients, gains, window, rules, scale)


def _launch_record(
    gradients: Listed,
    gains: Listed,
    window: Window,
    rules: Rules,
    scale: LossScale,
    flat: Flat | None,
    names: Callable[[Tensor], str] | None,
    outside: Outside | None = None,
) -> None:
    from ..kernels import _launch, gradient_sums

    if window.replace != APPEND and not window.table.numbered:
        reference.number_(window, rules.modes)
    try:
        with _launching(window.ring.device):
            gradient_sums.record_(
                gradients, gains, window, rules, scale, layout=LAYOUT, clip_eps=CLIP_EPS, outside=outside, flat=flat
            )
    except _launch.Uncapturable as error:
        raise _named(error, gradients.tensors, gains.tensors, names) from error
    window.table.newest, window.table.numbered = None, True


@torch.no_grad()
def record_sums_(
    sums: Tensor,
    listed: tuple[Sequence[int], Sequence[int]],
    gains: Listed,
    window: Window,
    rules: Rules,
    scale: LossScale = UNSCALED,
    entries: Sequence[int] | None = None,
) -> None:
    """``record_`` for sums that were taken elsewhere. Eager only.

    ``sums`` is float64 [n] on the ring's device, the sum of squares of each tensor, ``listed`` the size and the segment
    of each, ``entries`` as in ``Listed``; the other arguments are ``reference.record_``'s.
    """
    elements, segments = listed
    num_segments = window.ring.shape[1]
    columns = reference.columns_of_sums(sums, elements, segments, num_segments, rules, scale.gradients)
    outside = Outside(columns, reference.count_by_segment(elements, segments, num_segments))
    if backend_of(window.ring.device).name == "torch" or not _plain(gains.tensors, window.ring.device):
        reference.record_sums_(sums, entries, outside, gains, window, rules, scale)
        return
    try:
        _launch_record(Listed((), ()), gains, window, rules, scale, None, None, outside)
    except backend.LaunchError:
        reference.record_sums_(sums, entries, outside, gains, window, rules, scale)
        return
    reference.note_tensors_(window.table, window.written, sums, entries)


@torch.no_grad()
def quarantine_(gradients: Listed, sums: Tensor, rules: Rules) -> None:
    """What ``record_`` does to guarded segments that are not finite; ``sums`` is float64 [n], of each gradient."""
    if any(mode & GUARDED for mode in rules.modes):
        sizes = list(map(Tensor.numel, gradients.tensors))
        columns = reference.columns_of_sums(sums, sizes, gradients.segments, len(rules.modes), rules, None)
        _scale_(gradients, kept_of(reference.summarize(columns[:, SUMSQ], rules)), clear=True)


def _named(
    error: Any, tensors: Sequence[Tensor], gains: Sequence[Tensor], names: Callable[[Tensor], str] | None
) -> WiringError:
    """What an ``Uncapturable`` of the kernels says of a place in a list, said of what lies there."""
    if error.index is None or names is None:
        return WiringError(str(error))
    return WiringError(f"{names((gains if error.gain else tensors)[error.index])} {error.fate}")


def _split(listed: Listed, device: torch.device) -> tuple[Listed, Listed]:
    """What the kernel can take on ``device``, and the rest, each with its segments and entries."""
    from ..kernels import gradient_sums

    tensors, segments, entries = listed
    fits = [gradient_sums.unsupported(tensor, device) is None for tensor in tensors]

    def those(wanted: bool) -> Listed:
        chosen = [index for index, fit in enumerate(fits) if fit is wanted]
        own = chosen if entries is None else [entries[index] for index in chosen]
        return Listed([tensors[index] for index in chosen], [segments[index] for index in chosen], own)

    return those(True), those(False)


def _plain(gains: Sequence[Tensor], device: torch.device) -> bool:
    return all(gain.dtype == torch.float32 and gain.device == device for gain in gains)


def _lanes(wide: bool) -> torch.dtype:
    return torch.float64 if wide else torch.float32


_library = torch.library.Library("seedtriton", "DEF")
_library.define("segmented_sumsq(Tensor[] tensors, int[] segments, int num_segments, bool wide=False) -> Tensor")
_library.define("scale_(Tensor(a!)[] tensors, Tensor coefficient) -> ()")
_library.define(
    "record_(Tensor(e!)[] gradients, int[] segments, Tensor(a!)[] gains, int[] gain_segments, Tensor(b!) ring, "
    "Tensor(c!) count, Tensor(d!) summary, Tensor(f!) sumsq, Tensor(g!) last, Tensor(h!) first, Tensor(i!) numbers, "
    "float max_norm, float eps, Tensor? grad_scale=None, Tensor? gain_scale=None, Tensor? found_inf=None, "
    f"bool wide=False, float vanishing_rms={VANISHING_RMS}, float exploding_rms={EXPLODING_RMS}, int[] modes=[], "
    "int replace=0, int[]? entries=None) -> ()"
)
_library.define("scale_segments_(Tensor(a!)[] tensors, int[] segments, Tensor coefficients) -> ()")


def _segmented_sumsq_impl(
    tensors: list[Tensor], segments: list[int], num_segments: int, wide: bool = False
) -> Tensor:
    return _segmented_sumsq(tensors, segments, num_segments, _lanes(wide))


def _record_impl(
    gradients: list[Tensor],
    segments: list[int],
    gains: list[Tensor],
    gain_segments: list[int],
    ring: Tensor,
    count: Tensor,
    summary: Tensor,
    sumsq: Tensor,
    last: Tensor,
    first: Tensor,
    numbers: Tensor,
    max_norm: float,
    eps: float,
    grad_scale: Tensor | None = None,
    gain_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    wide: bool = False,
    vanishing_rms: float = VANISHING_RMS,
    exploding_rms: float = EXPLODING_RMS,
    modes: Sequence[int] = (),
    replace: int = 0,
    entries: Sequence[int] | None = None,
) -> None:
    window = Window(ring, count, summary, TensorTable(sumsq, last, first, numbers), replace)
    _record_(
        Listed(gradients, segments, entries), Listed(gains, gain_segments), window,
        Rules(max_norm, eps, vanishing_rms, exploding_rms, _lanes(wide), tuple(modes)),
        LossScale(grad_scale, gain_scale, found_inf),
        None, None,
    )  # fmt: skip
    reference.settle_(window.table, count)


def _scale_impl(tensors: list[Tensor], coefficient: Tensor) -> None:
    _scale_(Listed(tensors, [0] * len(tensors)), coefficient.reshape(1))


def _scale_segments_impl(tensors: list[Tensor], segments: list[int], coefficients: Tensor) -> None:
    _scale_(Listed(tensors, segments), coefficients, clear=True)


# CompositeExplicitAutograd: one implementation for every device, sparse ones too; it picks the backend itself.
_library.impl("segmented_sumsq", _segmented_sumsq_impl, "CompositeExplicitAutograd")
# Nothing flows back through a sum that is measured: without this, autograd warns when an input requires grad.
_library.impl("segmented_sumsq", torch.library.fallthrough_kernel, "Autograd")
_library.impl("scale_", _scale_impl, "CompositeExplicitAutograd")
_library.impl("record_", _record_impl, "CompositeExplicitAutograd")
_library.impl("scale_segments_", _scale_segments_impl, "CompositeExplicitAutograd")


@torch.library.register_fake("seedtriton::segmented_sumsq", lib=_library)
def _(tensors: list[Tensor], segments: list[int], num_segments: int, wide: bool = False) -> Tensor:
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.empty(num_segments, dtype=torch.float64, device=device)


@torch.library.register_fake("seedtriton::scale_", lib=_library)
def _(tensors: list[Tensor], coefficient: Tensor) -> None:
    return None


@torch.library.register_fake("seedtriton::record_", lib=_library)
def _(*args: object, **kwargs: object) -> None:
    return None


@torch.library.register_fake("seedtriton::scale_segments_", lib=_library)
def _(*args: object) -> None:
    return None
