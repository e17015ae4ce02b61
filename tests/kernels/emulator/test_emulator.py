"""The emulator itself: what its memory allows and forbids, its arithmetic, and that it knows what it does not know."""

import random

import numpy as np
import pytest
import torch
from emulator import arithmetic
from emulator.machine import Library, Machine, Stuck
from emulator.memory import Memory, MemoryFault, Program, Thread
from emulator.ptx import Instruction, UnknownInstruction

SCHEDULES = 200


def kernel(*lines):
    """PTX of a kernel with one 64-bit argument, loaded into %rd1."""
    body = "\n".join(lines)
    return Library(
        f".visible .entry k(\n.param .u64 .ptr .global .align 1 k_param_0\n)\n.reqntid 64\n{{\n"
        f".reg .b32 %r<9>;\nld.param.b64 \t%rd1, [k_param_0];\n{body}\nret;\n}}\n"
    )


def run(library, cells, seed=0, programs=2, warps=2):
    chance = random.Random(seed)
    memory = Memory([(cells.data_ptr(), cells.nbytes)], chance)
    Machine(library, memory, chance).run("k", [cells.data_ptr()], programs, warps)
    return cells.tolist()


def cells(count=8, fill=0):
    return torch.full((count,), fill, dtype=torch.int32)


# Program 0 writes 7 behind a flag that it raises last; program 1 looks at the flag first.
def message(order):
    return kernel(
        "mov.u32 %r1, %ctaid.x;",
        "mov.u32 %r2, %tid.x;",
        "setp.eq.b32 %p1, %r2, 0;",
        "ld.global.b32 { %r8 }, [ %rd1 + 0 ];",  # brings the line into both caches
        "bar.sync 0;",
        "setp.ne.b32 %p2, %r1, 0;",
        "@%p2 bra $L__reader;",
        "@%p1 st.global.b32 [ %rd1 + 0 ], { 7 };",
        f"@%p1 atom.global.gpu.{order}.add.u32 %r3, [ %rd1 + 8 ], 1;",
        "ret;",
        "$L__reader:",
        "mov.u32 %r3, 0;",
        f"@%p1 atom.global.gpu.{order}.add.u32 %r3, [ %rd1 + 8 ], 0;",
        "ld.global.b32 { %r4 }, [ %rd1 + 0 ];",
        "@%p1 st.global.b32 [ %rd1 + 16 ], { %r3 };",
        "@%p1 st.global.b32 [ %rd1 + 24 ], { %r4 };",
    )


def seen(order):
    """(flag, data) that the reader saw, over all schedules."""
    library = message(order)
    return {tuple(run(library, cells(), seed)[4:7:2]) for seed in range(SCHEDULES)}


def test_who_sees_the_flag_sees_the_data_behind_acquire_and_release():
    assert {(1, 7), (0, 0)} <= seen("acq_rel") <= {(1, 7), (0, 0), (0, 7)}


def test_without_them_the_data_may_be_old():
    assert (1, 0) in seen("relaxed")


@pytest.mark.parametrize(("release", "acquire"), [(True, False), (False, True)], ids=["no acquire", "no release"])
def test_either_half_alone_is_not_enough(release, acquire):
    found = set()
    for seed in range(SCHEDULES):
        data = cells()
        memory = Memory([(data.data_ptr(), data.nbytes)], random.Random(seed))
        writer, reader = (np.array([Thread(Program(), 0)]) for _ in range(2))
        here, flag = np.array([data.data_ptr()], np.uint64), data.data_ptr() + 8
        memory.store(writer, here, np.array([7], np.uint32), 4)
        memory.add(writer[0], flag, 1, 4, release, False)
        assert memory.add(reader[0], flag, 0, 4, False, acquire) == 1
        found.add(int(memory.load(reader, here, 4, cached=True)[0]))
    assert 0 in found


