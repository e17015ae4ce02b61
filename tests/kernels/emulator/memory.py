"""Global memory as weak as a GPU's: stores that wait and arrive in any order, reads of what a cache still holds.

A store waits in the buffer of its program. Threads that it happens before (the same thread; by a barrier, another of
the program) see it at once, others of the program perhaps, other programs not before it is written back. What is
written back makes a new version of its 8-byte word; a plain load may still return any older version that its thread
has not been told of, by an acquire, by a barrier behind one, or by having written the word itself.
"""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WORD = 8
_CELLS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


class MemoryFault(Exception):
    """An access that a GPU would end the kernel for."""


@dataclass
class Thread:
    """One thread as memory knows it; ``epoch`` counts the barriers of its program."""

    program: Program
    number: int
    # Versions up to this time have to be seen.
    told: int = 0


@dataclass
class Program:
    """What memory keeps for one program: stores that wait, by word, oldest first."""

    waiting: dict[int, list[Store]] = field(default_factory=dict)
    epoch: int = 0


@dataclass(frozen=True)
class Store:
    thread: Thread
    epoch: int
    address: int
    size: int
    value: int

    def happens_before(self, thread: Thread) -> bool:
        return self.thread is thread or (self.thread.program is thread.program and self.epoch < thread.program.epoch)

    def over(self, word: int) -> int:
        """``word`` with these bytes in it."""
        shift = 8 * (self.address % WORD)
        return word & ~(((1 << 8 * self.size) - 1) << shift) | self.value << shift


@dataclass(frozen=True)
class _Version:
    time: int
    word: int
    store: Store | None = None


class Memory:
    """Real memory of this process, in the given regions alone: (address, bytes).

    ``stale``: how often a plain load looks into a cache; ``early``: how often a store is seen by another thread of its
    program before any barrier.
    """

    def __init__(
        self, regions: list[tuple[int, int]], chance: random.Random, stale: float = 0.5, early: float = 0.5
    ) -> None:
        # A region grows to whole words; allocations are multiples of them.
        spans = sorted((start // WORD * WORD, -(-(start + size) // WORD) * WORD) for start, size in regions if size)
        self._starts, self._ends = np.array(spans, np.uint64).T
        self._bytes = [np.ctypeslib.as_array((ctypes.c_uint8 * (e - s)).from_address(s)) for s, e in spans]
        self._touched = [False] * len(spans)
        self._versions: dict[int, list[_Version]] = {}
        self._chance, self._stale, self._early = chance, stale, early
        self._time = 0

    def load(self, threads: np.ndarray, addresses: np.ndarray, size: int, cached: bool) -> np.ndarray:
        """One value per thread; ``cached``: older versions are allowed, and another one to each thread."""
        values = np.empty(len(addresses), _CELLS[size])
        touched = False
        for region, chosen, offsets in self._find(addresses, size):
            values[chosen] = self._bytes[region].view(_CELLS[size])[offsets // size]
            touched |= self._touched[region]
        if touched:
            for place, (thread, address) in enumerate(zip(threads, addresses.tolist())):
                word = address // WORD * WORD
                if word in self._versions or word in thread.program.waiting:
                    seen = self._word(thread, word, cached)
                    values[place] = seen >> 8 * (address - word) & ((1 << 8 * size) - 1)
        return values

    def store(self, threads: np.ndarray, addresses: np.ndarray, values: np.ndarray, size: int) -> None:
        self._touch(addresses, size)
        for thread, address, value in zip(threads, addresses.tolist(), values.tolist()):
            store = Store(thread, thread.program.epoch, address, size, value)
            thread.program.waiting.setdefault(address // WORD * WORD, []).append(store)

    def add(self, thread: Thread, address: int, value: int, size: int, release: bool, acquire: bool) -> int:
        """Atomic, in the memory that all programs share; returns what was there."""
        self._touch(np.array([address], np.uint64), size)
        word = address // WORD * WORD
        for key in list(thread.program.waiting) if release else [word]:
            ordered = [store for store in thread.program.waiting.get(key, ()) if store.happens_before(thread)]
            self._write_back(thread.program, key, ordered)
        latest = self._history(word)[-1].word
        old = latest >> 8 * (address - word) & ((1 << 8 * size) - 1)
        self._write(Store(thread, thread.program.epoch, address, size, (old + value) % (1 << 8 * size)))
        if acquire:
            thread.told = self._time
        return old

    def write_back_some(self, program: Program, share: float) -> None:
        """Some of the stores that wait arrive, in any order but that of each word."""
        for word in [word for word in program.waiting if self._chance.random() < share]:
            self._write_back(program, word, program.waiting[word][:1])

    def write_back_all(self, program: Program) -> None:
        """The end of a kernel."""
        words = list(program.waiting)
        self._chance.shuffle(words)
        for word in words:
            self._write_back(program, word, program.waiting[word])

    def _find(self, addresses: np.ndarray, size: int) -> list[tuple[int, Any, np.ndarray]]:
        """Regions, which of the addresses are in each, and where."""
        regions = np.searchsorted(self._starts, addresses, "right") - 1
        if regions.min() < 0 or (addresses + np.uint64(size) > self._ends[regions]).any():
            raise MemoryFault(
                f"{size} bytes between {addresses.min():#x} and {addresses.max():#x}, outside of all tensors"
            )
        offsets = addresses - self._starts[regions]
        if (regions == regions[0]).all():
            return [(int(regions[0]), slice(None), offsets)]
        return [(region, regions == region, offsets[regions == region]) for region in set(regions.tolist())]

    def _touch(self, addresses: np.ndarray, size: int) -> None:
        for region, _, _ in self._find(addresses, size):
            self._touched[region] = True

    def _cell(self, word: int) -> np.ndarray:
        """The word itself, as one number that can be written."""
        ((region, _, offsets),) = self._find(np.array([word], np.uint64), WORD)
        place = int(offsets[0]) // WORD
        return self._bytes[region].view(np.uint64)[place : place + 1]

    def _history(self, word: int) -> list[_Version]:
        known = self._versions.get(word)
        if known is None:
            known = self._versions[word] = [_Version(0, int(self._cell(word)[0]))]
        return known

    def _word(self, thread: Thread, word: int, cached: bool) -> int:
        history = self._history(word)
        oldest = len(history) - 1
        if cached and self._chance.random() < self._stale:
            while oldest and history[oldest].time > thread.told:
                store = history[oldest].store
                if store is not None and store.happens_before(thread):
                    break
                oldest -= 1
            oldest = self._chance.randint(oldest, len(history) - 1)
        seen = history[oldest].word
        for store in thread.program.waiting.get(word, ()):
            if store.happens_before(thread) or self._chance.random() < self._early:
                seen = store.over(seen)
        return seen

    def _write_back(self, program: Program, word: int, stores: list[Store]) -> None:
        for store in stores:
            self._write(store)
        left = [store for store in program.waiting.get(word, ()) if not any(store is done for done in stores)]
        if left:
            program.waiting[word] = left
        else:
            program.waiting.pop(word, None)

    def _write(self, store: Store) -> None:
        word = store.address // WORD * WORD
        history = self._history(word)
        self._time += 1
        history.append(_Version(self._time, store.over(history[-1].word), store))
        self._cell(word)[0] = history[-1].word
