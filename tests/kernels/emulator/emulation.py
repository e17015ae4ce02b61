"""The launchers themselves, with the emulator in the place of a GPU: real tables, real arguments, CPU memory."""

from __future__ import annotations

import random
import struct
import sys
from functools import lru_cache
from typing import Any

import torch
from compiling import TARGETS, compiled
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seedtriton.kernels import _launch

from .machine import Library, Machine
from .memory import Memory


class Allocated(TorchDispatchMode):
    """Remembers the memory of every tensor made under it, and keeps it alive: what a kernel may touch."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, found)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage.data_ptr()] = storage
        return found

    def regions(self) -> list[tuple[int, int]]:
        return [(start, storage.nbytes()) for start, storage in self._storages.items()]


@lru_cache(maxsize=64)
def assembled(kernel: Any, constants: tuple[Any, ...], target: str) -> tuple[Library, str, int]:
    """The compiled kernel, the name of its entry and the number of its warps."""
    code = compiled(kernel, constants, TARGETS[target])
    return Library(code.asm["ptx"]), code.metadata.name, code.metadata.num_warps


def bits_of(value: float) -> int:
    if isinstance(value, float):
        return int(struct.unpack("<Q", struct.pack("<d", value))[0])
    return value % (1 << 64)


class Emulator:
    """Takes the place of ``Tables.launch``; every launch is another random schedule, of ``seed`` and its number."""

    def __init__(self, allocated: Allocated) -> None:
        self.allocated, self.target = allocated, "sm_90"
        self.seed = self.launches = 0
        self.turns = sys.maxsize  # after which a launch is stopped
        self.backward: bool | None = None  # the order of warps; None: any
        self.instead: dict[Any, Any] = {}  # kernels that a test has changed

    def launch(self, tables: Any, kernel: Any, programs: int, arguments: Any, constants: tuple[Any, ...]) -> None:
        library, entry, warps = assembled(self.instead.get(kernel, kernel), constants, self.target)
        chance = random.Random(f"{self.seed} {self.launches}")
        regions, values = self.allocated.regions(), [bits_of(value) for value in arguments]
        self.launches += 1
        if self.backward is None:
            Machine(library, Memory(regions, chance), chance).run(entry, values, programs, warps, self.turns)
        else:
            memory = Memory(regions, chance, stale=0.0, early=1.0)
            Machine(library, memory, chance).run_in_order(entry, values, programs, warps, self.backward)


def take_over(monkeypatch: Any, allocated: Allocated) -> Emulator:
    """Every launch from now on goes to the emulator that is returned."""
    emulator = Emulator(allocated)
    monkeypatch.setattr(_launch, "INTERPRETED", True)  # so that tensors on the CPU are let in
    monkeypatch.setattr(_launch.Tables, "launch", lambda tables, *arguments: emulator.launch(tables, *arguments))
    return emulator
