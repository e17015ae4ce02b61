"""The window of every seed: seeds come and go, their samples are read, and all of it is saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import StateDictError, WiringError
from ..core.evidence import NEVER_MEASURED, SeedEvidence
from ..core.state import check_state
from ..core.tensors import TensorReading
from .clipping import MeasuredGradients
from .parameters import Parameters, Watched
from .progress import Progress
from .reading import Latest, Reader, Transit, pack
from .ring import Ring, check_entries
from .row import Window
from .tensors import read_tensors


class Windows(Ring):
    """What ``GradientMonitor`` knows: who is watched, the ring, where the window of each seed begins.

    Args:
        watched: host and seeds.
        window: samples kept.
        eps: added to the host's norm in the ratio.
        host_floor: host norm below which the ratio is undefined.
        vanishing_rms: None: vanishing tensors are not counted.
        exploding_rms: None: exploding ones are not.
    """

    VERSION = 2
    tag: str | None = None

    def __init__(
        self,
        watched: Watched,
        window: int,
        eps: float,
        host_floor: float,
        vanishing_rms: float | None,
        exploding_rms: float | None,
    ) -> None:
        """Lay out an empty ring on the device of the parameters."""
        super().__init__(window, 1 + len(watched.names), watched.tracked, watched.tracked[0].device)
        self.window, self.eps, self.host_floor = window, eps, host_floor
        self.vanishing_rms, self.exploding_rms = vanishing_rms, exploding_rms
        self._watched, self._progress, self._measured = watched, Progress(), MeasuredGradients()
        self._transit: Transit | None = None
        self._arrived: Transit | None = None
        for name, parameters in watched.of_seed.items():
            # Steps that an optimizer took before it was watched are unknown, and count for nothing.
            self._progress.begin(name, parameters, by_optimizer=())
        self.register_load_state_dict_pre_hook(_check_before_load)

    @property
    def seeds(self) -> tuple[str, ...]:
        """Names of the seeds, in the order of their segments."""
        return self._watched.names

    def read(self, *, strict: bool = False) -> dict[str, SeedEvidence]:
        """What the window says of every seed. Copies to the host once, and waits for that copy.

        Args:
            strict: raise when a seed has no measurement at all, instead of saying so in its evidence.

        Raises:
            WiringError: with ``strict``, a seed that was never measured.
        """
        evidence = self._unpack(self._pack())
        missing = [name for name, known in evidence.items() if known.status == NEVER_MEASURED]
        if strict and missing:
            raise WiringError(
                f"seeds {missing} were never measured: call measure() after backward() and before optimizer.step()"
            )
        return evidence

    def latest(self) -> Latest:
        """The newest evidence that has already arrived on the host, and its age. Never waits.

        Each call sends the ring on its way (a pinned, asynchronous copy on a GPU), unless an earlier copy is
        still under way. On a CPU it arrives at once.
        """
        if self._transit is None:
            self._transit = Transit(self._pack(), self.seeds, self._progress.steps.total)
        if self._transit.arrived():
            self._arrived, self._transit = self._transit, None
        arrived = self._arrived
        if arrived is None or arrived.names != self.seeds:
            return Latest({}, None)
        steps = self._progress.steps
        age = steps.total - arrived.steps if steps.optimizers() else None
        return Latest(self._unpack(arrived.buffer), age)

    def tensors(self, seed: str | None = None) -> list[TensorReading]:
        """What the last sample says of the gradient of every parameter, largest norm first; those without one are last.

        The measurement has noted it by the way. Copies to the host once, and waits for that copy.

        Args:
            seed: of the host and this seed only.

        Raises:
            ConfigurationError: no seed has this name.
        """
        self._refresh_if_stale()
        segment = None if seed is None else 1 + self.seeds.index(self._watched.known(seed))
        self._follow()
        limits = self.vanishing_rms, self.exploding_rms
        readings = read_tensors(self._noted, self._watched, self.count, self.summary, limits)
        return [reading for reading in readings if segment is None or reading.segment in (0, segment)]

    def _window(self) -> Window:
        self._follow()
        return super()._window()

    def _follow(self) -> None:
        """Give every parameter that is watched now an entry in the table of tensors."""
        if not torch.compiler.is_compiling():
            self._noted.follow(self._watched.tracked, self.count)

    def _pack(self) -> Tensor:
        self._refresh_if_stale()
        return pack(self.ring, self.count, self.since, self._progress.displacements(self._watched.of_seed))

    def _unpack(self, packed: Tensor) -> dict[str, SeedEvidence]:
        counted = self.vanishing_rms is not None, self.exploding_rms is not None
        reader = Reader(self.window, self.eps, self.host_floor, *counted)
        return reader.evidence(packed.tolist(), self._watched.of_seed, self._progress)

    def reset(self, name: str | None = None) -> None:
        """Begin the window of one seed, or of all, anew: samples so far and weights so far no longer count.

        Raises:
            ConfigurationError: no seed has this name.
        """
        self._refresh_if_stale()
        seeds = self.seeds if name is None else [self._watched.known(name)]
        self._follow()
        self._noted.begin(self._watched.segments, {0, *(1 + self.seeds.index(seed) for seed in seeds)})
        for seed in seeds:
            self._begin_window(1 + self.seeds.index(seed))
            self._progress.begin(seed, self._watched.of_seed[seed])

    def add_seed(self, name: str, seed: Parameters, *, alpha: Any = None) -> None:
        """Watch one more seed from now on; the samples of the others stay.

        Raises:
            ConfigurationError: the name is taken.
            WiringError: no parameters, or parameters of another seed; nothing has changed.
        """
        self._watched.add(name, seed, alpha)
        self._follow()
        self._noted.begin(self._watched.segments, {0})
        self._add_column()
        self._mark_stepped()
        self._progress.begin(name, self._watched.of_seed[name])

    def remove_seed(self, name: str) -> None:
        """Forget a seed: what is left of it in the host counts as host from now on.

        Raises:
            ConfigurationError: no seed has this name.
        """
        segment = 1 + self.seeds.index(self._watched.known(name))
        self._watched.remove(name)
        self._follow()
        del self._progress.marks[name]
        self._remove_column(segment)
        self._mark_stepped()

    def refresh(self) -> None:
        """Look all parameters up again: after a change to the modules that no load hook can see.

        Raises:
            WiringError: no parameters on a side, or a parameter in two seeds.
        """
        self._watched.refresh()
        self._follow()

    def _refresh_if_stale(self) -> None:
        if self._watched.stale:
            self.refresh()

    def get_extra_state(self) -> dict[str, Any]:
        """What the buffers do not hold: names, and the weights at the beginning of each window."""
        return {
            "version": self.VERSION,
            "seeds": list(self.seeds),
            "tag": self.tag,
            **self._progress.state_dict(self.seeds),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over ``get_extra_state``, which the load has already checked."""
        self._progress.load_state_dict(state, self._watched.of_seed)
        self._noted.forget(self.count)

    def _mark_stepped(self) -> None:
        """No optimizer step and no clipping since the last measurement: from now on there was one."""
        self._measured.forget()


def _check_before_load(monitor: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Refuse a state that does not fit before anything of it is taken over."""
    assert isinstance(monitor, Windows)
    kind = "GradientMonitor"
    check_entries(monitor, state_dict, prefix, kind)
    state = check_state(state_dict[f"{prefix}_extra_state"], kind, monitor.VERSION, ("seeds", "tag", "steps", "marks"))
    if state["seeds"] != list(monitor.seeds):
        raise StateDictError(
            f"{kind}: the state is of seeds {state['seeds']}, the monitor has {list(monitor.seeds)}"
        )
    if state["tag"] != monitor.tag:
        raise StateDictError(f"{kind}: the state is of the loss {state['tag']!r}, the monitor's is {monitor.tag!r}")
    monitor._progress.check_state(state, kind, monitor._watched.of_seed)
