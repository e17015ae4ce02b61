"""Ranks: who takes part, who holds what, and the few exchanges in which they agree.

What they tell each other goes through here, over a process group of its own: a rank that is in another call is then
a sentence, and never half of somebody else's reduction. Gradients and weights of seeds do not: averaging, sharding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.errors import ConfigurationError, WiringError
from ..gradients.noticing import is_shard
from ..gradients.spread import Holding, Way, number_of
from .sharding import unreduced

SHOWN = 8  # ranks in an error
HEADER = 32  # numbers that each rank tells in a header, float64
_PLAIN = "whole"

_T = TypeVar("_T")


class Ranks:
    """The processes that train one model together.

    Args:
        process_group: those that do; all of them unless told. Not the group of one parallelism of several: where FSDP
            or DDP meets TP or a pipeline, it is the group of all.
        timeout: of the exchanges; that of ``process_group`` unless told.
        all_tell: every rank hands on events, not the first alone.

    Attributes:
        rank: number of this process in the group.
        world: how many there are.
        tells: this one hands on events.
        collectives: exchanges so far.
        bytes: that this rank has sent in them, and received in those that gather.

    Raises:
        ConfigurationError: torch.distributed is not initialised.
        WiringError: not every process of the group makes one, within the timeout.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        timeout: timedelta | None = None,
        all_tell: bool = False,
    ) -> None:
        """Make a group of their own; on every process of the group."""
        if not dist.is_initialized():
            raise ConfigurationError(
                "there are no ranks: call torch.distributed.init_process_group() first, or leave ranks out"
            )
        given = process_group or dist.group.WORLD
        assert given is not None
        self.timeout = timeout or _timeout_of(given)
        self.rank, self.world = dist.get_rank(given), dist.get_world_size(given)
        self.tells = all_tell or self.rank == 0
        self.collectives = self.bytes = 0
        self.group = self.new_group("Ranks()", given)

    def new_group(self, call: str, like: dist.ProcessGroup) -> dist.ProcessGroup:
        """One more group of the processes of ``like``, whose exchanges must not meet theirs. On every rank of it."""
        members = dist.get_process_group_ranks(like)
        made: dist.ProcessGroup = self._met(
            call, lambda: dist.new_group(members, timeout=self.timeout, use_local_synchronization=True)
        )
        return made

    @property
    def device(self) -> torch.device:
        """Where a tensor has to lie to be exchanged: on the GPU with NCCL, which knows no other place."""
        backend = str(dist.get_backend(self.group))
        if "gloo" in backend or not torch.accelerator.is_available():
            return torch.device("cpu")
        kind = torch.accelerator.current_accelerator()
        return torch.device("cpu" if kind is None else f"{kind.type}:{torch.accelerator.current_device_index()}")

    def local(self, tensor: Tensor) -> Tensor:
        """Give the part of a tensor that this rank holds; itself where it is not cut.

        Raises:
            WiringError: a DTensor of partial sums, which is no gradient yet.
        """
        if type(tensor) is Tensor or not is_shard(tensor):
            return tensor
        refuse_partial(tensor, "a gradient or parameter")
        part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
        return part

    def waits(self, parameter: Tensor, modules: Iterable[nn.Module]) -> bool:
        """Whether FSDP2 accumulates its gradient without adding it up over the ranks yet."""
        return is_shard(parameter) and any(parameter is held for held in unreduced(modules))

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor that may be cut. On every rank that holds it."""
        return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]

    def cut(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A whole tensor, which is the same on every rank, cut as another is; communicates nothing."""
        if not is_shard(like):
            return tensor
        from torch.distributed.tensor import DTensor, Replicate

        mesh: Any = like.device_mesh  # type: ignore[attr-defined]
        everywhere = DTensor.from_local(tensor.to(like.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
        return everywhere.redistribute(placements=like.placements)  # type: ignore[attr-defined]

    def ways(self, named: Sequence[tuple[str, Tensor]], holding: Holding) -> list[Way]:
        """How each of these parameters is held, by what was exchanged last; of one that is new, as its peers are."""
        return [holding.ways.get((name, _kind(tensor))) or self._guess(tensor, holding) for name, tensor in named]

    def _guess(self, tensor: Tensor, holding: Holding) -> Way:
        kind = _kind(tensor)
        peers = Counter(way.copies for (_, theirs), way in holding.ways.items() if theirs == kind).most_common(1)
        return Way(peers[0][0] if peers else _copies(tensor, self.world), _parts(tensor))

    def exchange(self, named: Sequence[tuple[str, Tensor]], call: str) -> Holding:
        """Tell every rank what this one holds. On every rank: one exchange of names, in no step.

        Raises:
            WiringError: ranks hold parameters of one name in different ways; or not all of them are in ``call``.
        """
        own = [(name, _kind(tensor), self.local(tensor).numel() > 0) for name, tensor in named]
        everybody = self.objects(own, call)
        kinds: dict[str, str] = {}
        holders: dict[str, int] = {}
        filled: dict[str, int] = {}
        for rank, theirs in enumerate(everybody):
            for name, kind, there in theirs:
                if kinds.setdefault(name, kind) != kind:
                    raise WiringError(
                        f"rank {rank} holds parameter {name!r} as {kind}, another as {kinds[name]}: wrap the model "
                        "in the same way on every rank"
                    )
                holders[name] = holders.get(name, 0) + 1
                filled[name] = filled.get(name, 0) + there
        ways = {}
        for name, tensor in named:
            copies = _copies(tensor, holders[name])
            shards = max(1, filled[name] // copies) if is_shard(tensor) else 1
            ways[name, _kind(tensor)] = Way(copies, shards)
        whole = all(kind == _PLAIN for kind in kinds.values())
        return Holding(ways, whole and all(count == self.world for count in holders.values()))

    def headers(self, call: str, facts: Mapping[str, object], flag: bool) -> bool:
        """Whether any rank has raised the ``flag``. On every rank: one gather of HEADER numbers.

        Args:
            call: what this rank is in.
            facts: plain values by what to call them: what has to be the same everywhere.
            flag: need not be.

        Raises:
            WiringError: on all ranks, naming what is not the same; or not all of them are in ``call``.
        """
        rows = self._heads(call, [float(flag), *map(number_of, facts.values())])
        self._count(8 * HEADER * self.world)
        if any(row[1:] != rows[0][1:] for row in rows):
            raise WiringError(_difference(self._plain((call, dict(facts)), call)))
        return any(row[0] for row in rows)

    def _heads(self, call: str, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of each rank. With this begins every exchange, so that ranks in different calls find that out.

        Raises:
            WiringError: on all ranks, naming their calls; or not all of them came.
        """
        rows: list[list[float]] = self._gathered(call, torch.tensor(numbers, dtype=torch.float64)).tolist()
        self._refuse_other_calls(call, [row[0] for row in rows])
        return [row[1:] for row in rows]

    def _gathered(self, call: str, numbers: Tensor) -> Tensor:
        """What each rank has told: float64 [world, HEADER] on ``device``, of each the number of its call first."""
        assert len(numbers) < HEADER
        own = torch.zeros(HEADER, dtype=torch.float64, device=self.device)
        own[0] = number_of(call)
        own[1 : 1 + len(numbers)] = numbers
        found = [torch.empty_like(own) for _ in range(self.world)]
        self._met(call, lambda: dist.all_gather(found, own, group=self.group))
        return torch.stack(found)

    def _refuse_other_calls(self, call: str, calls: Sequence[float]) -> None:
        if any(other != calls[0] for other in calls):
            raise WiringError(_difference(self._plain((call, {}), call)))

    def few(self, numbers: Tensor, call: str) -> Tensor:
        """The sum over all ranks of a few numbers, the same bits on each, where ``numbers`` lie; waits for no GPU.

        On every rank, in a step: one gather for each HEADER - 1 of them, which has the name of the call in it.

        Raises:
            WiringError: ranks are in different calls. With NCCL, where looking would be a wait, it is the ranks in
                another call that find out.
        """
        sums = []
        for part in numbers.split(HEADER - 1):
            rows = self._gathered(call, part)
            self._count(8 * HEADER * self.world)
            if rows.device.type == "cpu":
                self._refuse_other_calls(call, rows[:, 0].tolist())
            sums.append(rows[:, 1 : 1 + len(part)].sum(0))
        return torch.cat(sums).to(numbers.device)

    def total(self, numbers: Tensor, call: str) -> Tensor:
        """The sum over all ranks, the same bits on each, where ``numbers`` lie. On every rank: one reduction."""
        summed = numbers.to(self.device, copy=True)
        self._met(call, lambda: dist.all_reduce(summed, group=self.group))
        self._count(summed.numel() * summed.element_size())
        return summed.to(numbers.device)

    def objects(self, found: Any, call: str) -> list[Any]:
        """What each rank has found, plain values. On every rank; in no step."""
        self._heads(call, ())
        self._count(0)
        return self._plain(found, call)

    def _plain(self, found: Any, call: str) -> list[Any]:
        everybody: list[Any] = [None] * self.world
        self._met(call, lambda: dist.all_gather_object(everybody, found, group=self.group))
        return everybody

    def _count(self, size: int) -> None:
        self.collectives += 1
        self.bytes += size

    def _met(self, call: str, exchange: Callable[[], _T]) -> _T:
        try:
            return exchange()
        except (RuntimeError, dist.DistError) as error:
            raise WiringError(
                f"{call} on rank {self.rank}: not every rank came within {self.timeout}. It is to be called on all "
                f"{self.world} ranks, not under `if rank == 0`; or a rank has failed, whose error is in its own log "
                f"({type(error).__name__}: {str(error).splitlines()[0][:200]})"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """A copy of a monitor is of the same ranks."""
        return self


def _difference(found: Sequence[tuple[str, Mapping[str, object]]]) -> str:
    """What is not the same on all ranks, in words that are."""
    calls = [call for call, _ in found]
    if len(set(calls)) > 1:
        return (
            f"ranks are in different calls: {_by_rank(calls)}. germinate, end_epoch, advance, prune, read, "
            "probe and state_dict are called on every rank, in the same order, and so is clip_grad_norm_ in every step"
        )
    apart = [what for what, value in found[0][1].items() if any(facts[what] != value for _, facts in found)]
    words = "; ".join(f"{what}: {_by_rank([facts[what] for _, facts in found])}" for what in apart)
    return (
        f"ranks disagree about {words}. measure() is called on every rank in every step, and germinate, end_epoch, "
        "advance and prune on every rank in the same order"
    )


def _by_rank(values: Sequence[object]) -> str:
    shown = [f"rank {rank} {value}" for rank, value in enumerate(values[:SHOWN])]
    return ", ".join(shown) + (", ..." if len(values) > SHOWN else "")


def refuse_partial(tensor: Tensor, what: str) -> None:
    """WiringError for a DTensor of partial sums."""
    if any(placement.is_partial() for placement in tensor.placements):  # type: ignore[attr-defined]
        raise WiringError(
            f"{what} of shape {tuple(tensor.shape)} is a DTensor of partial sums, {tensor.placements}: "  # type: ignore[attr-defined]
            "reduce it before it is measured, p.grad = p.grad.redistribute(placements=p.placements)"
        )


def _kind(tensor: Tensor) -> str:
    if not is_shard(tensor):
        return _PLAIN
    return f"{tensor.placements} over {tuple(tensor.device_mesh.shape)}"  # type: ignore[attr-defined]


def _copies(tensor: Tensor, holders: int) -> int:
    """How many of those ranks hold each element."""
    if not is_shard(tensor):
        return holders
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    copies: int = max(1, holders // mesh.size())
    for dimension, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
        if placement.is_replicate():
            copies *= mesh.size(dimension)
    return copies


def _parts(tensor: Tensor) -> int:
    """How many parts with an element a tensor is cut into, as far as its shape and its mesh tell."""
    if not is_shard(tensor):
        return 1
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    found = 1
    for size, placement in zip(mesh.shape, tensor.placements):  # type: ignore[attr-defined]
        if placement.is_shard():
            length = tensor.shape[placement.dim]
            found *= -(-length // -(-length // size))  # as torch.chunk
    return found


def _timeout_of(group: dist.ProcessGroup) -> timedelta:
    for device in ("cpu", "cuda"):
        try:
            found = group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
        if isinstance(found, timedelta):
            return found
    return dist.distributed_c10d.default_pg_timeout
