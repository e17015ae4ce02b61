"""Who is watched: parameters and blend factors, their segments, and how it is noticed that they were replaced."""

from __future__ import annotations

import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigurationError, WiringError
from . import adapters
from .in_backward import BackwardCollector
from .noticing import Snapshot, is_shard, some, unheld
from .row import APART, GUARDED, Listed
from .slope import Alpha
from .spread import Column, Holding, Ranks, columns_of

logger = logging.getLogger("seedtriton")

# A parameter and its gradient; None: autograd.grad(allow_unused=True) found none.
Gradients = Mapping[Tensor, Tensor | None] | Iterable[tuple[Tensor, Tensor | None]]


class Part(ABC):
    """Some parameters of a model, found by a rule whenever they are looked up, and no module of their own."""

    @abstractmethod
    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """The parameters as they are now, with their paths."""

    @abstractmethod
    def modules(self) -> Iterator[nn.Module]:
        """The modules that hold them."""

    def parameters(self) -> Iterator[Tensor]:
        """The same without paths."""
        return (parameter for _, parameter in self.named_parameters())


Parameters = nn.Module | Tensor | Iterable[Tensor] | Iterable[nn.Module] | Part


class ParameterSource:
    """Where parameters come from: looked up again on every call, each once."""

    def __init__(self, source: Parameters) -> None:
        self._single = isinstance(source, (nn.Module, Tensor, Part))
        items: tuple[object, ...] = (source,) if isinstance(source, (nn.Module, Tensor, Part)) else tuple(source)
        self._items: list[nn.Module | Tensor | Part] = []
        for item in items:
            if not isinstance(item, (nn.Module, Tensor, Part)):
                raise ConfigurationError(
                    f"host and seeds are modules or iterables of parameters, got {type(item).__name__} inside"
                )
            self._items.append(item)

    def parameters(self) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for item in self._items:
            tensors: Iterable[Tensor] = (item,) if isinstance(item, Tensor) else item.parameters()
            for tensor in tensors:
                found.setdefault(id(tensor), tensor)
        return list(found.values())

    def listed(self) -> dict[str, Tensor]:
        """What ``parameters()`` finds, by what to call each.

        Raises:
            WiringError: one was computed from others, so that backward leaves it no gradient.
        """
        found: dict[int, tuple[str, Tensor]] = {}
        for name, parameter in self.named():
            if _gets_no_gradient(parameter):
                raise WiringError(
                    f"{name} of shape {tuple(parameter.shape)} was computed from another tensor (a slice, a view): "
                    "backward leaves it no gradient. Make it a Parameter of its own, nn.Parameter(part), and torch.cat "
                    "them in the forward pass, or give the whole parameter"
                )
            found.setdefault(id(parameter), (name, parameter))
        return dict(found.values())

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """What to call each parameter in an error: by its path in its module, or by its place among bare tensors."""
        return ((f"parameter {path!r}", parameter) for path, parameter in self.paths())

    def paths(self) -> Iterator[tuple[str | int, Tensor]]:
        """Each parameter with its path in its module, or its place among bare tensors."""
        for index, item in enumerate(self._items):
            if isinstance(item, (nn.Module, Part)):
                yield from item.named_parameters(prefix="" if self._single else str(index))
            else:
                yield index, item

    def modules(self) -> list[nn.Module]:
        return [module for item in self._items if not isinstance(item, Tensor) for module in item.modules()]


def _gets_no_gradient(tensor: Tensor) -> bool:
    if not tensor.is_leaf:
        return not tensor.retains_grad
    return type(tensor) is Tensor and tensor._is_view() and not tensor.requires_grad


def _by_name(seeds: object) -> dict[str, ParameterSource]:
    if not isinstance(seeds, Mapping):
        what = f"a {type(seeds).__name__}"
        raise ConfigurationError(f"seeds must be a mapping of names to modules, {{'adapter': module}}, got {what}")
    return {name: ParameterSource(seed) for name, seed in seeds.items()}


