"""The slope of the loss along a blend: alpha's gradient, which belongs to the gradients that the optimizer's step uses.

What adds to ``p.grad`` adds to it. What clears ``p.grad`` has to clear it too, and no optimizer knows of alpha. So
before a backward pass adds to a slope, the seed's own gradients are looked at: are they still there?
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigurationError
from .noticing import registered
from .spread import ALONE, Places

# Gradients of the seed that are looked at, its smallest; one alone may be zero for reasons of its own. None of the
# host: what lies behind the slot has its gradient of the same backward pass already.
WITNESSES = 4


class Alpha:
    """A blend factor, looked up again each time: ``.to()`` replaces the tensor of a slot.

    Attributes:
        holder: has the tensor as its attribute ``alpha``.
        correction: by what the gain that was measured last, in this same step, has to be multiplied: 0, or a 0-dim
            bool tensor, because its gradients may have been cleared since. None: they were not.
    """

    def __init__(self, holder: Any) -> None:
        self.holder = holder
        self.correction: Tensor | float | None = None
        self._look_up: Callable[[], Iterable[Tensor]] = tuple
        self._places = ALONE
        self._ordered: list[Tensor] = []
        self._registered = 0  # when they were looked up
        self._hooked: Tensor | None = None
        self._added = False  # a backward pass has added to the slope since it was taken
        self._held = False  # taken, and the step has not come yet: the next measurement adds to it
        self._stale: Tensor | None = None  # what of the slope belongs to gradients that were cleared
        self._seen: tuple[int, int] | None = None  # the first witness' gradient before the last backward pass

    @classmethod
    def of(cls, alpha: Any) -> Alpha:
        """The blend factor that somebody gave; ConfigurationError when it is none."""
        if isinstance(alpha, Tensor):
            alpha = _Holder(alpha)
        if not hasattr(alpha, "alpha"):
            raise ConfigurationError(
                f"an alpha is a 0-dim tensor or an object with one as attribute `alpha`, got {type(alpha).__name__}"
            )
        return cls(alpha)

    def watch(self, look_up: Callable[[], Iterable[Tensor]], places: Places) -> None:
        """Take what returns the parameters whose gradients tell whether the slope was cleared: the seed's."""
        self._look_up, self._places = look_up, places
        self._order()
        self._hook()

    def _order(self) -> None:
        self._registered = registered()
        before, found = self._ordered, self._look_up()
        self._ordered = sorted((p for p in found if self._places.part_of(p).numel()), key=Tensor.numel)
        if self._held and not {id(p) for p in before} <= {id(p) for p in self._ordered}:
            self.correction = 0.0  # what was measured in this step is the gain of another seed

    def gradient(self) -> Tensor | None:
        """The slope so far, None if there is none; what is stale of it is taken out."""
        self._hook()
        tensor: Tensor | None = self.holder.alpha
        slope = None if tensor is None else tensor.grad
        if slope is not None and self._stale is not None:
            with torch.no_grad():
                slope.sub_(self._stale.to(slope.device))
            self._stale = None
        return slope

    @torch.no_grad()
    def keep(self, kept: Tensor) -> None:
        """Zeros were written over the gradients unless ``kept`` (0-dim) is above 0: then no gain so far is theirs."""
        slope = self.gradient()
        if slope is not None:
            slope.masked_fill_(kept.to(slope.device) <= 0, 0.0)
        if self._held:
            still = (kept > 0).float()
            self.correction = still if self.correction is None else self.correction * still

    def taken(self, *, held: bool) -> None:
        """The slope was measured and set to zero; ``held``: as part of a step that is still to come."""
        self._added, self._held, self._stale, self.correction = False, held, None, None

    def stepped(self) -> None:
        """The optimizer has stepped: what was measured is final."""
        self._held, self.correction = False, None

    def _hook(self) -> None:
        tensor: Tensor | None = self.holder.alpha
        if tensor is not self._hooked and not torch.compiler.is_compiling():
            self._hooked = tensor
            if tensor is not None and tensor.requires_grad:
                tensor.register_hook(_BeforeAdding(self))

    @torch.no_grad()
    def _before_adding(self) -> None:
        """Before a backward pass adds to the slope: what is there is stale if the gradients it belongs to are gone.

        It is left in ``alpha.grad``, which is the user's to look at, until it is measured.
        """
        if self._registered != registered():
            self._order()  # one that was replaced may keep its gradient, which nobody clears
        # Which of them learn is asked each time: one that is frozen has no gradient, and nothing was cleared for that.
        witnesses = list(islice((p for p in self._ordered if p.requires_grad), WITNESSES))
        gradients = [self._places.part_of(p.grad) for p in witnesses if p.grad is not None]
        gradient = gradients[0] if gradients else None
        if (self._added or self._held) and witnesses:
            waiting = not gradients and any(map(self._places.waits, witnesses))
            kept = None if waiting else self._kept(gradients)
            if kept is not None:
                slope = self.holder.alpha.grad
                if self._added and slope is not None:
                    self._mark_stale(slope, kept)
                if self._held:
                    self.correction = kept if self.correction is None else self.correction * kept
        self._added = True
        if self.holder.alpha.grad is None:
            # Backward would leave its own tensor there, and with torch.compile(mode="reduce-overhead") that lies in a
            # CUDA graph, whose next replay writes over it. Into one of ours it adds.
            self.holder.alpha.grad = torch.zeros_like(self.holder.alpha)
        self._seen = None if gradient is None or gradient.is_inference() else (id(gradient), gradient._version)

    def _mark_stale(self, slope: Tensor, kept: Tensor | float) -> None:
        # NaN and infinities could not be taken out again, so these alone go at once.
        finite = torch.where(slope.isfinite(), slope, torch.zeros_like(slope))
        still = torch.zeros_like(slope) if self._stale is None else self._stale
        # Filled, because a number that is copied to a GPU waits for it.
        is_kept = (kept.to(slope.device) if isinstance(kept, Tensor) else slope.new_full((), kept)) != 0
        slope.copy_(torch.where(is_kept, slope, finite))
        self._stale = torch.where(is_kept, still, finite)

    def _kept(self, gradients: Sequence[Tensor]) -> Tensor | float | None:
        """0 if the seed's gradients were cleared, None if not; a 0-dim tensor of 0 or 1 where only the device knows."""
        if not gradients:
            return 0.0
        gradient = gradients[0]
        if not gradient.is_inference():
            # One more backward pass is one more write, or makes a gradient that nobody has written to. Anything else
            # may have been zero_(), or clipping.
            written = gradient._version if self._seen is None else gradient._version - 1
            if (self._seen is None and written == 0) or self._seen == (id(gradient), written):
                return None
        device = self.holder.alpha.device
        dense = [g.to_dense() if g.layout is not torch.strided else g for g in gradients]
        return torch.stack([g.ne(0).any().to(device) for g in dense]).any().float()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of alpha has no hook: the copy of this finds that out by itself.
        return {**self.__dict__, "_hooked": None, "_seen": None, "_stale": None}


class _Holder:
    def __init__(self, alpha: Tensor) -> None:
        self.alpha = alpha


class _BeforeAdding:
    """A hook on alpha, which keeps nothing alive and is not saved with it."""

    __torch_unserializable__ = True

    def __init__(self, alpha: Alpha) -> None:
        self._alpha = weakref.ref(alpha)

    def __call__(self, slope: Tensor) -> None:
        alpha = self._alpha()
        if alpha is not None:
            alpha._before_adding()
