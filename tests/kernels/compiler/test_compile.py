"""Every variant that the launchers can ask for, compiled for four GPUs without having one.

The interpreter knows nothing of vector width, registers and memory order; the compiled code says.
"""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from compiling import F32, F64, TARGETS, VARIANTS, broken, compiled, expected_atomics, sums  # noqa: E402

from seedtriton.kernels import _launch, gradient_scale, gradient_sums  # noqa: E402

# 7 programs of 128 threads fill the 65 536 registers of a multiprocessor, 112 KiB of loads in flight. A small grid,
# which only tests ask for, keeps its arguments from item to item. gfx942 has twice the registers, 512 for each of the
# 4 warps of 64 that run side by side: 5 programs of 256 threads, 80 KiB of loads in flight. LLVM takes more of them
# since Triton 3.8.
REGISTERS, REGISTERS_SMALL_GRID, REGISTERS_GFX942 = 72, 128, 96
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NVDISASM = CUOBJDUMP.with_name("nvdisasm")


# Between 32 and 256 segments only the size of one block differs: one GPU is enough to see that.
MORE_SEGMENTS = {
    f"row-{count}-segments-{lanes}": (count, lanes, True, True, False) for count in (64, 128) for lanes in (F32, F64)
}


def code(kernel):
    return kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]


def resources(kernel, tmp_path, scalars="|sgpr_spill_count"):
    """(registers per thread, bytes or registers spilled) as the assembler reports them."""
    if "ptx" not in kernel.asm:
        fields = f"vgpr_count|vgpr_spill_count|private_segment_fixed_size{scalars}"
        found = dict(re.findall(rf"\.({fields}):\s*(\d+)", code(kernel)))
        return int(found.pop("vgpr_count")), sum(map(int, found.values()))
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    assert "REG:" in report
    spilled = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", report))
    return max(int(n) for n in re.findall(r"REG:(\d+)", report)), spilled


def loop_bodies(text):
    """Basic blocks that jump back to their own start, as far as they do."""
    blocks = re.split(r"^(\$L__BB\w+|\.LBB\w+):", text, flags=re.MULTILINE)
    found = [
        (re.search(rf"bra\w*[\s.].*{re.escape(label)}\b", body), body)
        for label, body in zip(blocks[1::2], blocks[2::2])
    ]
    return [body[: jump.end()] for jump, body in found if jump]


def wide_loads_in_loops(kernel):
    """128-bit loads without a mask, in loops; and narrow ones beside them in the same loops."""
    if "ptx" in kernel.asm:
        wide, narrow = r"^\s*ld\.global\.v(?:4\.b32|2\.b64|8\.b32)", r"^\s*ld\.global\.(?:b16|b32|v2\.b32|b64)"
    else:
        wide = r"^\s*(?:buffer|global)_load_dwordx4"
        narrow = r"^\s*(?:buffer|global)_load_(?:ushort|short\w+|dword|dwordx2)\s"
    loops = [body for body in loop_bodies(code(kernel)) if re.search(wide, body, re.MULTILINE)]
    return (
        sum(len(re.findall(wide, body, re.MULTILINE)) for body in loops),
        sum(len(re.findall(narrow, body, re.MULTILINE)) for body in loops),
    )