def test_a_read_past_the_cache_is_never_stale_but_may_be_early():
    data = cells()
    memory = Memory([(data.data_ptr(), data.nbytes)], random.Random(0), stale=1.0)
    writer, reader = (np.array([Thread(Program(), 0)]) for _ in range(2))
    here = np.array([data.data_ptr()], np.uint64)
    memory.store(writer, here, np.array([7], np.uint32), 4)
    assert memory.load(reader, here, 4, cached=False).tolist() == [0]
    assert memory.load(writer, here, 4, cached=True).tolist() == [7]
    memory.write_back_all(writer[0].program)
    assert memory.load(reader, here, 4, cached=False).tolist() == [7]
    assert {int(memory.load(reader, here, 4, cached=True)[0]) for _ in range(50)} == {0, 7}


def exchange(*between):
    """Thread 0 writes what all threads read after ``between``; what thread 63 read."""
    return kernel(
        "mov.u32 %r2, %tid.x;", "setp.eq.b32 %p1, %r2, 0;", "setp.eq.b32 %p2, %r2, 63;",
        "@%p1 st.global.b32 [ %rd1 + 0 ], { 7 };", *between, "ld.global.b32 { %r4 }, [ %rd1 + 0 ];",
        "@%p2 st.global.b32 [ %rd1 + 24 ], { %r4 };",
    )  # fmt: skip


def test_a_barrier_orders_the_threads_of_a_program():
    ordered, not_ordered = exchange("bar.sync 0;"), exchange()
    assert {run(ordered, cells(), seed, programs=1)[6] for seed in range(SCHEDULES)} == {7}
    assert {run(not_ordered, cells(), seed, programs=1)[6] for seed in range(SCHEDULES)} == {0, 7}


def test_stores_arrive_in_any_order_but_all_of_them():
    two = kernel(
        "mov.u32 %r1, %ctaid.x;", "mov.u32 %r2, %tid.x;", "setp.eq.b32 %p1, %r2, 0;", "setp.ne.b32 %p2, %r1, 0;",
        "@%p2 bra $L__reader;", "@%p1 st.global.b32 [ %rd1 + 0 ], { 1 };", "@%p1 st.global.b32 [ %rd1 + 8 ], { 1 };",
        "ret;", "$L__reader:", "ld.global.cg.b32 { %r4 }, [ %rd1 + 8 ];", "ld.global.cg.b32 { %r5 }, [ %rd1 + 0 ];",
        "@%p1 st.global.b32 [ %rd1 + 16 ], { %r4 };", "@%p1 st.global.b32 [ %rd1 + 24 ], { %r5 };",
    )  # fmt: skip
    found = [run(two, cells(), seed) for seed in range(2 * SCHEDULES)]
    assert {tuple(each[4:7:2]) for each in found} == {(0, 0), (0, 1), (1, 1), (1, 0)}
    assert {tuple(each[0:3:2]) for each in found} == {(1, 1)}


