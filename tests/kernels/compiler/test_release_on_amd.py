"""What a release on gfx942 really orders: LLVM drops the wait behind a write-back where it sees nothing under way.

The atomic may then pass the write-back of the L2 cache (llvm-project#178316). So what another program reads is written
through all caches, and every store has been waited for before such an atomic.
"""

import re

import pytest
from compiling import TARGETS, VARIANTS, broken, expected_atomics, sums

WITH_COUNTERS = {name: variant for name, variant in VARIANTS.items() if variant[3]}
STORE = re.compile(r"(?:global|buffer|flat)_store_")


def functions(kernel):
    """Instructions of each function, in the order of the text."""
    for text in re.split(r"; -- Begin function|\.type\s+\S+,@function", kernel.asm["amdgcn"])[1:]:
        lines = [line.split(";")[0].strip() for line in text.splitlines()]
        yield [line for line in lines if line and not line.startswith(".") and not line.endswith(":")]


def releases(kernel):
    """Of each write-back before an atomic: whether it is waited for; whether every store before it has been."""
    found = []
    for lines in functions(kernel):
        for place, line in enumerate(lines):
            if line.startswith("buffer_wbl2"):
                behind = lines[place + 1 :]
                to_atomic = behind[: next(i for i, other in enumerate(behind) if "_atomic_" in other)]
                before = lines[:place][::-1]
                # A function waits for all of its own before it returns.
                settled = (i for i, other in enumerate(before) if waits(other) or other.startswith("s_swappc"))
                waited = next(settled, len(before))
                found.append((any(map(waits, to_atomic)), not any(map(STORE.match, before[:waited]))))
    return found


def waits(line):
    return line.startswith("s_waitcnt") and "vmcnt(0)" in line


def written_through(kernel):
    return len(re.findall(r"_store_dwordx2 .*\bsc0 sc1\b", kernel.asm["amdgcn"]))


def assert_published(kernel, variant):
    """Every atomic is behind all that it publishes, whether or not the wait is there."""
    found = releases(kernel)
    assert len(found) == expected_atomics(variant)
    assert all(waited or settled for waited, settled in found), f"a store is under way before an atomic: {found}"
    # The partial sum, the tensor, the closed segment; of a row the mark of a tensor and the marks of a segment as well.
    stores = 5 if variant[2] else 3
    assert all(waited for waited, _ in found) or written_through(kernel) >= stores, "left to a write-back nobody awaits"


@pytest.mark.parametrize("variant", WITH_COUNTERS.values(), ids=WITH_COUNTERS)
def test_what_other_programs_read_is_there_before_the_atomic(variant):
    assert_published(sums(variant, TARGETS["gfx942"]), variant)


def test_this_lane_fails_where_that_is_left_to_the_write_back(tmp_path):
    changed = broken(tmp_path, ', cache_modifier=".wt"', "")
    kernel = sums(VARIANTS["row"], TARGETS["gfx942"], changed._sums_kernel)
    if all(waited for waited, _ in releases(kernel)):
        pytest.skip("this Triton's LLVM keeps the wait behind every write-back")
    with pytest.raises(AssertionError, match="write-back"):
        assert_published(kernel, VARIANTS["row"])
