"""Gradients that live in one buffer: our own, or one that is already there, such as a DDP bucket.

One buffer per device and dtype is zeroed by one operation, and the kernel finds all gradients in it by
one address. Nothing here waits for a device, and training stays bit for bit as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import ConfigurationError, WiringError
from .noticing import Snapshot
from .ops import backend_of
from .parameters import CallOnLoad, Parameters, ParameterSource, Part
from .row import Flat
from .tensor_sums import is_dense

logger = logging.getLogger("seedtriton")

# Bytes to which every view is aligned: the kernel reads 128 bits at a time only from such addresses.
ALIGNMENT = 16

_Key = tuple[torch.device, torch.dtype]
_PLAIN = (Tensor, nn.Parameter)


class FlatGradients:
    """Keeps the gradients of one device and dtype in one buffer, of which every ``p.grad`` is a view.

    A view has the shape and the strides of its parameter (contiguous where the parameter has holes or
    overlaps) and starts at a multiple of 16 bytes; the padding in between is zero, and so is the place of a
    parameter without a gradient. A gradient kept from an earlier step is such a view and changes: clone it.

    Backward adds into the views as long as they are there, so a loop that calls ``zero_()`` needs nothing
    else. One that calls ``zero_grad(set_to_none=True)`` calls ``restore()`` after backward. Construction puts
    a view of zeros where there is no gradient yet, as ``zero_()`` does.

    Under DDP with ``gradient_as_bucket_view=True`` the gradients live in DDP's buffers and would be copied
    back and forth: use ``flat_buffer_of`` there instead.

    Args:
        model_or_parameters: a module, a parameter, or an iterable of either. Those that require a gradient
            take part, tied ones once, empty ones not.

    Raises:
        ConfigurationError: a parameter that is not floating point, not a plain dense leaf (DTensor, lazy), or
            of an embedding with ``sparse=True``. Of a parameter that is given without its module the sparse
            gradient is added to the dense view, which is right for every optimizer but SparseAdam.
        WiringError: no parameter requires a gradient, or an existing gradient is sparse.
    """

    def __init__(self, model_or_parameters: Parameters) -> None:
        """Lay out the buffers; gradients that exist move into them."""
        if not isinstance(model_or_parameters, (nn.Module, Tensor, Part)):
            model_or_parameters = tuple(model_or_parameters)  # a generator runs once
        self._items = model_or_parameters
        self._source = ParameterSource(model_or_parameters)
        self._flats: list[_Flat] = []
        self._placed: frozenset[int] = frozenset()
        self._outside: dict[Tensor, tuple[str, str]] = {}  # added later, and without a place
        self._handles: list[Any] = []
        self.refresh()
        self.restore(missing="zero")

    @property
    def buffers(self) -> Mapping[_Key, Tensor]:
        """(device, dtype) -> 1-D tensor with all gradients of that kind, as the last ``restore()`` left it."""
        return MappingProxyType({flat.key: flat.buffer for flat in self._flats})

    @property
    def buffer(self) -> Tensor:
        """The buffer, 1-D, when all gradients have one device and dtype.

        Raises:
            WiringError: there are several.
        """
        if len(self._flats) > 1:
            kinds = ", ".join(f"{flat.buffer.dtype} on {flat.buffer.device}" for flat in self._flats)
            raise WiringError(f"there are {len(self._flats)} buffers, not one ({kinds}): use `buffers`")
        return self._flats[0].buffer

    def places(self) -> frozenset[int]:
        """``id`` of every parameter that has a place."""
        return self._placed

    @torch.no_grad()
    def restore(self, missing: Literal["leave", "zero"] = "leave") -> int:
        """Put every gradient that lies elsewhere into its view, and the view into ``p.grad``; never waits.

        A gradient that backward allocated after ``zero_grad(set_to_none=True)`` is copied, with the same bits;
        what is in its place already is not touched. What autograd recorded for a second derivative
        (``create_graph=True``) is not kept. Call it outside compiled functions.

        Args:
            missing: what becomes of ``p.grad`` None. "leave": it stays None, so that optimizers skip the
                parameter and a monitor sees that it had no gradient; its place in the buffer becomes zero, and
                the next ``zero_()``, or ``restore()`` after a backward that reaches it, attaches it again.
                "zero": a view of zeros, unless the parameter was frozen since.

        Returns:
            How many gradients were moved or newly attached.

        Raises:
            ConfigurationError: ``missing`` is neither.
            WiringError: a parameter was converted or replaced, or its gradient is sparse or of another dtype;
                nothing has changed.
        """
        if missing not in ("leave", "zero"):
            raise ConfigurationError(f"missing must be 'leave' or 'zero', got {missing!r}")
        self._follow()
        astray, absent = self._look()
        # One gradient may lie in the place of another; it is saved before anything is written.
        values = [gradient.clone() if self._holds(gradient) else gradient for _, _, gradient in astray]
        for (flat, place, _), value in zip(astray, values):
            flat.attach(place).copy_(value)
        attached = 0
        for flat, place in absent:
            if not place.blank:
                flat.view(place).zero_()
                place.blank = True
            if missing == "zero" and place.parameter.requires_grad:
                flat.attach(place)
                attached += 1
        return len(astray) + attached

    @torch.no_grad()
    def zero_(self) -> None:
        """Zero all gradients, one operation per buffer, and attach every view: ``zero_grad`` in one stroke.

        As with ``zero_grad(set_to_none=False)``, a parameter that backward does not reach then has a gradient
        of zeros, not none. A parameter that was frozen since gets None, so that no optimizer moves it.

        Raises:
            WiringError: a parameter was converted or replaced; nothing has changed.
        """
        self._follow()
        astray, absent = self._look(dense=False)
        for flat in self._flats:
            flat.buffer.zero_()
        for flat, place in [(flat, place) for flat, place, _ in astray] + absent:
            flat.attach(place)
        for parameter in self._outside:
            parameter.grad = None
        for flat in self._flats:
            for place in flat.places:
                if not place.parameter.requires_grad:
                    place.parameter.grad, place.blank = None, True

    def refresh(self) -> None:
        """Lay the buffers out anew, with the gradients as they are: after a change to the parameters.

        Needed after ``.to()``, loads with ``assign=True`` and whatever else replaces parameters. What was unfrozen or
        added is found by ``zero_()`` and ``restore()``, which then do this themselves. Addresses change, so no CUDA
        graph captured before may be replayed.

        Raises:
            ConfigurationError: as the constructor.
            WiringError: as the constructor; gradients and buffers are as they were.
        """
        wanted, unfit = self._sorted()
        if unfit:
            name, reason = next(iter(unfit.values()))
            raise ConfigurationError(f"{name} cannot have a flat gradient: {reason}, or leave it out")
        self._lay_out(wanted)

    def _lay_out(self, wanted: Sequence[tuple[str, Tensor]]) -> None:
        places = [_Place(name, parameter) for name, parameter in wanted]
        if not places:
            raise WiringError(
                "no parameter requires a gradient: there is nothing to keep; build FlatGradients after unfreezing"
            )
        kinds: dict[_Key, list[_Place]] = {}
        for place in places:
            if place.parameter.grad is not None:
                place.check_gradient(place.parameter.grad)
            kinds.setdefault(place.key, []).append(place)
        # inference_mode(False): backward could not add into buffers made inside somebody's inference block.
        with torch.inference_mode(False), torch.no_grad():
            flats = [_Flat(key, members) for key, members in kinds.items()]
            for flat in flats:
                for place in flat.places:
                    gradient = place.parameter.grad
                    if gradient is not None:
                        flat.attach(place).copy_(gradient)
            # What no longer takes part must not keep the whole old buffer alive.
            for old in self._flats:
                for place in old.places:
                    gradient = place.parameter.grad
                    if gradient is not None and gradient is place.attached:
                        place.parameter.grad = gradient.clone()
        self._flats = flats
        self._placed = frozenset(id(place.parameter) for place in places)
        self._look_again()
        for handle in self._handles:
            handle.remove()
        hook = CallOnLoad(self._mark_stale)
        self._handles = [module.register_load_state_dict_post_hook(hook) for module in self._source.modules()]
        self._stale = False

    def __reduce__(self) -> tuple[type[FlatGradients], tuple[Parameters]]:
        """A copy lays out its own buffers for the copied parameters, whose gradients torch does not copy."""
        return type(self), (self._items,)

    def _sorted(self) -> tuple[list[tuple[str, Tensor]], dict[Tensor, tuple[str, str]]]:
        """Name and tensor of every parameter that takes part, each once; those that cannot, with their name and why."""
        sparse = {id(m.weight) for m in self._source.modules() if isinstance(m, _EMBEDDINGS) and m.sparse}
        found: dict[int, tuple[str, Tensor]] = {}
        unfit: dict[Tensor, tuple[str, str]] = {}
        for name, parameter in self._source.named():
            if not parameter.requires_grad or id(parameter) in found:
                continue
            reason = _unusable(parameter)
            if reason is None and id(parameter) in sparse:
                reason = "the gradients of its embedding are sparse; build the embedding with sparse=False"
            if reason is not None:
                unfit.setdefault(parameter, (name, reason))
            elif parameter.numel():
                found[id(parameter)] = name, parameter
        return list(found.values()), unfit

    def _look(self, dense: bool = True) -> tuple[list[tuple[_Flat, _Place, Tensor]], list[tuple[_Flat, _Place]]]:
        """The gradients that lie elsewhere, and the places of those that are None; changes nothing."""
        astray: list[tuple[_Flat, _Place, Tensor]] = []
        absent: list[tuple[_Flat, _Place]] = []
        for flat in self._flats:
            start = flat.buffer.data_ptr()
            for place in flat.places:
                parameter = place.parameter
                gradient = parameter.grad
                # The address too: Module.to() puts other data into the very same tensor.
                if (
                    gradient is not None
                    and gradient is place.attached
                    and gradient.data_ptr() == start + place.start
                    and parameter.dtype is place.layout.dtype
                ):
                    continue
                place.check_parameter()
                if gradient is None:
                    absent.append((flat, place))
                    continue
                if dense:
                    place.check_gradient(gradient)
                astray.append((flat, place, gradient))
        return astray, absent

    def _holds(self, gradient: Tensor) -> bool:
        address = gradient.untyped_storage().data_ptr()
        return any(flat.buffer.untyped_storage().data_ptr() == address for flat in self._flats)

    def _mark_stale(self) -> None:
        self._stale = True

    def _look_again(self) -> None:
        self._snapshot = Snapshot(self._source.modules(), {0: dict(self._source.named())})

    def _follow(self) -> None:
        """Give a place to what was unfrozen or added since; WiringError when a parameter was replaced."""
        if not self._stale and self._snapshot.stands() and self._snapshot.flags_stand():
            return
        self._check_replaced()
        places = self.places()
        wanted, unfit = self._sorted()
        for name, reason in (unfit[parameter] for parameter in unfit.keys() - self._outside.keys()):
            logger.warning("%s was added and cannot have a flat gradient: %s. zero_() sets it to None", name, reason)
        self._outside = unfit
        if any(id(parameter) not in places for _, parameter in wanted):
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise WiringError("parameters were unfrozen or added: call refresh() before a CUDA graph is captured")
            self._lay_out(wanted)
        self._look_again()

    def _check_replaced(self) -> None:
        present = {id(parameter) for parameter in self._source.parameters()}
        for flat in self._flats:
            for place in flat.places:
                if id(place.parameter) not in present:
                    raise WiringError(
                        f"{place.name} was replaced, as load_state_dict(assign=True) or .to() may do; "
                        "call refresh(), and give the optimizer the new parameters"
                    )
        self._stale = False


def flat_place(
    flat: FlatGradients | Literal["auto"] | None, gradients: Sequence[Tensor], watched: Mapping[int, object]
) -> Flat | None:
    """The buffer in which all of ``gradients`` lie, if they do and somebody is going to use it.

    With "auto" whether they do, and where, is looked at in every call, because DDP moves them. That look costs time on
    the CPU: it is for buffers that are another one in most steps, where it saves the upload.

    Args:
        flat: where they may lie; None: nowhere.
        gradients: those that exist.
        watched: all parameters that are measured, by ``id``.
    """
    if flat is None or not gradients or torch.compiler.is_compiling():
        return None
    if backend_of(gradients[0].device).name == "torch":
        return None
    if not isinstance(flat, FlatGradients):
        buffer = flat_buffer_of(gradients)
        return None if buffer is None else Flat(buffer, settled=False)
    # Our own: every gradient exists, and each has its place.
    if len(flat.buffers) != 1 or len(gradients) != len(watched):
        return None
    return Flat(flat.buffer) if flat.places() == watched.keys() else None


def flat_buffer_of(tensors: Iterable[Tensor]) -> Tensor | None:
    """The buffer in which all of ``tensors`` already lie, such as a DDP bucket; None when there is no such one.

    Recognised are plain dense tensors of one dtype that share one storage. Looks at addresses only: no copy,
    no waiting. The result keeps the whole storage alive, and DDP moves gradients when it rebuilds its buckets
    after the first backward: ask again in every step.

    Args:
        tensors: any shapes and strides; empty ones do not count.

    Returns:
        1-D, without autograd history: the smallest range of the storage that covers all of them, with whatever
        lies in between. ``tensor.data_ptr() - result.data_ptr()`` is the place of a tensor in it, in bytes.
    """
    first: Tensor | None = None
    base = low = high = 0
    for tensor in tensors:
        if type(tensor) not in _PLAIN or tensor.layout != torch.strided:
            return None
        if not tensor.numel():
            continue
        offset = int(tensor.storage_offset())
        # Where the storage begins; asking the storage itself would cost as much as all the rest.
        begin = tensor.data_ptr() - offset * tensor.itemsize
        if first is None:
            first, base, low = tensor, begin, offset
        if (
            begin != base
            or tensor.dtype != first.dtype
            or tensor.device != first.device
            # The memory of a lazily negated or conjugated view has other values.
            or tensor.is_neg()
            or tensor.is_conj()
        ):
            return None
        low = min(low, offset)
        high = max(high, offset + _extent(tensor))
    # Tensors on the meta device have no address.
    if first is None or first.device.type == "meta":
        return None
    return first.detach().as_strided((high - low,), (1,), low)


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class _Layout(NamedTuple):
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Layout:
        return cls(tensor.dtype, tensor.device, tensor.shape, tensor.stride())


class _Place:
    """Where the gradient of one parameter lies."""

    def __init__(self, name: str, parameter: Tensor) -> None:
        self.name, self.parameter = name, parameter
        self.layout = _Layout.of(parameter)
        # A parameter may be told to have gradients of another dtype (torch 2.10 and later).
        self.key: _Key = parameter.device, getattr(parameter, "grad_dtype", None) or parameter.dtype
        self.strides = _gradient_strides(parameter)
        self.start = 0  # bytes from the beginning of the buffer
        self.attached: Tensor | None = None
        self.blank = True  # nothing was written to this place since it was zeroed

    def check_parameter(self) -> None:
        now = _Layout.of(self.parameter)
        if now != self.layout:
            changes = (
                f"{field} {_plain(old)} -> {_plain(new)}"
                for field, old, new in zip(_Layout._fields, self.layout, now)
                if old != new
            )
            raise WiringError(
                f"{self.name} was converted after its gradient got a place ({', '.join(changes)}): call refresh()"
            )

    def check_gradient(self, gradient: Tensor) -> None:
        if gradient.layout != torch.strided:
            raise WiringError(
                f"the gradient of {self.name} has layout {gradient.layout} and no place in a dense buffer; build its "
                "embedding with sparse=False, or leave the parameter out of FlatGradients"
            )
        if gradient.dtype != self.key[1]:
            raise WiringError(
                f"the gradient of {self.name} is {gradient.dtype}, its place is for {self.key[1]}: assign one of that "
                "dtype, or call refresh() after a change of grad_dtype"
            )


class _Flat:
    """One buffer and the places in it."""

    def __init__(self, key: _Key, places: Sequence[_Place]) -> None:
        self.key, self.places = key, places
        device, dtype = key
        self.itemsize = torch.empty(0, dtype=dtype).element_size()
        end = 0
        for place in places:
            place.start = end
            size = place.parameter.numel() * self.itemsize
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self.buffer = torch.zeros(end // self.itemsize, dtype=dtype, device=device)

    def view(self, place: _Place) -> Tensor:
        return self.buffer.as_strided(place.layout.shape, place.strides, place.start // self.itemsize)

    def attach(self, place: _Place) -> Tensor:
        """Make ``p.grad`` the view of its place; whatever the place holds stays."""
        view = self.view(place)
        place.parameter.grad = view
        place.attached, place.blank = view, False
        return view


def _unusable(parameter: Tensor) -> str | None:
    """Why ``parameter`` cannot have its gradient in a buffer, or None when it can."""
    if nn.parameter.is_lazy(parameter):
        return "it has no shape yet; run one forward pass first"
    if type(parameter.data) is not Tensor:
        return f"it is a {type(parameter.data).__name__}, not a plain tensor; whoever made it keeps its gradients"
    if parameter.layout != torch.strided:
        return f"its layout is {parameter.layout}; make it dense"
    if not parameter.is_floating_point():
        return f"its dtype is {parameter.dtype}, which is not floating point; convert it"
    if not parameter.is_leaf:
        return "it was computed from other tensors and has no gradient of its own; pass those"
    return None


def _gradient_strides(parameter: Tensor) -> tuple[int, ...]:
    """Strides that autograd gives a new gradient: those of a parameter without holes or overlaps."""
    if is_dense(parameter):
        return parameter.stride()
    return torch.empty(parameter.shape, device="meta").stride()


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last of a tensor that is not empty."""
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))


def _plain(value: object) -> str:
    return str(tuple(value)) if isinstance(value, (torch.Size, tuple)) else str(value)