class CallOnLoad:
    """A load hook: after ``load_state_dict(assign=True)`` the parameters are other objects.

    Calls a bound method, without keeping its object alive.
    """

    def __init__(self, method: Callable[[], None] | None) -> None:
        self._method = weakref.WeakMethod(method) if method is not None else None

    def __call__(self, module: nn.Module, incompatible_keys: object) -> None:
        method = self._method() if self._method is not None else None
        if method is not None:
            method()

    def __reduce__(self) -> tuple[type[CallOnLoad], tuple[None]]:
        # The hook lives in the user's modules, which must stay copyable and picklable.
        return CallOnLoad, (None,)


class Watched:
    """The parameters of a host and its seeds, each with its segment: 0 is the host, 1..N the seeds in their order.

    Seeds found inside the host are taken out of it by identity.

    Attributes:
        stale: parameters may have been replaced since ``refresh()``.
        unsettled: another number of them has gradients than before.
        tracked: every parameter once, the host's first; those that need no gradient too, empty ones not.
        segments: the segment of each.
        segment_by_id: the same by ``id``.
        columns: of the ring's rows: one for each segment, and on many ranks others behind them, see ``spread``.
        column_segments: the segment of each column.
        chosen: the column of each parameter; ``segments`` itself where this is the only process.
        of_seed: the parameters of every seed, empty ones too.
        gains: the blend factors, each with the segment of its seed.
        holding: what ranks told each other last.

    Raises:
        ConfigurationError: an alpha for an unknown seed, or something that is no parameter.
        WiringError: no parameters on a side, or a parameter in two seeds.
    """

    tracked: list[Tensor]
    segments: tuple[int, ...]
    segment_by_id: dict[int, int]
    columns: tuple[Column, ...]
    column_segments: tuple[int, ...]
    chosen: tuple[int, ...]
    of_seed: dict[str, list[Tensor]]
    gains: list[tuple[int, Alpha]]
    _snapshot: Snapshot

    def __init__(
        self, host: Parameters, seeds: Mapping[str, Parameters], alphas: Mapping[str, Any], ranks: Ranks | None = None
    ) -> None:
        self._seeds = _by_name(seeds)
        if unknown := sorted(set(alphas) - set(seeds)):
            raise ConfigurationError(f"alphas for unknown seeds {unknown}; seeds are {sorted(seeds)}")
        self._host = ParameterSource(host)
        self._alphas = {name: Alpha.of(alpha) for name, alpha in alphas.items()}
        self.ranks = ranks
        self.holding = Holding({}, replicated=True)
        self._told_ranks: list[Tensor] | None = None  # ``tracked`` when they were
        self._handles: list[Any] = []
        self._warned, self._had = False, 0  # gradients at the last look: of another number something may be frozen
        self._collector: BackwardCollector | None = None
        self.refresh()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the seeds, in the order of their segments."""
        return tuple(self._seeds)

    def known(self, name: str) -> str:
        """The name, if it is a seed's; ConfigurationError otherwise."""
        if name not in self._seeds:
            raise ConfigurationError(f"no seed is called {name!r}; seeds are {list(self._seeds)}")
        return name

    def column_of(self, parameter: Tensor) -> int | None:
        """Its column; None for a parameter that is not watched."""
        return self._column_by_id.get(id(parameter))

    @property
    def collecting(self) -> BackwardCollector | None:
        """What takes the sums while backward runs; None when nobody asked for it, or after its ``remove()``."""
        return self._collector if self._collector is not None and self._collector.active else None

    def collect_in_backward(self, lanes: torch.dtype) -> BackwardCollector:
        """Put a hook on every parameter, and on those that ``refresh()`` finds later."""
        collector = BackwardCollector(self.column_of, lanes)
        collector.watch(self.tracked, self.name_of)
        if self._collector is not None:
            self._collector.remove()
        self._collector = collector
        return collector

    def add(self, name: str, seed: Parameters, alpha: Any) -> None:
        """Watch one more seed; whatever is raised, nothing has changed."""
        if name in self._seeds:
            raise ConfigurationError(f"a seed is already called {name!r}; seeds are {list(self._seeds)}")
        source, blend = ParameterSource(seed), None if alpha is None else Alpha.of(alpha)
        self._seeds[name] = source
        if blend is not None:
            self._alphas[name] = blend
        try:
            self.refresh()
        except Exception:
            self.remove(name)
            raise

    def remove(self, *names: str) -> None:
        """Forget seeds: what is left of them in the host counts as host from now on."""
        for name in names:
            del self._seeds[name]
            self._alphas.pop(name, None)
        self.refresh()

    def refresh(self) -> None:
        """Look all parameters up again; WiringError as from the constructor."""
        owner: dict[int, str] = {}
        found: dict[str, list[Tensor]] = {}
        named: dict[int, dict[str, Tensor]] = {}
        for segment, (name, source) in enumerate(self._seeds.items(), start=1):
            named[segment] = _listed(source, f"seed {name!r}")
            found[name] = list(named[segment].values())
            if self.ranks is None and not sum(parameter.numel() for parameter in found[name]):
                raise WiringError(f"seed {name!r} has no parameters: there is nothing to measure")
            for parameter in found[name]:
                other = owner.setdefault(id(parameter), name)
                if other != name:
                    raise WiringError(
                        f"seeds {other!r} and {name!r} share a parameter of shape {tuple(parameter.shape)}; "
                        "a parameter belongs to one seed"
                    )
        named = {0: {name: p for name, p in _listed(self._host, "the host").items() if id(p) not in owner}, **named}
        if not sum(parameter.numel() for parameter in named[0].values()):
            raise WiringError("the host has no parameters outside the seeds: there is nothing to compare with")
        self.of_seed = found
        pairs = [(p, segment) for segment, parameters in named.items() for p in parameters.values()]
        filled = [(p, segment) for p, segment in pairs if p.numel()]
        self.tracked, self.segments = [p for p, _ in filled], tuple(segment for _, segment in filled)
        self.segment_by_id = {id(p): segment for p, segment in filled}
        self.spread_out()
        self._entry_by_id = {identity: entry for entry, identity in enumerate(self.segment_by_id)}
        self._empty = {id(p) for p, _ in pairs} - self.segment_by_id.keys()
        self.gains = [
            (segment, self._alphas[name]) for segment, name in enumerate(self._seeds, start=1) if name in self._alphas
        ]
        for segment, alpha in self.gains:
            alpha.watch(self._seeds[self.names[segment - 1]].parameters, self)
        self._hook_loads()
        if self.collecting is not None:
            self.collecting.watch(self.tracked, self.name_of)
        modules = [m for s in (self._host, *self._seeds.values()) for m in s.modules()]
        self._snapshot = Snapshot(modules, named)
        self._with_adapters = [module for module in modules if adapters.active_of(module) is not None]
        self.stale = self._loaded = self.unsettled = False

    def spread_out(self) -> None:
        """Choose the columns, by what is known of who holds what."""
        ways = None if self.ranks is None else self.ranks.ways(list(zip(self.paths(), self.tracked)), self.holding)
        if ways is None and any(map(is_shard, self.tracked)):
            raise _without_ranks(zip(self.paths(), self.tracked))
        self.columns, self.column_segments, self.chosen = columns_of((None, *self._seeds), self.segments, ways)
        self._column_by_id = dict(zip(self.segment_by_id, self.chosen))

    @property
    def unexchanged(self) -> bool:
        """Whether the ranks have not been told of the parameters as they are now."""
        return self.ranks is not None and self._told_ranks is not self.tracked

    def exchange(self, call: str) -> None:
        """Tell every rank what this one holds, and choose the columns by that. On every rank."""
        if self.ranks is not None:
            self.holding = self.ranks.exchange(list(zip(self.paths(), self.tracked)), call)
            self._told_ranks = self.tracked
            self.spread_out()

    def part_of(self, tensor: Tensor) -> Tensor:
        """What of a parameter or gradient this rank holds."""
        return tensor if self.ranks is None else self.ranks.local(tensor)

    def waits(self, parameter: Tensor) -> bool:
        """Whether its gradient is not there yet because ranks add it up later."""
        return self.ranks is not None and self.ranks.waits(parameter, self._host.modules())

    def copies_of(self, parameters: Sequence[Tensor]) -> list[int]:
        """How many ranks hold each of these; 1 of one that is not watched."""
        found = map(self.column_of, parameters)
        return [1 if column is None else self.columns[column].way.copies for column in found]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy watches copied parameters, which are known by other ids."""
        self.__dict__.update(state)
        self.stale = True

    def follow(self, *, closely: bool = False, always: bool = False) -> dict[int, str]:
        """Look the parameters up again if they are no longer those; what has changed, in words by segment.

        Args:
            closely: see ``Snapshot.stands``; otherwise only what a load or a registration tells, and a number of
                gradients that is another than before.
            always: whether or not anything tells of a change.

        Raises:
            WiringError: as from the constructor.
        """
        if not (always or self.stale) and self._snapshot.stands(closely or self.unsettled):
            self.unsettled = False
            return {}
        before, loaded = self._snapshot, self._loaded
        self.refresh()
        return before.differences(self._snapshot, loaded=loaded)

    def piling_up(self, optimizers: Sequence[torch.optim.Optimizer]) -> str | None:
        """Which parameters of the host no optimizer will ever step or zero, in words."""
        outside = unheld(self._snapshot.named[0], optimizers, self.segment_by_id.keys() | self._empty)
        if not outside:
            return None
        return (
            f"of the host {some(outside)} in no known optimizer, which would step and zero them: such gradients "
            "pile up in the host's norm (freeze them, or watch() their optimizer)"
        )

    def inactive(self) -> dict[str, str]:
        """Which seeds are adapters that nothing computes with, and why, in words."""
        found = adapters.inactive(self._with_adapters)
        return {name: found[id(p)] for name, own in self.of_seed.items() for p in own if id(p) in found}

    def _hook_loads(self) -> None:
        for handle in self._handles:
            handle.remove()
        hook = CallOnLoad(self._mark_stale)
        self._handles = [
            module.register_load_state_dict_post_hook(hook)
            for source in (self._host, *self._seeds.values())
            for module in source.modules()
        ]

    def _mark_stale(self) -> None:
        self.stale = self._loaded = True

    def gradients_of(self, given: dict[int, Tensor] | None) -> Listed:
        """The gradients that exist now, or those given by ``id`` of their parameter."""
        found = [p.grad for p in self.tracked] if given is None else [given.get(id(p)) for p in self.tracked]
        gradients = [gradient for gradient in found if gradient is not None]
        if given is None and len(gradients) != self._had and not torch.compiler.is_compiling():
            self._had, self.unsettled = len(gradients), True
        if self.ranks is not None:
            # A rank may hold no element of a tensor: what it is of is then measured by the others.
            parts = [None if gradient is None else self.ranks.local(gradient) for gradient in found]
            found = [part if part is not None and part.numel() else None for part in parts]
            gradients = [part for part in found if part is not None]
        if len(gradients) == len(found):
            return Listed(gradients, self.chosen)
        entries = [entry for entry, gradient in enumerate(found) if gradient is not None]
        return Listed(gradients, [self.chosen[entry] for entry in entries], entries)

    def entries_of(self, identities: Sequence[int]) -> list[int]:
        """The places in ``tracked`` of parameters by their ``id``."""
        return [self._entry_by_id[identity] for identity in identities]

    def paths(self) -> list[str]:
        """What to call each of ``tracked``: its path in the host, or its seed and its path in there."""
        found = {id(parameter): str(path) for path, parameter in self._host.paths()}
        for seed, source in self._seeds.items():
            for path, parameter in source.paths():
                found.setdefault(id(parameter), f"{seed}.{path}")
        return [found.get(id(parameter), "a parameter that was replaced") for parameter in self.tracked]

    def gains_of(self, given: dict[int, Tensor] | None) -> Listed:
        """The same of the blend factors. A slope is zeroed once it is measured: not the one that was given."""
        gains, segments = [], []
        for segment, alpha in self.gains:
            slope = alpha.gradient() if given is None else given.get(id(alpha.holder.alpha))
            if slope is not None:
                slope = self.part_of(slope)
                gains.append(slope if given is None else slope.clone())
                segments.append(segment)
        return Listed(gains, segments)

    def modes(self, *, apart: bool, guarded: bool) -> tuple[int, ...]:
        """How each column is clipped, see ``Rules``: a seed is apart and guarded only while the host does not feel it.

        A seed without a blend factor, or with a bare tensor for one, is never felt.
        """
        if not (apart or guarded):
            return ()
        mode = APART * apart + GUARDED * guarded
        holders = (self._alphas.get(name) for name in self._seeds)
        modes = (0, *(mode * bool(getattr(alpha and alpha.holder, "behind", True)) for alpha in holders))
        return modes if len(modes) == len(self.columns) else tuple(modes[segment] for segment in self.column_segments)

    def warn_of_nothing(self) -> None:
        """Say once that there was no gradient at all, and where the call belongs."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "measure() found no gradient at all: it belongs after backward() and before "
                "zero_grad(set_to_none=True), and loops with torch.autograd.grad pass measure(gradients=...); "
                "such samples count as empty"
            )

    def keep_gains(self, kept: Tensor) -> None:
        """Forget the slopes of seeds in quarantine, before they are measured; ``kept`` is ``row.kept_of``'s."""
        for segment, alpha in self.gains:
            columns = [column for column, owner in enumerate(self.column_segments) if owner == segment]
            alpha.keep(kept[columns].amin())

    def gains_taken(self, *, held: bool) -> None:
        """Every slope was measured and is zero; ``held``: as part of a step that is still to come."""
        for _, alpha in self.gains:
            alpha.taken(held=held)

    def stepped(self) -> None:
        """An optimizer has stepped: the slopes that were measured are final."""
        for _, alpha in self.gains:
            alpha.stepped()

    def check(self, gradients: Gradients) -> dict[int, Tensor]:
        """Explicit gradients by ``id`` of their parameter or blend factor; refuses what does not fit."""
        pairs = gradients.items() if isinstance(gradients, Mapping) else gradients
        known = self.segment_by_id.keys() | self._empty | {id(alpha.holder.alpha) for _, alpha in self.gains}
        seen: set[int] = set()
        given: dict[int, Tensor] = {}
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], Tensor):
                raise ConfigurationError(
                    "gradients are pairs of a parameter and its gradient, zip(parameters, grads), or a dict by "
                    f"parameter, got {type(pair).__name__} inside"
                )
            parameter, gradient = pair
            if id(parameter) not in known:
                raise WiringError(
                    f"gradients has one for a tensor of shape {tuple(parameter.shape)} that is in neither host nor "
                    "seeds: list parameters of the monitor only, or call refresh() after they were replaced"
                )
            if id(parameter) in seen:
                raise ConfigurationError(f"gradients has two for {self.name_of(parameter)}: add them up first")
            seen.add(id(parameter))
            if gradient is None:
                continue
            if not isinstance(gradient, Tensor) or gradient.shape != parameter.shape:
                found = f"shape {tuple(gradient.shape)}" if isinstance(gradient, Tensor) else type(gradient).__name__
                raise ConfigurationError(f"the gradient given for {self.name_of(parameter)} has {found}")
            given[id(parameter)] = gradient
        return given

    def name_of(self, parameter: Tensor) -> str:
        """A parameter or blend factor in words: a seed's name for what a seed and the host both hold."""
        for name, alpha in self._alphas.items():
            if alpha.holder.alpha is parameter:
                return f"the blend factor of seed {name!r}"
        owners = [*((f"seed {name!r}", source) for name, source in self._seeds.items()), ("the host", self._host)]
        for owner, source in owners:
            for name, known in source.named():
                if known is parameter:
                    return f"{name} of {owner} (shape {tuple(parameter.shape)})"
        return f"a parameter of shape {tuple(parameter.shape)}"

    def name_of_gradient(self, given: dict[int, Tensor] | None, gradient: Tensor) -> str:
        """The same of a gradient: one of those given, or of those that the parameters hold."""
        owners = [*self.tracked, *(alpha.holder.alpha for _, alpha in self.gains)]
        for parameter in owners:
            held = parameter.grad if given is None else given.get(id(parameter))
            if held is not None and self.part_of(held) is gradient:
                return f"the gradient of {self.name_of(parameter)}"
        return "a gradient"


def _listed(source: ParameterSource, owner: str) -> dict[str, Tensor]:
    try:
        return source.listed()
    except WiringError as error:
        raise WiringError(f"{owner}: {error}") from None


def _without_ranks(named: Iterable[tuple[str, Tensor]]) -> WiringError:
    cut = next(name for name, parameter in named if is_shard(parameter))
    return WiringError(
        f"parameter {cut!r} is a DTensor, of which each rank holds a part: say between which ranks, "
        "GradientMonitor(..., ranks=seedtriton.Ranks())"
    )
