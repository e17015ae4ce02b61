"""No result depends on which warp of a program is first between two barriers.

A load by one warp and a later store to the same address by another need a barrier between them. The compiled code runs
twice, the warps in both orders: where the barrier is missing, the load comes before the store once, and behind it once.
Triton places barriers for shared memory alone, so that for global memory they are ours to remember.
"""

import pytest
import torch
from compiling import BEFORE_THE_COUNT, broken
from kernel_cases import INF, Sample, place

from seedtriton.gradients.row import APPEND, GUARDED, REPLACE, REPLACE_USABLE, coefficients_of
from seedtriton.kernels import _launch, gradient_scale, gradient_sums


def outcome(emulator, backward, num_segments, replace, two_launches):
    """Everything that three samples and a scaling write, with the warps in one order."""
    emulator.backward = backward
    torch.manual_seed(0)
    segments = [0, 0, num_segments // 2, num_segments - 1]
    tensors = [place(torch.randn(size), "cpu") for size in (200, 64, 7, 1)]
    gains = [place(torch.tensor(2.0), "cpu")]
    sample = Sample(num_segments, "cpu", window=2)
    modes = (0,) * (num_segments - 1) + (GUARDED if num_segments > 1 else 0,)
    for turn in range(3):
        gains[0].fill_(turn)
        tensors[-1].fill_(INF if turn == 1 else 0.5)
        sample.record(
            tensors, segments, gains if num_segments > 1 else [], [num_segments - 1] if num_segments > 1 else [],
            replace=replace if turn == 2 else APPEND, modes=modes, more={"two_launches": two_launches},
        )  # fmt: skip
    gradient_scale.scale_segments_(tensors, segments, coefficients_of(sample.summary), clear=True)
    ring, count, summary, table = sample.ours
    _launch.release()
    return [each.clone() for each in (ring, count, summary, *table.columns, table.numbers, *tensors, *gains)]


def differences(emulator, num_segments, replace=APPEND, two_launches=False):
    one, other = (outcome(emulator, backward, num_segments, replace, two_launches) for backward in (False, True))
    return [place for place, (a, b) in enumerate(zip(one, other)) if not torch.equal(a.nan_to_num(3), b.nan_to_num(3))]


@pytest.mark.parametrize(
    ("num_segments", "replace", "two_launches"),
    [(1, APPEND, False), (9, REPLACE, True), (70, APPEND, False), (70, REPLACE, False), (70, REPLACE_USABLE, False)],
    ids=["one segment", "two launches", "append", "replace", "replace usable"],
)
def test_the_order_of_warps_changes_nothing(num_segments, replace, two_launches, emulator):
    assert not differences(emulator, num_segments, replace, two_launches)


def test_this_lane_fails_without_the_barrier_before_the_count_is_written(emulator, tmp_path):
    changed = broken(tmp_path, BEFORE_THE_COUNT, "")
    emulator.instead = {gradient_sums._sums_kernel: changed._sums_kernel}
    assert 0 in differences(emulator, 70), "rows of the ring"