def test_nothing_beside_the_written_bytes_changes():
    data = torch.arange(1, 9, dtype=torch.int16)
    memory = Memory([(data.data_ptr(), data.nbytes)], random.Random(0))
    writers = np.array([Thread(Program(), lane) for lane in range(2)])
    places = np.array([data.data_ptr() + 2, data.data_ptr() + 4], np.uint64)
    memory.store(writers, places, np.array([70, 71], np.uint16), 2)
    assert memory.load(writers[:1], places[:1], 2, cached=True).tolist() == [70]
    for writer in writers:
        memory.write_back_all(writer.program)
    assert data.tolist() == [1, 70, 71, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    "line",
    [
        "shfl.sync.idx.b32 %r1, %r2, 0, 31, -1;",
        "ld.global.cv.b32 { %r1 }, [ %rd1 + 0 ];",
        "ld.local.b32 %r1, [ %rd1 + 0 ];",
        "fma.rz.f32 %r1, %r1, %r1, %r1;",
        "add.sat.s32 %r1, %r1, %r1;",
        "atom.global.sys.acq_rel.add.u32 %r1, [ %rd1 + 0 ], 1;",
        "atom.global.gpu.acq_rel.max.u32 %r1, [ %rd1 + 0 ], 1;",
        "bar.sync 1;",
        "prmt.b32 %r1, %r1, %r1, 0;",
        "mov.u32 %r1, %laneid;",
        "cvt.rna.f32.f64 %r1, %rd1;",
        "setp.lt.and.s32 %p1, %r1, %r1, %p1;",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 31, 15;",
        ".local .b8 stack[8];",
    ],
)
def test_what_it_does_not_know_it_says(line):
    with pytest.raises(UnknownInstruction):
        run(kernel(line), cells())


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        ("ld.global.b32 { %r1 }, [ %rd1 + 2 ];", MemoryFault, "misaligned"),
        ("ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 4 ];", MemoryFault, "misaligned"),
        ("ld.global.b32 { %r1 }, [ %rd1 + 4096 ];", MemoryFault, "outside"),
        ("st.global.b32 [ %rd1 + -8 ], { 1 };", MemoryFault, "outside"),
        ("mov.u32 %r1, %tid.x;\nsetp.lt.s32 %p1, %r1, 5;\n@%p1 bra $L__x;\n$L__x:", Stuck, "5 of 32"),
    ],
)
def test_what_a_gpu_would_stop_at(line, error, words):
    with pytest.raises(error, match=words):
        run(kernel(line), cells())


def compute(text, *values):
    name, _, operands = text.partition(" ")
    instruction = Instruction(text, None, False, tuple(name.split(".")), tuple(operands.split(", ")))
    return arithmetic.meaning(instruction).function(*values)


def test_arithmetic_at_its_edges():
    ints = np.array([1, 31, 32, 33, 200, 0], np.uint32)
    one = np.full(6, 0x80000001, np.uint32)
    assert compute("shl.b32 d, a, b", one, ints).tolist() == [2, 1 << 31, 0, 0, 0, 0x80000001]
    assert compute("shr.u32 d, a, b", one, ints).tolist() == [1 << 30, 1, 0, 0, 0, 0x80000001]
    assert compute("shr.s32 d, a, b", one, ints).view(np.int32).tolist()[1:5] == [-1] * 4
    assert compute("rem.s64 d, a, b", *np.array([[-7], [4]]).view(np.uint64)).view(np.int64).tolist() == [-3]
    assert compute("mul.wide.s32 d, a, b", one, one).view(np.int64)[0] == (2**31 - 1) ** 2
    assert compute("mul.wide.u32 d, a, b", one, one)[0] == (2**31 + 1) ** 2
    assert compute("bfe.u32 d, a, b, c", *(np.array([x], np.uint32) for x in (0b110100, 2, 3))).tolist() == [0b101]
    field = (np.array([0b110100], np.uint64), *np.array([[2], [3]], np.uint32))
    assert compute("bfe.s64 d, a, b, c", *field).view(np.int64).tolist() == [-3]
    assert set(compute("redux.sync.max.s32 d, a, b", one, np.full(6, 0xFFFFFFFF, np.uint32)).tolist()) == {0x80000001}
    nan, two = np.array([np.nan]).view(np.uint64), np.array([2.0]).view(np.uint64)
    assert compute("max.f64 d, a, b", nan, two).view(np.float64).tolist() == [2.0]
    for compare, answer in {"ne": False, "neu": True, "lt": False, "geu": True, "num": False, "nan": True}.items():
        assert compute(f"setp.{compare}.f64 p, a, b", nan, two).tolist() == [answer]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_half_precision_is_torchs(kind, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    wide = compute(f"cvt.f32.{kind} d, a", every.view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(wide.view(np.float32), every.float().numpy(), equal_nan=True)
    between = torch.randn(4096) * 10 ** torch.linspace(-9, 6, 4096)
    narrow = compute(f"cvt.rn.{kind}.f32 d, a", between.numpy().view(np.uint32))
    assert narrow.view(np.int16).tolist() == between.to(dtype).view(torch.int16).tolist()
