"""The window of every seed: seeds come and go, their samples are read, and all of it is saved."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import StateDictError, WiringError
from ..core.evidence import NEVER_MEASURED, SeedEvidence
from ..core.state import check_state
from ..core.tensors import TensorReading
from .agreeing import agree
from .clipping import MeasuredGradients
from .parameters import Parameters, Watched
from .progress import Progress
from .reading import Latest, Reader, Transit, Unpacked, pack
from .ring import Ring, check_entries
from .rounds import Rounds
from .row import APPEND, QUANTITIES, Window
from .spread import Ranks, fold, laid_back, unfold
from .tensors import Noted, noted_of, readings_of

logger = logging.getLogger("seedtriton")


class Windows(Ring):
    """What ``GradientMonitor`` knows: who is watched, the ring, where the window of each seed begins.

    Args:
        watched: host and seeds.
        window: samples kept.
        eps: as in ``GradientMonitor``, as those behind it.
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
        device = watched.tracked[0].device
        device = torch.device("cpu") if device.type == "meta" else device
        super().__init__(window, watched.columns, watched.tracked, device)
        self.window, self.eps, self.host_floor = window, eps, host_floor
        self.vanishing_rms, self.exploding_rms = vanishing_rms, exploding_rms
        self._watched, self._progress, self._measured = watched, Progress(), MeasuredGradients()
        self._rounds = Rounds(self._progress.steps)
        self._begun_lately = False
        self._changes: dict[str, str] = {}  # by seed, what changed when its window began anew
        self._said: set[str] = set()
        self._agreed = Latest({}, None)  # and after how many steps
        self._transit: Transit | None = None
        self._arrived: Transit | None = None
        for name, parameters in watched.of_seed.items():
            self._progress.begin(name, parameters)
        self.register_load_state_dict_pre_hook(_check_before_load)

    @property
    def seeds(self) -> tuple[str, ...]:
        """Names of the seeds, in the order of their segments."""
        return self._watched.names

    def extra_repr(self) -> str:
        return f"seeds={list(self.seeds)}, window={self.window}, measured={self._progress.steps.calls}"

    def steps_taken(self) -> int:
        """Calls of ``step()`` so far, of the known optimizers that hold a parameter of host or seeds."""
        return self._progress.steps.of(self._watched.tracked)

    @property
    def ranks(self) -> Ranks | None:
        """The processes that train the model together; None: this one is alone."""
        return self._watched.ranks

    def read(self, *, strict: bool = False) -> dict[str, SeedEvidence]:
        """What the window says of every seed. Copies to the host once, and waits for that copy.

        With ``ranks``: what all of them say together; to be called on every rank, at the cost of two exchanges.

        Args:
            strict: raise when a seed has no measurement at all, instead of saying so in its evidence.

        Raises:
            WiringError: with ``strict``, a seed that was never measured; of many ranks also what ``agreeing.agree``
                refuses.
        """
        return self.read_together("read()", {}, (), strict=strict)[0]

    def read_together(
        self, call: str, facts: Mapping[str, object], told: Sequence[float], *, strict: bool = False
    ) -> tuple[dict[str, SeedEvidence], list[list[float]]]:
        """The same, and what every rank told beside; of one process that is what was told.

        Args:
            call: what the ranks are in, for errors.
            facts: what has to be the same on each of them, by what to call it.
            told: what need not be.
            strict: as ``read``'s.

        Raises:
            WiringError: as from ``read``.
        """
        ranks, everybody = self._watched.ranks, [list(told)]
        if ranks is None and not self.seeds:
            self._refresh_if_stale(closely=True)
            return {}, everybody
        found = self._found(self._pack())
        if ranks is not None:
            found, everybody = agree(ranks, self._watched, self.ring, found, call, facts, told)
        evidence = self._evidence(found)
        missing = [name for name, known in evidence.items() if known.status == NEVER_MEASURED]
        if strict and missing:
            raise WiringError(
                f"seeds {missing} were never measured: call measure() after backward() and before optimizer.step()"
            )
        if ranks is not None:
            self._agreed = Latest(evidence, self._progress.steps.total)
        return evidence, everybody

    def now(self) -> dict[str, SeedEvidence]:
        """What can be said of every seed without asking another rank: by many of them, what they last agreed on."""
        return self.read() if self._watched.ranks is None else self._agreed.evidence

    def latest(self) -> Latest:
        """The newest evidence that has already arrived on the host, and its age. Never waits, and asks no other rank.

        Each call sends the ring on its way (a pinned, asynchronous copy on a GPU), unless an earlier copy is
        still under way. On a CPU it arrives at once. With ``ranks`` it is what they last agreed on, in ``read``.
        """
        if self._watched.ranks is not None:
            evidence, then = self._agreed
            return Latest(evidence, None if then is None else self._progress.steps.total - then)
        if self._transit is None:
            self._transit = Transit(self._pack(), self.seeds, self._progress.steps.total)
        if self._transit.arrived():
            self._arrived, self._transit = self._transit, None
        arrived = self._arrived
        if arrived is None or arrived.names != self.seeds:
            return Latest({}, None)
        steps = self._progress.steps
        age = steps.total - arrived.steps if steps.optimizers() else None
        return Latest(self._evidence(self._found(arrived.buffer)), age)

    def tensors(self, seed: str | None = None, *, together: bool = False) -> list[TensorReading]:
        """What the last sample says of the gradient of every parameter, largest norm first; those without one are last.

        The measurement has noted it by the way. Copies to the host once, and waits for that copy.

        Args:
            seed: of the host and this seed only.
            together: with ``ranks``, of whole tensors, to be called on every rank; otherwise a norm is of what this
                rank holds.

        Raises:
            ConfigurationError: no seed has this name.
        """
        self._refresh_if_stale()
        segment = None if seed is None else 1 + self.seeds.index(self._watched.known(seed))
        self._follow()
        ranks = self._watched.ranks if together else None
        found = noted_of(self._noted, self._watched, self.count, self.summary, shared=ranks is not None)
        if ranks is not None:
            parts = ranks.objects([tuple(noted) for noted in found], "tensors()")
            found = [Noted(*noted) for theirs in parts for noted in theirs]
        readings = readings_of(found, (self.vanishing_rms, self.exploding_rms))
        return [reading for reading in readings if segment is None or reading.segment in (0, segment)]

    def _window(self, replace: int = APPEND) -> Window:
        self._follow()
        return super()._window(replace)

    def _follow(self) -> None:
        """Give every parameter that is watched now an entry in the table of tensors, and every column a place."""
        if not torch.compiler.is_compiling():
            self._noted.follow(self._watched.tracked, self.count)
            if self._columns is not self._watched.columns:
                self._lay_out(self._watched.columns)

    def _begin_window(self, segment: int) -> None:
        super()._begin_window(segment)
        self._begun_lately = True

    @torch.no_grad()
    def _include_replaced(self) -> None:
        """Windows that began behind the row that was just replaced begin with it: it was measured anew."""
        if self._begun_lately:
            torch.minimum(self.since, self.count - 1, out=self.since)
            self._begun_lately = False

    def _begin(self, seeds: Sequence[str]) -> None:
        """Windows of these seeds begin, and with each one of the host: when tensors were not finite is forgotten."""
        self._follow()
        segments = {1 + self.seeds.index(seed) for seed in seeds}
        self._noted.begin(self._watched.segments, {0, *segments})
        for segment in segments:
            self._begin_window(segment)
        for seed in seeds:
            self._progress.begin(seed, self._watched.of_seed[seed])

    def _pack(self) -> Tensor:
        self._refresh_if_stale(closely=True)
        self._follow()
        return pack(self.ring, self.count, self.since, self._progress.packed(self._watched, self.ring.device))

    def _reader(self) -> Reader:
        counted = self.vanishing_rms is not None, self.exploding_rms is not None
        return Reader(self.window, self.ring.shape[1], self.eps, self.host_floor, *counted)

    def _found(self, packed: Tensor) -> Unpacked:
        return self._reader().unpacked(packed.tolist(), self._watched.of_seed, self._progress)

    def _evidence(self, found: Unpacked) -> dict[str, SeedEvidence]:
        evidence = self._reader().evidence(found, self._progress)
        piles = self._watched.piling_up(self._progress.steps.optimizers()) if evidence else None
        inactive = self._watched.inactive()
        return {name: self._explained(known, inactive.get(name), piles) for name, known in evidence.items()}

    def _explained(self, known: SeedEvidence, inactive: str | None, piles: str | None) -> SeedEvidence:
        """With what is known of the parameters in its reason; what needs a hand goes to the log, once."""
        said = [words for words in (inactive, piles, self._rounds.others(known, self.tag)) if words]
        for words in (new for new in said if new not in self._said):
            self._said.add(words)
            logger.warning("seed %r: %s", known.seed, words)
        if self._watched.ranks is not None:
            return known  # on every rank the same; these words are of one
        if known.displacement is None:
            said += self._progress.marks[known.seed].unknown(self._watched.of_seed[known.seed])
        if known.seed in self._changes:
            said.append(f"its window began anew when parameters changed ({self._changes[known.seed]})")
        reason = "; ".join([known.reason, *said])
        return dataclasses.replace(known, reason=reason, frozen=known.frozen or inactive is not None) if said else known

    def reset(self, name: str | None = None) -> None:
        """Begin the window of one seed, or of all, anew: samples so far and weights so far no longer count.

        Raises:
            ConfigurationError: no seed has this name.
        """
        self._refresh_if_stale(closely=True)
        seeds = list(self.seeds) if name is None else [self._watched.known(name)]
        self._begin(seeds)
        for seed in seeds:
            self._changes.pop(seed, None)

    def add_seed(self, name: str, seed: Parameters, *, alpha: Any = None) -> None:
        """Watch one more seed, with its ``alpha`` if it has one, from now on; the samples of the others stay.

        Raises:
            ConfigurationError: the name is taken.
            WiringError: no parameters, or parameters of another seed; nothing has changed.
        """
        self._watched.add(name, seed, alpha)
        self._watched.exchange("germinate()")
        self._begin((name,))
        self._rounds.close()
        self._mark_stepped()

    def remove_seed(self, *names: str) -> None:
        """Forget the seeds of these ``names``: what is left of them in the host counts as host from now on.

        Raises:
            ConfigurationError: no seed has this name; nothing has changed.
        """
        if not (gone := dict.fromkeys(map(self._watched.known, names))):
            return
        self._watched.remove(*gone)
        self._follow()
        for name in gone:
            self._changes.pop(name, None)
            del self._progress.marks[name]
        self._agreed = self._agreed._replace(evidence={s: e for s, e in self._agreed.evidence.items() if s not in gone})
        self._rounds.close()
        self._mark_stepped()

    def refresh(self) -> None:
        """Look all parameters up again. A read does so by itself; measuring and clipping do where it costs nothing.

        Parameters that are no longer those begin the window anew: a seed's its own, the host's that of every seed.

        Raises:
            WiringError: no parameters on a side, or a parameter in two seeds.
        """
        self._begin_anew(self._watched.follow(always=True))

    def accept(self) -> None:
        """Take the parameters as they are now, without a word: what changed was meant, and no window begins anew."""
        self._watched.refresh()
        self._follow()

    def _refresh_if_stale(self, *, closely: bool = False) -> None:
        if not torch.compiler.is_compiling():
            self._begin_anew(self._watched.follow(closely=closely))
        elif self._watched.stale:
            self._watched.refresh()

    def _begin_anew(self, changed: Mapping[int, str]) -> None:
        """Drop the samples of parameters that are no longer those; ``changed`` is ``Watched.follow``'s."""
        if changed:
            self._follow()
        if not changed or not self.seeds:
            return
        owners = ["the host", *(f"seed {name!r}" for name in self.seeds)]
        words = "; ".join(f"{owners[segment]}: {what}" for segment, what in changed.items())
        names = [name for segment, name in enumerate(self.seeds, start=1) if changed.keys() & {0, segment}]
        self._begin(names)
        if self._progress.steps.calls:  # before anything was measured there is nothing to drop
            self._changes.update(dict.fromkeys(names, words))
            logger.warning("parameters changed (%s): the window of %s begins anew", words, names)
        self._mark_stepped()

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
        # What was measured before the load belongs to no row of this window.
        self._rounds.close()
        self._mark_stepped()

    def whole_state(self) -> dict[str, Any]:
        """What ``state_dict()`` would be of one process that has done all; with ``ranks``, on every rank."""
        state, ranks = self.state_dict(), self._watched.ranks
        if ranks is not None:
            self._refresh_if_stale(closely=True)
            self._follow()
            folded = fold(self.ring, self._watched.columns, self._watched.column_segments)
            state["ring"] = unfold(ranks.total(folded, "state_dict()"))
            state["_extra_state"] = self._progress.gathered(state["_extra_state"], ranks)
        return state

    def load_whole_state(self, state: Mapping[str, Any]) -> None:
        """Take over a ``state`` of ``whole_state``, whatever ranks it was of; on every rank.

        Raises:
            StateDictError: it does not fit these seeds and optimizers; nothing has changed.
        """
        ranks = self._watched.ranks
        if ranks is not None:
            self._follow()
            ring = state.get("ring")
            if not isinstance(ring, Tensor) or ring.shape[1:] != (len(self.since), QUANTITIES):
                raise StateDictError(f"GradientMonitor: entry 'ring' is no window of {len(self.seeds)} seeds")
            columns = self._watched.columns
            state = {**state, "ring": laid_back(ring, columns, mine=ranks.rank == 0)}
            state["_extra_state"] = self._progress.scattered(state.get("_extra_state"), self._watched.of_seed, ranks)
        self.load_state_dict(state)

    def at_each_step(self, call: Callable[[], None]) -> None:
        """Call ``call`` once per optimizer step that is measured, or passed over: at its first measurement."""
        self._rounds.begun = call

    def _stepped(self) -> None:
        """An optimizer has stepped."""
        self._rounds.close()
        self._watched.stepped()
        self._mark_stepped()

    def _mark_stepped(self) -> None:
        """No optimizer step and no clipping since the last measurement: from now on there was one."""
        self._measured.forget()


def _check_before_load(monitor: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Refuse a state that does not fit before anything of it is taken over."""
    assert isinstance(monitor, Windows)
    kind = "GradientMonitor"
    check_entries(monitor, state_dict, prefix, kind)
    keys, extra = ("seeds", "tag", "steps", "marks"), state_dict[f"{prefix}_extra_state"]
    state = check_state(extra, kind, monitor.VERSION, keys, monitor._progress.later())
    if state["seeds"] != list(monitor.seeds):
        raise StateDictError(
            f"{kind}: the state is of seeds {state['seeds']}, the monitor has {list(monitor.seeds)}"
        )
    if state["tag"] != monitor.tag:
        raise StateDictError(f"{kind}: the state is of the loss {state['tag']!r}, the monitor's is {monitor.tag!r}")
    monitor._progress.check_state(state, kind, monitor._watched.of_seed)
