"""Gradients of seeds that DistributedDataParallel does not know of: averaged over the ranks as it would have done.

DistributedDataParallel looks for parameters once, when it is built. A seed that germinates later is trained by each
rank on its own batch alone, until the ranks have different networks. Here is what it does, for those seeds.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from ..core.errors import ConfigurationError, WiringError
from ..gradients.parameters import CallOnLoad


class SeedAveraging:
    """Averages the gradients of seeds that DistributedDataParallel does not know of, as it would.

    When backward returns, ``p.grad`` of their parameters is the mean over the ranks of what each rank had there,
    earlier micro-batches included. The sums travel in buckets while backward still runs. What the ranks do has to be
    the same on all of them: ``add()`` and ``remove()`` in the same order, the same parameters frozen, and the same
    seeds used until a backward pass averages. A seed that only some ranks use ends in the group's timeout, as it does
    with DistributedDataParallel; of a seed that is used, each rank may leave out other parameters.

    Without a seed it costs nothing. Compiled autograd refuses it: it has no end of backward to be called at.
    """

    def __init__(
        self, group: dist.ProcessGroup, synchronizes: Callable[[], bool], bucket_bytes: int = 25 * 2**20
    ) -> None:
        """Begin without seeds.

        Args:
            group: the ranks to average over, a group of its own by ``dist.new_group()``: nothing else may
                communicate in it, or the two would take each other's sums.
            synchronizes: asked in each backward pass: is this one to be averaged? False while ``ddp.no_sync()``
                only accumulates: ``lambda: ddp.require_backward_grad_sync``.
            bucket_bytes: gradients are collected until they have this size, and then sent together.

        Raises:
            ConfigurationError: this rank is not in the group, or buckets of no size.
        """
        if dist.get_rank(group) < 0:
            raise ConfigurationError("this rank is not in the group that its seeds' gradients are averaged over")
        if bucket_bytes < 1:
            raise ConfigurationError(f"bucket_bytes must be at least 1, got {bucket_bytes}")
        self._group, self._synchronizes, self._bucket_bytes = group, synchronizes, bucket_bytes
        self._modules: dict[str, tuple[nn.Module, ...]] = {}
        self._parameters: dict[str, list[Tensor]] = {}
        self._seed_of: dict[int, str] = {}
        self._hooks: dict[int, Any] = {}
        self._load_hooks: dict[str, list[Any]] = {}
        self._buckets: list[_Bucket] = []
        self._laid_out: list[tuple[object, ...]] = []
        # By backward pass, which is what autograd calls a graph task: a reentrant one is a pass within a pass. The
        # task alone keeps its pass alive, so that of one that failed nothing is left.
        self._passes: weakref.WeakValueDictionary[int, _Pass] = weakref.WeakValueDictionary()
        self._unaveraged: dict[str, None] = {}
        self._lock = threading.Lock()  # autograd has a thread per device

    @property
    def unaveraged(self) -> tuple[str, ...]:
        """The seeds with gradients of this rank alone, as after a backward pass in ``no_sync()``.

        Not empty after a pass that should have averaged: it used no seed at all, so that nothing called for it.
        """
        return tuple(name for name in self._unaveraged if any(p.grad is not None for p in self._parameters[name]))

    def add(self, name: str, modules: Iterable[nn.Module]) -> None:
        """Average the gradients of these modules from the next backward pass on.

        Args:
            name: the seed, to be named in errors and to ``remove()``.
            modules: all that trains as this seed. Parameters that need no gradient now may do so later.

        Raises:
            ConfigurationError: there is a seed of this name.
            WiringError: a parameter that another seed has too.
        """
        if name in self._modules:
            raise ConfigurationError(f"seed {name!r} is averaged already: remove() it first")
        modules = tuple(modules)
        for parameter in _trainable(modules):
            other = self._seed_of.get(id(parameter))
            if other is not None:
                raise WiringError(
                    f"seeds {other!r} and {name!r} share a parameter of shape {tuple(parameter.shape)}: its gradient "
                    "would be averaged twice; give each seed its own"
                )
        self._modules[name] = modules
        hook = CallOnLoad(self.refresh)
        self._load_hooks[name] = [
            module.register_load_state_dict_post_hook(hook) for root in modules for module in root.modules()
        ]
        self.refresh()

    def remove(self, name: str) -> None:
        """Leave the gradients of a seed alone from now on.

        Raises:
            ConfigurationError: no seed of this name.
        """
        if name not in self._modules:
            raise ConfigurationError(f"no seed {name!r} is averaged; there are {sorted(self._modules)}")
        del self._modules[name]
        for handle in self._load_hooks.pop(name):
            handle.remove()
        self._unaveraged.pop(name, None)
        self.refresh()

    def refresh(self) -> None:
        """Look the parameters of all seeds up again: after they were replaced, as a load with ``assign=True`` does.

        Such a load calls it by itself, and so do ``add()`` and ``remove()``.
        """
        self._parameters = {name: _trainable(modules) for name, modules in self._modules.items()}
        found = {id(p): (name, p) for name, parameters in self._parameters.items() for p in parameters}
        for gone in self._hooks.keys() - found.keys():
            self._hooks.pop(gone).remove()
        self._seed_of = {key: name for key, (name, _) in found.items()}
        for key, (_, parameter) in found.items():
            if key not in self._hooks:
                self._hooks[key] = _hook(parameter, _Ready(self))

    def sync_buffers(self) -> None:
        """Give every rank the buffers that the first rank of the group has: running statistics, counters.

        A collective, to be called by all ranks, at the end of an epoch say. DistributedDataParallel does so before
        each forward pass; what the first rank has in the end is the same.
        """
        buffers = (b for modules in self._modules.values() for module in modules for b in module.buffers())
        _broadcast(buffers, self._group)

    def _ready(self, parameter: Tensor) -> None:
        """A backward pass has written ``p.grad``."""
        gradient, seed = parameter.grad, self._seed_of.get(id(parameter))
        if seed is None or not parameter.requires_grad:
            return  # frozen since the forward pass: nothing was written
        if gradient is None:
            raise _taken(seed, parameter)
        if gradient.layout is not torch.strided:
            raise WiringError(
                f"seed {seed!r} has a {str(gradient.layout).removeprefix('torch.')} gradient (parameter of shape "
                f"{tuple(parameter.shape)}), and only dense ones are averaged over ranks: nn.Embedding(sparse=False)"
            )
        with self._lock:
            self._unaveraged[seed] = None
            if self._synchronizes():
                self._current().ready(parameter)

    def _current(self) -> _Pass:
        task = torch._C._current_graph_task_id()
        current = self._passes.get(task)
        if current is None:
            self._lay_out()
            self._passes[task] = current = _Pass(self._buckets, self._group)
            Variable._execution_engine.queue_callback(partial(self._end, current))
        return current

    def _end(self, current: _Pass) -> None:
        """Backward is done: send what is still here of the seeds that were used, and wait for everything."""
        with self._lock:
            current.finish(self._unaveraged)
            self._unaveraged.clear()

    def _lay_out(self) -> None:
        """Divide the parameters into buckets, from last to first as backward reaches them, unless nothing changed.

        By what every rank knows alone, never by the order in which gradients arrive. A bucket is of one seed, because
        one that is not used sends none; and frozen parameters are in none.
        """
        now = [(id(p), p.requires_grad, p.dtype, p.device) for ps in self._parameters.values() for p in ps]
        if now == self._laid_out:
            return
        self._laid_out, self._buckets = list(now), []
        for seed, parameters in self._parameters.items():
            filling: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
            room: dict[tuple[torch.device, torch.dtype], int] = {}
            for parameter in reversed([p for p in parameters if p.requires_grad]):
                kind = parameter.device, parameter.dtype
                filling[kind].append(parameter)
                room[kind] = room.get(kind, self._bucket_bytes) - parameter.numel() * parameter.element_size()
                if room[kind] <= 0:
                    self._buckets.append(_Bucket(seed, filling.pop(kind)))
                    del room[kind]
            self._buckets.extend(_Bucket(seed, rest) for rest in filling.values())


def broadcast_modules(modules: Iterable[nn.Module], group: dist.ProcessGroup) -> None:
    """Give every rank the parameters and buffers that the first rank of the group has: a new seed's, say.

    A collective, to be called by all ranks with modules of the same shapes.

    Args:
        modules: what is to be the same; written in place.
        group: the ranks.
    """
    found = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    _broadcast(found, group)


class _Bucket:
    """Gradients of one seed, one device and one dtype that travel together."""

    def __init__(self, seed: str, parameters: Sequence[Tensor]) -> None:
        self.seed, self.parameters = seed, tuple(parameters)
        self.newest: _Flight | None = None

    def send(self, group: dist.ProcessGroup) -> _Flight:
        """Begin to add up what the ranks have in ``p.grad``, zeros where that is None.

        Behind the gradients travels a one for each that there was. So without a further collective a rank without a
        gradient learns whether another has one, and leaves ``p.grad`` None if not.
        """
        first, sizes = self.parameters[0], [p.numel() for p in self.parameters]
        number, total = len(sizes), sum(sizes)
        flat = torch.zeros(total + number, dtype=first.dtype, device=first.device)
        flat[total:].fill_(1)
        missing = [index for index, parameter in enumerate(self.parameters) if parameter.grad is None]
        for index in missing:
            flat[total + index].zero_()
        parts = flat[:total].split(sizes)
        for part, parameter in zip(parts, self.parameters):
            if parameter.grad is not None:
                part.copy_(parameter.grad.reshape(-1))
        # Before the sum, as DistributedDataParallel does: the same bits, and half precision does not overflow.
        flat.mul_(1.0 / dist.get_world_size(group))
        with _explained(self.seed):
            work = dist.all_reduce(flat, group=group, async_op=True)
        self.newest = _Flight(work, parts, flat[total:], missing)
        return self.newest

    def receive(self, flight: _Flight) -> None:
        """Wait for the sums, and write them to ``p.grad``."""
        with _explained(self.seed):
            flight.work.wait()
        if flight is not self.newest:
            return  # sent once more by a pass within this one: that took all that was in p.grad, this part too
        self.newest = None
        had = [True] * len(self.parameters)
        if flight.missing:
            had = [count > 0 for count in flight.had.tolist()]
        for index, (parameter, part) in enumerate(zip(self.parameters, flight.parts)):
            if index not in flight.missing:
                if parameter.grad is None:
                    raise _taken(self.seed, parameter)
                parameter.grad.copy_(part.view_as(parameter))
            elif had[index]:
                parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))


class _Flight(NamedTuple):
    """A bucket under way.

    Attributes:
        work: to wait for.
        parts: the gradients in the buffer that travels.
        had: behind them: above 0 where a rank had one.
        missing: which this rank had not.
    """

    work: Any
    parts: Sequence[Tensor]
    had: Tensor
    missing: Sequence[int]


class _Pass:
    """One backward pass: which gradients have come, and which buckets are under way."""

    def __init__(self, buckets: Sequence[_Bucket], group: dist.ProcessGroup) -> None:
        self._buckets, self._group = buckets, group
        self._place = {id(p): place for place, bucket in enumerate(buckets) for p in bucket.parameters}
        self._awaited = [len(bucket.parameters) for bucket in buckets]
        self._came: set[int] = set()
        self._flights: list[tuple[_Bucket, _Flight]] = []
        self._next = 0

    def ready(self, parameter: Tensor) -> None:
        """Send the buckets that this gradient completes, in their order: the others may complete them in another."""
        self._came.add(id(parameter))
        self._awaited[self._place[id(parameter)]] -= 1
        while self._next < len(self._buckets) and not self._awaited[self._next]:
            self._send(self._buckets[self._next])
            self._next += 1

    @torch.no_grad()
    def finish(self, used: Mapping[str, None]) -> None:
        """Send what is left of the seeds ``used``, and write all means to ``p.grad``."""
        for bucket in self._buckets[self._next :]:
            if bucket.seed in used:
                self._send(bucket)
        for bucket, flight in self._flights:
            bucket.receive(flight)

    @torch.no_grad()
    def _send(self, bucket: _Bucket) -> None:
        for parameter in bucket.parameters:
            if parameter.grad is None and id(parameter) in self._came:
                raise _taken(bucket.seed, parameter)
        self._flights.append((bucket, bucket.send(self._group)))


class _Ready:
    """The hook on a parameter, which keeps nothing alive; torch neither copies nor saves such hooks."""

    def __init__(self, averaging: SeedAveraging) -> None:
        self._averaging = weakref.ref(averaging)

    def __call__(self, parameter: Tensor) -> None:
        averaging = self._averaging()
        if averaging is not None:
            averaging._ready(parameter)


def _hook(parameter: Tensor, hook: _Ready) -> Any:
    frozen = not parameter.requires_grad
    # Torch takes a hook only from what requires a gradient, and keeps it when that changes.
    parameter.requires_grad_(True)
    try:
        return parameter.register_post_accumulate_grad_hook(hook)
    finally:
        if frozen:
            parameter.requires_grad_(False)


def _trainable(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Each parameter once that has a gradient or could be thawed: no integers, as of quantised weights."""
    found = {id(p): p for module in modules for p in module.parameters()}
    return [p for p in found.values() if (p.is_floating_point() or p.is_complex()) and not p.is_inference()]


def _taken(seed: str, parameter: Tensor) -> WiringError:
    return WiringError(
        f"the gradient of a parameter of seed {seed!r}, shape {tuple(parameter.shape)}, was freed inside backward, "
        "before it was averaged over the ranks: step and zero_grad() after backward"
    )


@contextmanager
def _explained(seed: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise WiringError(
            f"the gradients of seed {seed!r} could not be averaged over the ranks. Is it used on every rank, with the "
            f"same parameters frozen, and did no rank leave the loop? torch.distributed says: {error}"
        ) from error


@torch.no_grad()
def _broadcast(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """As bytes, so that one broadcast per device is enough for every dtype, and none is refused by a backend."""
    by_device: dict[torch.device, dict[int, Tensor]] = defaultdict(dict)
    for tensor in tensors:
        by_device[tensor.device][id(tensor)] = tensor
    for once in by_device.values():
        found = [tensor.detach() for tensor in once.values()]
        flat = torch.cat([tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in found])
        dist.broadcast(flat, dist.get_global_rank(group, 0), group=group)
        if dist.get_rank(group) != 0:
            for tensor, part in zip(found, flat.split([t.numel() * t.element_size() for t in found])):
                # Cloned: what begins at an odd byte is no number to a device.
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))
