"""The random numbers of a seed behind the host: its own, so that the host's masks are those without it.

A generator's state is saved before the seed runs and put back behind it. In between a seed that draws finds numbers of
its slot, others in every pass. Where a checkpoint may run a pass again they depend on the host's state as well, which
the checkpoint puts back, so that the second run draws the masks of the first.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import StateDictError

Learned = Callable[[], None]
_CPU = (torch.default_generator,)
# Private; without it every pass counts as one that a checkpoint may run again.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class SeedRandom:
    """Runs a seed behind the host without a trace in the host's generators.

    Those are the CPU's and, for features elsewhere, the one of their device (CUDA and others that have
    ``torch.<device>.default_generators``); their states are read and written on the host, without a wait. While a
    CUDA graph is captured the device's is left alone: it cannot be read then, and the seed draws from it. In a graph
    of torch.compile all of this is left out.

    Attributes:
        key: what tells this seed's numbers from those of others; None before there is a seed.
        tick: counts the passes in which the seed may have drawn; those under a checkpoint only where the host draws
            nothing, so that the host's state does not tell them apart.
        spent: mark of a host's state at which a backward pass has reached the seed.
        draws: whether it was seen to draw; None before anybody looked.
        member: number of this process among those that train one model, which have the same key and draw other
            numbers; not saved.
    """

    KEYS = ("key", "tick", "spent", "draws")

    def __init__(self) -> None:
        """Begin without a key."""
        self.key: int | None = None
        self.tick = 0
        self.spent: int | None = None
        self.draws: bool | None = None
        self.member = 0

    def begin(self, name: str) -> None:
        """Take a key from the slot's name and from the CPU's generator, which stays where it is."""
        self.__init__()  # type: ignore[misc]
        self.key = zlib.crc32(name.encode(), _mark([torch.default_generator.get_state()]))

    def run(self, seed: nn.Module, features: Tensor, look: bool) -> tuple[Tensor, Learned | None]:
        """``seed(features)``, and what to call when a backward pass has reached it.

        Args:
            seed: the module.
            features: what it is given.
            look: find out whether it draws. One that was seen to draw nothing runs on the host's numbers, for
                seeding takes 5 us; they are put back all the same.
        """
        generators = _CPU if features.is_cpu else _generators(features.device)
        states = [generator.get_state() for generator in generators]
        learned = None
        try:
            if self.draws is not False:
                learned = self._reseed(generators, states)
            before = [generator.get_state() for generator in generators] if look else []
            output: Tensor = seed(features)
            if look:
                drew = any(not torch.equal(g.get_state(), state) for g, state in zip(generators, before))
                if drew or seed.training:
                    self.draws = drew or bool(self.draws)
        finally:
            for generator, state in zip(generators, states):
                generator.set_state(state)
        return output, learned

    def state(self) -> dict[str, Any]:
        """Plain values; empty before there is a key."""
        return {} if self.key is None else {name: getattr(self, name) for name in self.KEYS}

    @classmethod
    def from_state(cls, state: object) -> SeedRandom:
        """What ``state`` said; StateDictError if that is damaged."""
        made = cls()
        if state == {}:
            return made
        kinds = {"key": (int,), "tick": (int,), "spent": (int, type(None)), "draws": (bool, type(None))}
        if not isinstance(state, dict) or state.keys() != kinds.keys() or any(
            type(state[name]) not in kind for name, kind in kinds.items()
        ):
            raise StateDictError(f"SeedSlot: random must have {list(cls.KEYS)}, got {state!r}")
        for name in cls.KEYS:
            setattr(made, name, state[name])
        return made

    def _reseed(self, generators: Sequence[torch.Generator], states: list[Tensor]) -> Learned | None:
        if self.key is None:
            self.begin("")
        assert self.key is not None
        mark, learned = 0, None
        if not _checkpointed():
            self.tick += 1
        else:
            mark = _mark(states)
            if torch._C._current_graph_task_id() == -1:
                # Outside of a backward pass: a checkpoint's first run. The second must find its tick, so that waits for
                # the next first run behind a backward pass that has reached the seed.
                if mark == self.spent:
                    self.tick += 1
                    self.spent = None
                learned = partial(setattr, self, "spent", mark)
        number = zlib.crc32(b"%d %d" % (self.key, self.tick), (mark + self.member) % 2**32)
        for generator in generators:
            generator.manual_seed(number)
        return learned


@contextmanager
def undisturbed(seed: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode inside; afterwards training flags and random state are as they were."""
    flags = [(module, module.training) for module in seed.modules()]
    devices = [device] if device.type not in ("cpu", "meta") else []
    kind = device.type if devices else "cuda"
    try:
        with torch.random.fork_rng(devices=devices, device_type=kind):
            seed.eval()
            yield
    finally:
        for module, training in flags:
            module.training = training


def _generators(device: torch.device) -> tuple[torch.Generator, ...]:
    """Those that a module on this device, which is not the CPU, may draw from; as far as they can be read now."""
    own = getattr(getattr(torch, device.type, None), "default_generators", ())
    if not own or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return _CPU
    return (*_CPU, own[device.index])


def _mark(states: list[Tensor]) -> int:
    """A number that tells states of generators apart.

    Of a CPU's 5 KB it reads the first 256 bytes: the position among 624 words, and some of those, which change as one.
    """
    mark = 0
    for state in states:
        mark = zlib.crc32(ctypes.string_at(state.data_ptr(), min(256, state.numel())), mark)
    return mark


def _checkpointed() -> bool:
    """Whether a non-reentrant checkpoint may be around: it works by hooks on saved tensors, as a few others do.

    Of a reentrant one nothing is to be seen, and need not: its first run is without gradients, and without the seed.
    """
    return _top_hooks is None or _top_hooks(True) is not None
