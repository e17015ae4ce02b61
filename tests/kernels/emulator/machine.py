"""Programs and warps that take turns at random, instruction by instruction.

A warp's 32 lanes take one step together, and have to branch together: Triton's kernels do.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence

import numpy as np

from . import arithmetic
from .arithmetic import LANES, POISON, bits, constant, stored
from .memory import Memory, MemoryFault, Program, Thread
from .ptx import Function, Instruction, UnknownInstruction, address, listed, parse

SHARED_BYTES = 48 * 1024
# Turns: from one instruction to a whole function, so that one warp may run far ahead of the others, or lag behind.
TURNS = (1, 3, 20, 200, 2000)
_SPECIAL = ("%tid.x", "%ctaid.x", "%nctaid.x")
_ATOMIC = {"acq_rel": (True, True), "relaxed": (False, False)}


class Stuck(Exception):
    """A branch that a warp does not take together."""


class Block(Program):
    """A program that runs: its shared memory and its warps."""

    def __init__(self, number: int, grid: int, warps: int, memory: Memory) -> None:
        super().__init__()
        self.number, self.grid, self.memory = number, grid, memory
        self.shared = np.full(SHARED_BYTES, 0xAB, np.uint8)
        self.warps = [Warp(self, index) for index in range(warps)]

    def meet(self) -> None:
        """Open the barrier if everybody who still runs waits at it."""
        running = [warp for warp in self.warps if warp.frames]
        if running and all(warp.waits for warp in running):
            self.epoch += 1
            told = max(thread.told for warp in self.warps for thread in warp.threads)
            for warp in running:
                warp.waits = False
            for warp in self.warps:
                for thread in warp.threads:
                    thread.told = told


class Frame:
    def __init__(self, code: Code, block: Block, warp: int, parameters: dict[str, np.ndarray]) -> None:
        self.code, self.at, self.parameters = code, 0, parameters
        self.registers = list(code.registers)
        special = (np.arange(LANES) + LANES * warp, np.full(LANES, block.number), np.full(LANES, block.grid))
        self.registers[: len(special)] = [values.astype(np.uint32) for values in special]
        self.passed: dict[str, np.ndarray] = {}


class Warp:
    def __init__(self, block: Block, index: int) -> None:
        self.block, self.index, self.waits = block, index, False
        self.threads = np.array([Thread(block, LANES * index + lane) for lane in range(LANES)])
        self.frames: list[Frame] = []

    def enter(self, code: Code, arguments: Sequence[np.ndarray]) -> None:
        parameters = {
            name: values.astype(stored(f"b{size}")) for (name, size), values in zip(code.function.parameters, arguments)
        }
        if len(parameters) != len(code.function.parameters):
            raise UnknownInstruction(f"{code.function.name} called with {len(arguments)} arguments")
        self.frames.append(Frame(code, self.block, self.index, parameters))


def _extended(values: np.ndarray, kind: str) -> np.ndarray:
    """Signed numbers keep their sign in a wider register."""
    return values.view(f"i{values.itemsize}") if kind[0] == "s" else values


def _named(modifiers: tuple[str, ...]) -> tuple[str, ...]:
    """The same with Triton 3.8's longer name of shared memory."""
    return tuple("shared" if each == "shared::cta" else each for each in modifiers)


def _check_alignment(addresses: np.ndarray, size: int) -> None:
    if (addresses % np.uint64(size)).any():
        raise MemoryFault(f"{size} bytes at {int(addresses[0]):#x}, misaligned")


Step = Callable[[Warp, Frame], None]


