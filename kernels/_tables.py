"""What a launch needs on the device, made once for a signature: tables, workspaces, uploads, and who owns them.

Tables are kept per (device, stream, ring, signature), the last 32 of them; none of them holds a reference to a
gradient. A CUDA graph has tables of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton

from seedtriton.kernels import _plan
from seedtriton.kernels._uploads import AddressTable

# Tables kept; a training script needs one or two per monitor.
CACHED = 32
# FMA is asked for by name, because its default changes in Triton 3.10 and the bits with it. num_stages=1:
# more stages would turn plain 128-bit loads into cp.async with 16 to 192 KB of shared memory.
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


class Uncapturable(RuntimeError):  # noqa: N818 - caught as a condition, as Unsupported is
    """Addresses that a CUDA graph, while it is captured, cannot take up.

    Attributes:
        index: place of the one that moved among the tensors, or among the gains; None: never measured before.
        gain: whether it is a gain.
        fate: what happened to it and the way out, to be said after its name.
    """

    def __init__(self, fate: str, index: int | None = None, gain: bool = False) -> None:
        what = "these tensors" if index is None else f"{'gain' if gain else 'tensor'} {index}"
        super().__init__(f"{what} {fate}")
        self.index, self.gain, self.fate = index, gain, fate


class Noted(NamedTuple):
    """Where a launch notes each tensor; none of it changes while tables live.

    Attributes:
        addresses: of the number of samples before, and of sums, last and first samples of the table of tensors.
        entries: the place of each tensor in it; None: the i-th has entry i.
    """

    addresses: tuple[int, ...] = (0,) * _plan.NOTED_ADDRESSES
    entries: tuple[int, ...] | None = None


NOWHERE = Noted()


class Tables:
    """What launches for one signature need on the device, made once."""

    def __init__(
        self,
        plan: _plan.Plan,
        device: torch.device,
        extras: int,
        outside: Sequence[tuple[int, int]],
        noted: Noted = NOWHERE,
    ) -> None:
        cpu = device.type == "cpu"
        module = None if cpu else torch.get_device_module(device)
        segments = plan.num_segments
        self.plan = plan
        self.kind = device.type
        self.items = plan.items
        self.slots = len(plan.tensors)
        # The busy path compares these with the current addresses; None: nothing uploaded yet.
        self.pointers: tuple[int, ...] | None = None
        self.base_offsets: tuple[int, ...] | None = None
        self._addresses = AddressTable(plan, extras, device, module, pin=not cpu)
        columns = (plan.lengths, plan.segments, plan.dtypes, plan.slots, plan.pieces, plan.parts)
        starts = (plan.segment_starts, plan.slot_starts)
        entries = plan.tensors if noted.entries is None else [noted.entries[index] for index in plan.tensors]
        # device="cpu" said: whoever called torch.set_default_device would otherwise be asked.
        host: dict[str, Any] = {"device": "cpu"}
        meta = [value for column in (*columns, *starts, entries or (-1,)) for value in column]
        self._meta = torch.tensor(meta, dtype=torch.int32, **host).to(device)
        tensors, elements = list(plan.tensor_counts), list(plan.element_counts)
        for segment, (more_tensors, more_elements) in enumerate(outside):
            tensors[segment] += more_tensors
            elements[segment] += more_elements
        # Launches take turns between two rows. Each leaves its own at zero, and puts the other one there, in which a
        # launch that was stopped half way has left something. In a CUDA graph the rows are those of the capture: only
        # the launches of one replay take turns, and one alone puts nothing right for the next replay.
        marked = max(self.slots, 1)
        self.counters = torch.zeros(2, segments + 1 + marked, dtype=torch.int32, device=device)
        self._this: int = self.counters[0].data_ptr()
        self._other: int = self.counters[1].data_ptr()
        # Partial sums, closed segments (two columns); the two counts of each segment, the addresses of the table of
        # tensors, the sum of those of the counters and the elements of each tensor, which stay; marks and sums of
        # tensors: as many as there are, no rectangle. The item of a plan without elements is of a tensor that is not
        # there.
        known = (tensors + elements, (*noted.addresses, self._this + self._other), plan.slot_elements or (0,))
        kinds = (torch.float64, torch.int64, torch.float64)
        parts = [torch.tensor(one, dtype=kind, **host).view(torch.float64) for one, kind in zip(known, kinds)]
        begin, fixed = self.items + 2 * segments, torch.cat(parts)
        self.work = torch.zeros(begin + len(fixed) + 2 * marked, dtype=torch.float64, device=device)
        self.work[begin : -2 * marked] = fixed
        self.busy_segments = plan.busy_segments
        self.work_address = self.work.data_ptr()
        self.addresses = self._addresses.values.data_ptr()
        self.meta = self._meta.data_ptr()
        self._runners: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def turn(self) -> int:
        """The address of the counters of this launch; the next one takes the others, in a CUDA graph of one replay."""
        self._this, self._other = self._other, self._this
        return self._other

    def upload(self, pointers: tuple[int, ...], tensors: int, extras: Sequence[int]) -> None:
        """Write the addresses of the planned tensors (the first ``tensors`` pointers) and the extra ones."""
        if self.base_offsets is not None:
            values: list[int] = [self.base_offsets[index] for index in self.plan.tensors]
        else:
            values = [pointers[index] for index in self.plan.tensors]
        # Forgotten first: if the copy fails, the table on the device is no longer what it was.
        self.pointers = None
        self._addresses.write(values, extras)
        self.pointers = pointers

    def launch(self, kernel: Any, programs: int, arguments: tuple[Any, ...], constants: tuple[Any, ...]) -> None:
        """Launch on the current stream, through the compiled kernel itself from the second time on.

        The JIT's own dispatch looks at every argument again, for 10 to 27 µs (triton#7771); nothing here is
        specialised on values, so one compiled kernel serves all arguments.
        """
        key = (kernel, programs, constants)
        runner = self._runners.get(key)
        if runner is not None:
            runner(*arguments, *constants)
            return
        compiled = kernel[(programs,)](*arguments, *constants, **OPTIONS)
        # The interpreter returns nothing and has nothing to keep.
        if isinstance(compiled, triton.compiler.CompiledKernel):
            self._runners[key] = compiled[(programs, 1, 1)]


class _Cache:
    """The last tables used, and those that CUDA graphs own."""

    def __init__(self) -> None:
        self._recent: OrderedDict[tuple[int, Any], Tables] = OrderedDict()
        # A graph replays with the tables it was captured with, for as long as it lives, which nobody tells
        # us. They leave the cache, so that no upload and no other stream ever touches them, and stay.
        self._captured: dict[tuple[tuple[int, int], Any], list[Tables]] = {}

    def clear(self) -> None:
        self._recent.clear()
        self._captured.clear()

    def __len__(self) -> int:
        return len(self._recent)

    def get(self, stream: int, what: Any) -> Tables | None:
        found = self._recent.get((stream, what))
        if found is not None:
            self._recent.move_to_end((stream, what))
        return found

    def put(self, stream: int, what: Any, tables: Tables) -> None:
        self._recent[(stream, what)] = tables
        while len(self._recent) > CACHED:
            self._recent.popitem(last=False)

    def for_capture(self, capture: tuple[int, int], what: Any, pointers: tuple[int, ...], tensors: int) -> Tables:
        """Tables that hold exactly these addresses, made before the capture on whatever stream, for it alone.

        Two graphs may be replayed side by side, as may two branches of one: ``capture`` is its number and the stream.
        """
        mine = self._captured.setdefault((capture, what), [])
        for tables in mine:
            if tables.pointers == pointers:
                return tables
        known = [(key, tables) for key, tables in self._recent.items() if key[1] == what]
        for key, tables in known:
            if tables.pointers == pointers:
                del self._recent[key]
                mine.append(tables)
                return tables
        others = [tables for (_, same), found in self._captured.items() if same == what for tables in found]
        raise _uncapturable([tables for _, tables in known] + others, pointers, tensors)


def _uncapturable(known: Sequence[Tables], pointers: tuple[int, ...], tensors: int) -> Uncapturable:
    advice = (
        "addresses cannot be uploaded while a CUDA graph is captured. Run one measurement before the capture "
        "with the very same gradients, and keep them in place: zero_grad(set_to_none=False)"
    )
    if any(tables.pointers == pointers for tables in known):
        return Uncapturable(
            "were measured before, but the tables of that belong to another CUDA graph or to another stream in this "
            "capture, beside which it may be replayed. Run one measurement before each capture"
        )
    # Several may be known: of other streams and graphs, or of a ring that lay at the same address once. The one that
    # differs least says what moved.
    tables = max(known, key=lambda each: sum(map(int.__eq__, each.pointers or (), pointers)), default=None)
    for index, (old, new) in enumerate(zip((tables and tables.pointers) or (), pointers)):
        if old != new:
            gain = index >= tensors
            fate = f"moved from {old:#x} to {new:#x} since the last measurement; {advice}"
            return Uncapturable(fate, index - tensors if gain else index, gain)
    return Uncapturable(f"were not measured before the capture; {advice}")
