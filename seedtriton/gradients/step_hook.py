"""Measuring by hooks inside optimizer.step(), one sample per round of steps, with one optimizer or several."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from ..core.errors import WiringError
from .early import EarlySums
from .loss_scale import scale_of, scale_of_all, state_in, table_of
from .optimizers import makes_state
from .row import LossScale


class Measuring(Protocol):
    """What a hook asks of the monitor, without keeping it alive."""

    def _take(self, parameters: Iterable[Tensor] | None, scale: LossScale, early: EarlySums) -> None: ...

    def _measure(
        self, scale: LossScale, given: dict[int, Tensor] | None = None, early: EarlySums | None = None
    ) -> None: ...


class _Round:
    """The steps of several optimizers that one sample is of.

    Attributes:
        early: the gradients of those that have stepped.
        stepped: their places among the optimizers.
        scales: how their gradients were scaled.
        closed: whether the last optimizer has closed the sample.
        recorded: how many operations autograd had recorded at the newest step.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        self.early = EarlySums()
        self.stepped: set[int] = set()
        self.scales: list[LossScale] = []
        self.closed = False
        self.recorded = -1
        # The very table, which scaler.update() replaces: it says later on what became of this round.
        self._table = table_of(scaler)

    def skipped(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the scaler was asked to step the optimizer, whose hook has not run in this round."""
        state = state_in(self._table, optimizer)
        return state is not None and state["stage"] is OptState.STEPPED


class StepHook:
    """A hook on the step of each of some optimizers.

    The step of a single one is measured. Of several, each one's gradients are summed when it is about to step, because
    the step may overwrite them and the loop clear them behind it. The last one closes the sample, with those that no
    step has used: of optimizers that rest, or that a scaler skips, and of no optimizer.
    """

    def __init__(
        self,
        monitor: Measuring,
        optimizers: Sequence[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler | None,
        known: Callable[[], Iterable[torch.optim.Optimizer]],
    ) -> None:
        """``known`` returns all optimizers of the monitor, these among them."""
        self._monitor = weakref.ref(monitor)
        self._optimizers = tuple(dict.fromkeys(optimizers))
        self._scaler, self._known = scaler, known
        self._round: _Round | None = None
        self._handles = [optimizer.register_step_pre_hook(self) for optimizer in self._optimizers]

    def remove(self) -> None:
        """End it."""
        for handle in self._handles:
            handle.remove()

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Sum or measure; WiringError for a step with a closure."""
        monitor = self._monitor()
        if monitor is None or makes_state(optimizer):
            return
        # torch passes the optimizer itself among the arguments.
        if any(value is not None and value is not optimizer for value in (*args, kwargs.get("closure"))):
            raise WiringError(
                "optimizer.step(closure) makes the gradients inside the step, after this hook: "
                "call measure() at the end of the closure (in Lightning: on_before_optimizer_step) instead"
            )
        if len(self._optimizers) == 1:
            monitor._measure(scale_of(optimizer, self._scaler))
        elif optimizer is self._optimizers[-1]:
            self._close(monitor, optimizer)
        else:
            self._begin_or_go_on(monitor, optimizer)

    def _begin_or_go_on(self, monitor: Measuring, optimizer: torch.optim.Optimizer) -> None:
        """One that is not the last steps."""
        now, place, recorded = self._round, self._optimizers.index(optimizer), _recorded()
        again = now is not None and place in now.stepped
        # With no forward pass since the newest step, it is the same round, whatever the order.
        if now is not None and now.recorded == recorded and now.closed and not again:
            return  # it steps behind the one that was told to be the last, which has measured its gradients too
        early = now is not None and now.recorded != recorded and place < max(now.stepped, default=0)
        if now is None or now.closed or again or early or now.skipped(self._optimizers[-1]):
            # Of a round without its last step no sample is made: what was summed for it is nobody's.
            now = self._round = _Round(self._scaler)
        self._take(monitor, now, optimizer)
        now.stepped.add(place)
        now.recorded = recorded

    def _close(self, monitor: Measuring, last: torch.optim.Optimizer) -> None:
        """The last one steps."""
        now = self._round
        if now is None or now.closed or now.skipped(last):
            now = self._round = _Round(self._scaler)
        stepped = {id(self._optimizers[place]) for place in now.stepped}
        for optimizer in [known for known in self._known() if id(known) not in stepped]:
            self._take(monitor, now, optimizer)
        early, scale = now.early, scale_of_all(now.scales, self._scaler)
        # A round that is over holds no sums, only what tells who steps too late.
        now.early, now.scales, now.closed, now.recorded = EarlySums(), [], True, _recorded()
        monitor._take(None, scale, early)
        monitor._measure(scale, early=early)

    def _take(self, monitor: Measuring, now: _Round, optimizer: torch.optim.Optimizer) -> None:
        scale = scale_of(optimizer, self._scaler)
        monitor._take((p for group in optimizer.param_groups for p in group["params"]), scale, now.early)
        now.scales.append(scale)


def _recorded() -> int:
    """How many operations autograd has recorded in this thread: the same number, no forward pass in between."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