class Code:
    """A function made ready: one callable for each instruction, over a list of registers."""

    def __init__(self, function: Function, library: Library) -> None:
        self.function, self.library = function, library
        self.slots: dict[tuple[str, str], int] = {(name, ""): place for place, name in enumerate(_SPECIAL)}
        self.registers: list[np.ndarray] = [constant("0", "b32") for _ in _SPECIAL]
        self.steps = [self._step(instruction) for instruction in function.body]

    def _slot(self, operand: str, kind: str) -> int:
        """The place of a register, or of a constant of that kind."""
        register = operand.startswith("%")
        key = (operand, "" if register else kind)
        if key not in self.slots:
            if register:
                # %p1, %rs1, %r1, %rd1: the name says the width.
                width = {"p": "pred", "rs": "b16", "r": "b32", "rd": "b64"}.get(operand[1:].rstrip("0123456789"))
                if width is None:
                    raise UnknownInstruction(f"register {operand}")
                value = constant("0" if width == "pred" else str(POISON), width)
            elif operand == "global_smem":
                value = constant("0", "b64")
            else:
                value = constant(operand, kind)
            self.slots[key] = len(self.registers)
            self.registers.append(value)
        return self.slots[key]

    def _step(self, instruction: Instruction) -> Step:
        name, *modifiers = instruction.parts
        special = {
            "bra": self._branch, "ret": self._return, "call": self._call, "bar": self._barrier, "mov": self._move,
            "ld": self._load, "st": self._store, "atom": self._atomic,
        }.get(name)  # fmt: skip
        if special is not None:
            step: Step = special(instruction, tuple(modifiers))
            return step
        return self._compute(instruction)

    def _guard(self, instruction: Instruction) -> Callable[[Frame], np.ndarray | None]:
        """The lanes that take part; None: all."""
        if instruction.predicate is None:
            return lambda frame: None
        slot, negated = self._slot(instruction.predicate, "pred"), instruction.negated
        return lambda frame: ~frame.registers[slot] if negated else frame.registers[slot]

    def _writer(self, instruction: Instruction, operand: str, kind: str) -> Callable[[Frame, np.ndarray], None]:
        if operand == "_":
            return lambda frame, values: None
        slot, width = self._slot(operand, kind), bits(kind)
        held, guard = self.registers[slot].dtype, self._guard(instruction)
        if width > 1 and held.itemsize * 8 < width:
            raise UnknownInstruction(instruction.text)

        def write(frame: Frame, values: np.ndarray) -> None:
            frame.registers[slot] = values.astype(held, copy=False)

        def write_some(frame: Frame, values: np.ndarray) -> None:
            frame.registers[slot] = np.where(guard(frame), values.astype(held, copy=False), frame.registers[slot])

        return write_some if instruction.predicate else write

    def _reader(self, operand: str, kind: str) -> Callable[[Frame], np.ndarray]:
        slot = self._slot(operand, kind)
        held = stored(kind)
        if self.registers[slot].dtype != held:
            return lambda frame: frame.registers[slot].astype(held)
        return lambda frame: frame.registers[slot]

    def _compute(self, instruction: Instruction) -> Step:
        sources, result, function = arithmetic.meaning(instruction)
        target, *operands = instruction.operands
        if len(operands) != len(sources):
            raise UnknownInstruction(instruction.text)
        write = self._writer(instruction, target, result)
        if len(sources) == 1:
            (one,) = (self._reader(operand, kind) for operand, kind in zip(operands, sources))
            return lambda warp, frame: write(frame, function(one(frame)))
        if len(sources) == 2:
            first, second = (self._reader(operand, kind) for operand, kind in zip(operands, sources))
            return lambda warp, frame: write(frame, function(first(frame), second(frame)))
        readers = [self._reader(operand, kind) for operand, kind in zip(operands, sources)]
        return lambda warp, frame: write(frame, function(*[read(frame) for read in readers]))

    def _move(self, instruction: Instruction, modifiers: tuple[str, ...]) -> Step:
        (kind,) = modifiers
        target, source = instruction.operands
        targets, sources = listed(target), listed(source)
        part = kind if len(targets) == len(sources) == 1 else f"b{bits(kind) // max(len(targets), len(sources))}"
        if len(targets) > 1:
            read = self._reader(source, kind)
            writes = [self._writer(instruction, name, part) for name in targets]

            def unpack(warp: Warp, frame: Frame) -> None:
                for write, values in zip(writes, read(frame).view(stored(part)).reshape(LANES, -1).T):
                    write(frame, np.ascontiguousarray(values))

            return unpack
        readers = [self._reader(name, part) for name in sources]
        write = self._writer(instruction, target, kind)
        if len(readers) == 1:
            return lambda warp, frame: write(frame, readers[0](frame))
        return lambda warp, frame: write(
            frame, np.stack([read(frame) for read in readers], axis=1).view(stored(kind)).reshape(LANES)
        )

    def _branch(self, instruction: Instruction, modifiers: tuple[str, ...]) -> Step:
        (label,), guard = instruction.operands, self._guard(instruction)
        goal = self.function.labels[label]

        def branch(warp: Warp, frame: Frame) -> None:
            lanes = guard(frame)
            if lanes is not None and lanes.any() != lanes.all():
                raise Stuck(f"{instruction.text}: {int(lanes.sum())} of {LANES} lanes take the branch")
            if lanes is None or lanes[0]:
                frame.at = goal

        return branch

    def _return(self, instruction: Instruction, modifiers: tuple[str, ...]) -> Step:
        def leave(warp: Warp, frame: Frame) -> None:
            warp.frames.pop()
            if warp.frames:
                warp.frames[-1].passed.update(frame.passed)
            else:
                warp.block.meet()

        return leave

    def _call(self, instruction: Instruction, modifiers: tuple[str, ...]) -> Step:
        *_, name, parameters = instruction.operands

        def call(warp: Warp, frame: Frame) -> None:
            warp.enter(self.library.code(name), [frame.passed[each] for each in listed(parameters)])

        return call

    def _barrier(self, instruction: Instruction, modifiers: tuple[str, ...]) -> Step:
        if modifiers != ("sync",) or instruction.operands != ("0",) or instruction.predicate:
            raise UnknownInstruction(instruction.text)

        def wait(warp: Warp, frame: Frame) -> None:
            warp.waits = True
            warp.block.meet()

        return wait

    def _load(self, instruction: Instruction, modifiers: tuple[str, ...]) -> Step:
        space, *hints, kind = _named(modifiers)
        base, offset = address(instruction.operands[1])
        writes = [self._writer(instruction, name, kind) for name in listed(instruction.operands[0])]
        if space == "param":
            if hints or offset or len(writes) != 1:
                raise UnknownInstruction(instruction.text)
            return lambda warp, frame: writes[0](
                frame, _extended(frame.passed[base] if base in frame.passed else frame.parameters[base], kind)
            )
        cached, width = self._access(instruction, hints, len(writes))
        size, places = bits(kind) // 8, self._places(instruction, base, offset)

        def load(warp: Warp, frame: Frame) -> None:
            lanes, addresses = places(frame)
            if not lanes.any():
                return
            _check_alignment(addresses, size * width)
            threads = warp.threads[lanes]
            for write in writes:
                values = np.zeros(LANES, stored(kind))
                if space == "global":
                    values[lanes] = warp.block.memory.load(threads, addresses, size, cached)
                else:
                    values[lanes] = warp.block.shared.view(stored(kind))[addresses // np.uint64(size)]
                write(frame, _extended(values, kind))
                addresses = addresses + np.uint64(size)

        return load

    def _store(self, instruction: Instruction, modifiers: tuple[str, ...]) -> Step:
        space, *hints, kind = _named(modifiers)
        base, offset = address(instruction.operands[0])
        reads = [self._reader(name, kind) for name in listed(instruction.operands[1])]
        if space == "param":
            if hints or offset or len(reads) != 1:
                raise UnknownInstruction(instruction.text)

            def give(warp: Warp, frame: Frame) -> None:
                # By the name under which the caller reads it.
                frame.passed["retval0" if base == "func_retval0" else base] = reads[0](frame)

            return give
        _, width = self._access(instruction, hints, len(reads))
        size, places = bits(kind) // 8, self._places(instruction, base, offset)

        def store(warp: Warp, frame: Frame) -> None:
            lanes, addresses = places(frame)
            if not lanes.any():
                return
            _check_alignment(addresses, size * width)
            threads = warp.threads[lanes]
            for read in reads:
                if space == "global":
                    warp.block.memory.store(threads, addresses, read(frame)[lanes], size)
                else:
                    warp.block.shared.view(stored(kind))[addresses // np.uint64(size)] = read(frame)[lanes]
                addresses = addresses + np.uint64(size)

        return store

    def _places(
        self, instruction: Instruction, base: str, offset: int
    ) -> Callable[[Frame], tuple[np.ndarray, np.ndarray]]:
        """Which lanes take part, and the addresses of these."""
        place, guard = self._reader(base, "b64"), self._guard(instruction)
        behind = np.uint64(offset % (1 << 64))

        def found(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
            lanes = guard(frame)
            lanes = np.ones(LANES, bool) if lanes is None else lanes
            return lanes, place(frame)[lanes] + behind

        return found

    def _access(self, instruction: Instruction, hints: list[str], registers: int) -> tuple[bool, int]:
        """Whether a cache may answer, and how many numbers there are."""
        space = _named(instruction.parts[1:])[0]
        widths = [hint for hint in hints if hint in ("v2", "v4", "v8")]
        caches = [hint for hint in hints if hint not in widths]
        # A store that writes through is a store like any other: nothing is ordered by it.
        allowed = {"ld": (["cg"],), "st": (["wt"], ["cg"])}[instruction.parts[0]]
        width = int(widths[0][1:]) if widths else 1
        if space not in ("global", "shared") or len(widths) > 1 or width != registers:
            raise UnknownInstruction(instruction.text)
        if caches and (caches not in allowed or space != "global"):
            raise UnknownInstruction(instruction.text)
        return not caches, width

    def _atomic(self, instruction: Instruction, modifiers: tuple[str, ...]) -> Step:
        space, scope, order, operation, kind = modifiers
        if (space, scope, operation) != ("global", "gpu", "add") or kind not in ("u32", "u64") or order not in _ATOMIC:
            raise UnknownInstruction(instruction.text)
        target, where, amount = instruction.operands
        (base, offset), size = address(where), bits(kind) // 8
        place, read, guard = self._reader(base, "b64"), self._reader(amount, kind), self._guard(instruction)
        write = self._writer(instruction, target, kind)
        release, acquire = _ATOMIC[order]

        def add(warp: Warp, frame: Frame) -> None:
            lanes = guard(frame)
            found = np.zeros(LANES, stored(kind))
            for lane in range(LANES) if lanes is None else np.flatnonzero(lanes).tolist():
                cell, value = int(place(frame)[lane]) + offset, int(read(frame)[lane])
                _check_alignment(np.array([cell], np.uint64), size)
                found[lane] = warp.block.memory.add(warp.threads[lane], cell, value, size, release, acquire)
            write(frame, found)

        return add


class Library:
    """All functions of a compiled kernel, each made ready when it is first called."""

    def __init__(self, text: str) -> None:
        self._functions = parse(text)
        self._ready: dict[str, Code] = {}

    def code(self, name: str) -> Code:
        if name not in self._ready:
            self._ready[name] = Code(self._functions[name], self)
        return self._ready[name]


class Machine:
    """One launch: a grid of programs, some of them at a time."""

    def __init__(self, library: Library, memory: Memory, chance: random.Random) -> None:
        self._library, self._memory, self._chance = library, memory, chance

    def run_in_order(self, entry: str, arguments: Sequence[int], programs: int, warps: int, backward: bool) -> None:
        """Launch programs one after the other; between barriers warp after warp, or the last one first.

        Of two accesses without a barrier between them, by two warps, either comes first in one of the two orders.
        """
        with np.errstate(all="ignore"):
            for number in range(programs):
                block = self._started(number, entry, arguments, programs, warps)
                while any(warp.frames for warp in block.warps):
                    self._turn([warp for warp in block.warps if warp.frames and not warp.waits][-1 if backward else 0])
                self._memory.write_back_all(block)

    def run(self, entry: str, arguments: Sequence[int], programs: int, warps: int, turns: int = sys.maxsize) -> None:
        """Launch ``programs`` programs; every order of them and of their warps may happen.

        After so many ``turns`` of warps it is stopped, whatever has run until then.
        """
        waiting = self._chance.sample(range(programs), programs)
        at_once = self._chance.choice((1, 2, 4, 8))
        # How often stores arrive before they have to: some GPUs of this kind are quick, some lazy.
        hurry = self._chance.choice((0.0, 0.03, 0.3))
        running: list[Block] = []
        started: list[Block] = []
        with np.errstate(all="ignore"):
            while (waiting or running) and turns:
                turns -= 1
                while waiting and len(running) < at_once:
                    running.append(self._started(waiting.pop(), entry, arguments, programs, warps))
                    started.append(running[-1])
                able = [warp for block in running for warp in block.warps if warp.frames and not warp.waits]
                self._turn(self._chance.choice(able), self._chance.choice(TURNS))
                running = [block for block in running if any(warp.frames for warp in block.warps)]
                if self._chance.random() < hurry:
                    # Of programs that have ended too: their stores may be the last to arrive.
                    self._memory.write_back_some(self._chance.choice(started), share=0.2)
        for block in self._chance.sample(started, len(started)):
            self._memory.write_back_all(block)

    def _started(self, number: int, entry: str, arguments: Sequence[int], programs: int, warps: int) -> Block:
        code = self._library.code(entry)
        values = [np.full(LANES, value, np.uint64) for value in arguments]
        # Behind the kernel's own: what Triton adds for scratch memory, which these kernels do not use.
        values += [np.zeros(LANES, np.uint64)] * (len(code.function.parameters) - len(values))
        block = Block(number, programs, warps, self._memory)
        for warp in block.warps:
            warp.enter(code, values)
        return block

    def _turn(self, warp: Warp, steps: int = sys.maxsize) -> None:
        """Run a warp so far, or to the next barrier; who opens it stops there as well."""
        epoch = warp.block.epoch
        while steps and warp.frames and not warp.waits and warp.block.epoch == epoch:
            steps -= 1
            frame = warp.frames[-1]
            step = frame.code.steps[frame.at]
            frame.at += 1
            step(warp, frame)
