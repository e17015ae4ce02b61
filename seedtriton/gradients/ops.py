"""The public operations: they check their arguments, pick the backend and count no step.

``segmented_sumsq`` and ``scale_`` are for everybody; ``record_`` is what one measurement of the monitor is.
All three are registered with ``torch.library`` for torch.compile and torch.export; an eager call does not
go through the dispatcher, which costs 20 µs and more for a list of 300 tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigurationError, WiringError
from . import backend, reference
from .row import (
    CLIP_EPS,
    EXPLODING_RMS,
    LAYOUT,
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
)

LANES = (torch.float32, torch.float64)


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
    """
    _check_lanes(lanes)
    if _traced(tensors):
        _check_lists(tensors, segments, num_segments)
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
    """
    tensors = list(tensors)
    if not tensors:
        return
    if not isinstance(coefficient, Tensor):
        if coefficient == 1.0:
            return
        coefficient = torch.tensor(float(coefficient), dtype=torch.float64, device=tensors[0].device)
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
        torch.ops.seedtriton.record_(
            *map(list, gradients[:2]), *map(list, gains[:2]), *window[:3], *window.table.columns, rules.max_norm,
            rules.eps, *scale, rules.lanes == torch.float64, rules.vanishing_rms, rules.exploding_rms,
            list(rules.modes), None if gradients.entries is None else list(gradients.entries),
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
        from ..kernels import gradient_sums

        # The kernel looks at what the tensors are only when their signature is new; checking each of them
        # here, in every call, would cost more than the launch.
        try:
            return gradient_sums.segmented_sumsq(tensors, segments, num_segments, lanes)
        except ValueError:  # Unsupported, or lists that the check below explains
            _check_lists(tensors, segments, num_segments)
        inside, outside = _split(Listed(tensors, segments), tensors[0].device)
        if not inside.tensors:
            return reference.segmented_sumsq(tensors, segments, num_segments, lanes)
        rest = reference.segmented_sumsq(*outside[:2], num_segments, lanes, tensors[0].device)
        return gradient_sums.segmented_sumsq(*inside[:2], num_segments, lanes, rest.view(-1, 1))
    _check_segments(tensors, segments, num_segments)
    try:
        return reference.segmented_sumsq(tensors, segments, num_segments, lanes)
    except ValueError:
        _check_lists(tensors, segments, num_segments)
        raise


def _scale_(
    listed: Listed,
    coefficients: Tensor,
    clear: bool = False,
    names: Callable[[Tensor], str] | None = None,
    copy: tuple[Tensor, Tensor] | None = None,
) -> None:
    """``reference.scale_segments_``, in one launch where it can be; ``copy[0]``, float64, is copied to ``copy[1]``."""
    if backend_of(coefficients.device).name == "triton" and any(map(Tensor.numel, listed.tensors)):
        from ..kernels import _launch, gradient_scale

        try:
            gradient_scale.scale_segments_(*listed[:2], coefficients, clear=clear, copy=copy)
        except gradient_scale.Unsupported:
            _check_scalable(listed.tensors)
            inside, outside = _split(listed, coefficients.device)
            # A tensor that is listed twice is scaled twice, which programs side by side cannot do.
            places = [tensor.data_ptr() for tensor in inside.tensors if tensor.numel()]
            if len(set(places)) == len(places):
                gradient_scale.scale_segments_(*inside[:2], coefficients, clear=clear)
                listed = outside
        except _launch.Uncapturable as error:
            raise _named(error, listed.tensors, (), names) from error
        else:
            return
    _check_scalable(listed.tensors)
    reference.scale_segments_(listed, coefficients, clear)
    if copy is not None:
        copy[1].copy_(copy[0])


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

    try:
        _launch_record(gradients, gains, window, rules, scale, flat, names)
    except gradient_sums.Unsupported:
        inside, rest = _split(gradients, device)
        elements = list(map(Tensor.numel, rest.tensors))
        with torch.no_grad():
            sums = reference.sums_of(rest, rules, device)
        columns = reference.columns_of_sums(sums, elements, rest.segments, num_segments, rules, scale.gradients)
        counts = reference.count_by_segment(elements, rest.segments, num_segments)
        reference.note_tensors_(window.table, window.written + 1, sums, rest.entries)
        _launch_record(inside, gains, window, rules, scale, None, names, Outside(columns, counts))
        reference.quarantine_(rest, window.summary, rules)


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

    window.table.newest = None
    try:
        gradient_sums.record_(
            gradients, gains, window, rules, scale, layout=LAYOUT, clip_eps=CLIP_EPS, outside=outside, flat=flat
        )
    except _launch.Uncapturable as error:
        raise _named(error, gradients.tensors, gains.tensors, names) from error


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
        reference.keep_tensors_(window, sums, columns, entries)
        reference.finish_(outside, gains, window, rules, scale)
        return
    reference.note_tensors_(window.table, window.written + 1, sums, entries)
    _launch_record(Listed((), ()), gains, window, rules, scale, None, None, outside)


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


def _check_segments(tensors: Sequence[Tensor], segments: Sequence[int], num_segments: int) -> None:
    if len(tensors) != len(segments):
        raise ConfigurationError(f"{len(tensors)} tensors but {len(segments)} segments: give one for each")
    if num_segments < 1:
        raise ConfigurationError(f"num_segments must be at least 1, got {num_segments}")
    if segments and not 0 <= min(segments) <= max(segments) < num_segments:
        index = next(index for index, segment in enumerate(segments) if not 0 <= segment < num_segments)
        raise ConfigurationError(f"segment {segments[index]} of tensor {index} is outside [0, {num_segments})")


def _check_lists(tensors: Sequence[Tensor], segments: Sequence[int], num_segments: int) -> None:
    _check_segments(tensors, segments, num_segments)
    if not _are_gradients(tensors):
        for index, tensor in enumerate(tensors):
            _check_tensor(index, tensor)


def _are_gradients(tensors: Sequence[Tensor]) -> bool:
    """``_check_tensor`` of each kind once: of each tensor it would take longer than to scale a small one."""
    layouts, dtypes = {tensor.layout for tensor in tensors}, {tensor.dtype for tensor in tensors}
    return layouts <= _LAYOUTS and all(map(_has_squares, dtypes))


_LAYOUTS = {torch.strided, torch.sparse_coo}


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


def _check_scalable(tensors: Sequence[Tensor]) -> None:
    # The loop takes longer than scaling small tensors: not for contiguous ones of common kinds.
    if _are_gradients(tensors) and all(map(Tensor.is_contiguous, tensors)):
        return
    for index, tensor in enumerate(tensors):
        _check_tensor(index, tensor)
        if tensor.layout == torch.strided and reference.overlaps_itself(tensor):
            raise ConfigurationError(
                f"tensor {index} (shape {tuple(tensor.shape)}, strides {tensor.stride()}) has elements that "
                "share memory; scaling it in place would scale them more than once: pass a contiguous tensor"
            )


def _check_lanes(lanes: torch.dtype) -> None:
    if lanes not in LANES:
        raise ConfigurationError(f"lanes must be one of {LANES}, got {lanes}")


def _lanes(wide: bool) -> torch.dtype:
    return torch.float64 if wide else torch.float32


_library = torch.library.Library("seedtriton", "DEF")
_library.define("segmented_sumsq(Tensor[] tensors, int[] segments, int num_segments, bool wide=False) -> Tensor")
_library.define("scale_(Tensor(a!)[] tensors, Tensor coefficient) -> ()")
_library.define(
    "record_(Tensor(e!)[] gradients, int[] segments, Tensor(a!)[] gains, int[] gain_segments, Tensor(b!) ring, "
    "Tensor(c!) count, Tensor(d!) summary, Tensor(f!) sumsq, Tensor(g!) last, Tensor(h!) first, float max_norm, "
    "float eps, Tensor? grad_scale=None, Tensor? gain_scale=None, Tensor? found_inf=None, bool wide=False, "
    f"float vanishing_rms={VANISHING_RMS}, float exploding_rms={EXPLODING_RMS}, int[] modes=[], "
    "int[]? entries=None) -> ()"
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
    max_norm: float,
    eps: float,
    grad_scale: Tensor | None = None,
    gain_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    wide: bool = False,
    vanishing_rms: float = VANISHING_RMS,
    exploding_rms: float = EXPLODING_RMS,
    modes: Sequence[int] = (),
    entries: Sequence[int] | None = None,
) -> None:
    window = Window(ring, count, summary, TensorTable(sumsq, last, first))
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