def loads_in_flight(kernel, tmp_path):
    """(128-bit loads, most of them issued before the first is used) of each loop that has some, in SASS."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    text = subprocess.run([NVDISASM, "-c", binary], capture_output=True, text=True, check=True).stdout
    blocks = re.split(r"^(\.L_x_\d+):", text, flags=re.MULTILINE)
    found = []
    for label, block in zip(blocks[1::2], blocks[2::2]):
        body = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", block, flags=re.MULTILINE)
        ends = [place for place, line in enumerate(body) if re.search(rf"BRA.*`\({re.escape(label)}\)", line)]
        flying, most, wide = set(), 0, 0
        for line in body[: ends[-1]] if ends else ():
            load = re.search(r"LDG\.\S*128\S* R(\d+)", line)
            if load:
                wide += 1
                flying.add(int(load[1]))
                most = max(most, len(flying))
            else:
                used = {int(register) for register in re.findall(r"\bR(\d+)", line.split(",", 1)[-1])}
                flying = {first for first in flying if not used & set(range(first, first + 4))}
        if wide:
            found.append((wide, most))
    return found


def atomics(kernel):
    """Atomic adds with acquire and release at GPU scope that the code really has."""
    if "ptx" in kernel.asm:
        return len(re.findall(r"atom\.global\.gpu\.acq_rel\.add", code(kernel)))
    # On AMD the fences are instructions of their own around a plain atomic; test_release_on_amd.py looks at the waits.
    assert ("buffer_wbl2 sc1" in code(kernel)) == ("global_atomic_add" in code(kernel))
    assert ("buffer_inv sc1" in code(kernel)) == ("global_atomic_add" in code(kernel))
    return len(re.findall(r"global_atomic_add", code(kernel)))


def assert_good(kernel, tmp_path, loads, counts, small_grid=False):
    wide, narrow = wide_loads_in_loops(kernel)
    assert wide >= loads, f"{wide} wide loads in main loops, {loads} expected"
    assert narrow == 0, f"{narrow} narrow loads beside them"
    # Of a small grid some scalars of a warp may be kept in lanes of vector registers, not in memory.
    registers, spilled = resources(kernel, tmp_path, *([""] if small_grid else []))
    most = REGISTERS_SMALL_GRID if small_grid else REGISTERS
    if "ptx" not in kernel.asm:
        most = REGISTERS_GFX942
    assert (spilled, registers <= most) == (0, True), f"{registers} registers, {spilled} spilled"
    assert atomics(kernel) == counts
    assert ("bar.sync" if "ptx" in kernel.asm else "s_barrier") in code(kernel)


def expected_loads(variant, target):
    """Groups of four blocks of 32 bytes per thread, for each of three dtypes; 16 with fp64 lanes or with wide warps."""
    return 24 if variant[1] is F32 and target.warp_size == 32 else 12


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_sums_kernel(variant, target, tmp_path):
    loads, counts = expected_loads(variant, target), expected_atomics(variant)
    assert_good(sums(variant, target), tmp_path, loads, counts, small_grid=variant[4])


@pytest.mark.parametrize("variant", MORE_SEGMENTS.values(), ids=MORE_SEGMENTS)
def test_sums_kernel_with_more_segments(variant, tmp_path):
    target = TARGETS["sm_90"]
    assert_good(sums(variant, target), tmp_path, expected_loads(variant, target), expected_atomics(variant))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_second_of_two_launches_needs_no_atomics(target, tmp_path):
    kernel = sums(VARIANTS["two-launches"], target, gradient_sums._finish_kernel)
    registers, spilled = resources(kernel, tmp_path)
    most = REGISTERS if target.backend == "cuda" else REGISTERS_GFX942
    assert (spilled, registers <= most, atomics(kernel)) == (0, True, 0)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_scale_kernel(wide, target, tmp_path):
    kernel = compiled(gradient_scale._scale_kernel, (wide, gradient_scale.BLOCK_BYTES), target)
    registers, spilled = resources(kernel, tmp_path)
    assert (spilled, registers <= REGISTERS) == (0, True)
    wide_loads, narrow = wide_loads_in_loops(kernel)
    per_dtype = 4 if target.warp_size == 32 else 2
    assert wide_loads >= 3 * per_dtype
    assert narrow == 0
    store = r"^\s*st\.global\.v4" if "ptx" in kernel.asm else r"^\s*(?:buffer|global)_store_dwordx4"
    assert sum(len(re.findall(store, body, re.MULTILINE)) for body in loop_bodies(code(kernel))) >= 3 * per_dtype


@pytest.mark.parametrize("target", [t for t in TARGETS.values() if t.backend == "cuda"], ids=list(TARGETS)[:3])
def test_the_loads_of_a_group_are_in_flight_together(target, tmp_path):
    """The assembler, and not the source, decides what is issued before the first number is needed."""
    kernel = sums(VARIANTS["row"], target)
    found = loads_in_flight(kernel, tmp_path)
    assert [wide for wide, _ in found] == [8, 8, 8]
    assert all(most >= 5 for _, most in found), found


def test_this_lane_sees_loads_that_wait_for_each_other(tmp_path):
    one = "squares += _group(tl.load(at), tl.load(at + BLOCK), tl.load(at + 2 * BLOCK), tl.load(at + 3 * BLOCK), LANES)"
    each = "x = tl.load(at).to(LANES)\n        squares += x * x"
    kernel = broken(tmp_path, one, each)._sums_kernel
    found = loads_in_flight(sums(VARIANTS["sums"], TARGETS["sm_90"], kernel), tmp_path)
    assert min(most for _, most in found) < 5


def test_squares_are_fused_multiply_adds_by_request():
    kernel = sums(VARIANTS["sums"], TARGETS["sm_90"])
    assert _launch.OPTIONS["enable_fp_fusion"] is True
    assert "fma.rn.f32" in kernel.asm["ptx"]


@pytest.mark.parametrize("target", [TARGETS["sm_90"], TARGETS["gfx942"]], ids=["sm_90", "gfx942"])
def test_this_lane_fails_without_the_alignment_hint(target, tmp_path):
    hint = "tl.multiple_of((address + head * SIZE).to(tl.pointer_type(DTYPE)), 16)"
    for weaker in (
        "(address + head * SIZE).to(tl.pointer_type(DTYPE))",
        "tl.multiple_of(address + head * SIZE, 16).to(tl.pointer_type(DTYPE))",
    ):
        kernel = sums(VARIANTS["sums"], target, broken(tmp_path, hint, weaker)._sums_kernel)
        with pytest.raises(AssertionError, match="wide loads in main loops"):
            assert_good(kernel, tmp_path, expected_loads(VARIANTS["sums"], target), counts=3)


@pytest.mark.parametrize("target", [TARGETS["sm_90"], TARGETS["gfx942"]], ids=["sm_90", "gfx942"])
def test_this_lane_fails_without_acquire_and_release(target, tmp_path):
    kernel = sums(VARIANTS["sums"], target, broken(tmp_path, 'sem="acq_rel"', 'sem="relaxed"')._sums_kernel)
    with pytest.raises(AssertionError):
        assert_good(kernel, tmp_path, expected_loads(VARIANTS["sums"], target), counts=3)


@pytest.fixture
def larger_blocks(monkeypatch):
    monkeypatch.setitem(gradient_sums.BLOCK_BYTES, (F32, 32), 16384)
    gradient_sums._constants.cache_clear()
    yield
    gradient_sums._constants.cache_clear()


def test_this_lane_fails_when_registers_run_out(larger_blocks, tmp_path):
    target = TARGETS["sm_90"]
    kernel = sums(VARIANTS["row"], target)
    with pytest.raises(AssertionError, match="registers"):
        assert_good(kernel, tmp_path, expected_loads(VARIANTS["row"], target), counts=3)
