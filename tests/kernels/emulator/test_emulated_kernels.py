"""The compiled kernels under random schedules: every order of programs and warps, memory as weak as a GPU's.

Held against the reference and sums in float64. What a schedule changes is caught here; the numbers themselves, at
every size and alignment, are the interpreter's.
"""

import random
import sys

import pytest
import torch
from compiling import BEFORE_THE_COUNT, broken
from kernel_cases import DTYPES, EPSILON, Sample, assert_sums, place, truth

from seedtriton.gradients.row import APPEND, REPLACE, REPLACE_USABLE, SUMSQ
from seedtriton.kernels import _launch, gradient_scale, gradient_sums

F32, F64 = torch.float32, torch.float64


def gradients(chance, num_segments):
    """A few tensors of random sizes, dtypes and segments."""
    sizes = [chance.choice((1, 7, 64, 65, 130, 200)) for _ in range(chance.randint(1, 4))]
    segments = [chance.randrange(num_segments) for _ in sizes]
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
    values = [torch.randn(size, generator=generator).to(chance.choice(DTYPES)) for size in sizes]
    return [place(value, "cpu") for value in values], segments


def rows(emulator, seed, num_segments, replace=APPEND, lanes=F32, **more):
    """Two samples under one schedule each, held against the reference after every one."""
    emulator.seed = seed
    chance = random.Random(seed)
    tensors, segments = gradients(chance, num_segments)
    gains = [place(torch.randn(()), "cpu") for _ in range(min(num_segments - 1, 2))]
    loss_scale = chance.choice((None, 8.0))
    options = {"lanes": lanes, "grad_scale": loss_scale and torch.tensor([loss_scale])}
    sample = Sample(num_segments, "cpu", window=3, count=chance.randrange(7))
    for turn in range(2):
        for gain in gains:
            gain.fill_(turn + 1.0)
        for tensor in tensors:
            tensor.mul_(turn + 1.0)  # so that a number of the launch before is a wrong one
        sample.record(
            tensors, segments, gains, range(1, len(gains) + 1), replace=replace if turn else APPEND, more=more,
            **options,
        )  # fmt: skip
        sample.assert_same()
        newest = sample.ring[(int(sample.ours[1]) - 1) % 3, :, SUMSQ] * (loss_scale or 1.0) ** 2
        torch.testing.assert_close(newest, truth(tensors, segments, num_segments), rtol=EPSILON, atol=0)
        tables = next(reversed(_launch._cache._recent.values()))
        assert not tables.counters.any()


def sums(emulator, seed, num_segments, **more):
    emulator.seed = seed
    tensors, segments = gradients(random.Random(seed), num_segments)
    found = gradient_sums.segmented_sumsq(tensors, segments, num_segments, **more)
    assert_sums(found, tensors, segments, num_segments)


def scale(emulator, seed, num_segments):
    """Coefficients of 1, others, and one below 0 that clears what is not finite."""
    emulator.seed = seed
    chance = random.Random(seed)
    tensors, segments = gradients(chance, num_segments)
    tensors[-1].view(-1)[0] = float("nan")
    coefficients = torch.tensor([chance.choice((1.0, 0.5, 0.3)) for _ in range(num_segments)], dtype=F64)
    coefficients[segments[-1]] = -1.0
    norm, copy = torch.tensor([1.25], dtype=F64), torch.zeros(1)
    factors = [coefficients[segment].float() for segment in segments]
    expected = [torch.zeros_like(t) if f < 0 else (t.float() * f).to(t.dtype) for t, f in zip(tensors, factors)]
    gradient_scale.scale_segments_(tensors, segments, coefficients, clear=True, copy=(norm, copy))
    for tensor, right in zip(tensors, expected):
        assert torch.equal(tensor, right)
    assert copy.item() == 1.25


CASES = {
    "row of 1 segment on sm_80": (rows, 6, {"num_segments": 1}),
    "row of 3 on sm_80": (rows, 8, {"num_segments": 3}),
    "row of 3 on sm_90": (rows, 8, {"num_segments": 3}),
    "row of 33, more than a warp, on sm_90": (rows, 6, {"num_segments": 33}),
    "row of 300 on sm_80": (rows, 4, {"num_segments": 300}),
    "row in a grid of 2 on sm_90": (rows, 6, {"num_segments": 3, "programs": 2}),
    "row in fp64 on sm_80": (rows, 4, {"num_segments": 2, "lanes": F64}),
    "row that is replaced on sm_90": (rows, 5, {"num_segments": 3, "replace": REPLACE}),
    "row that is replaced if usable on sm_80": (rows, 5, {"num_segments": 3, "replace": REPLACE_USABLE}),
    "row in two launches on sm_90": (rows, 2, {"num_segments": 3, "two_launches": True}),
    "sums of 3 on sm_80": (sums, 20, {"num_segments": 3}),
    "sums of 3 on sm_90": (sums, 20, {"num_segments": 3}),
    "sums of 300 in a grid of 3 on sm_90": (sums, 12, {"num_segments": 300, "programs": 3}),
    "sums in fp64 on sm_80": (sums, 8, {"num_segments": 2, "lanes": F64}),
    "scale on sm_80": (scale, 20, {"num_segments": 3}),
    "scale on sm_90": (scale, 20, {"num_segments": 300}),
}


@pytest.mark.parametrize("name", CASES)
def test_under_random_schedules(name, emulator):
    run, schedules, options = CASES[name]
    emulator.target = name.split()[-1]
    for seed in range(schedules):
        run(emulator, seed, **options)
    assert emulator.launches >= schedules


def test_there_are_enough_of_them():
    assert sum(count * (2 if run is rows else 1) for run, count, _ in CASES.values()) >= 200


def test_a_launch_that_was_stopped_spoils_none_after_it(emulator):
    """Whatever it has left of counters, partial sums and marks, the two after it are right."""
    left = 0
    for seed in range(12):
        emulator.seed = seed
        tensors, segments = gradients(random.Random(seed), 3)
        emulator.turns = 60 + 10 * seed
        gradient_sums.segmented_sumsq(tensors, segments, 3)
        left += bool(next(reversed(_launch._cache._recent.values())).counters.any())
        emulator.turns = sys.maxsize
        for _ in range(2):
            for tensor in tensors:
                tensor.mul_(2.0)  # so that a partial sum of the launch before is a wrong one
            assert_sums(gradient_sums.segmented_sumsq(tensors, segments, 3), tensors, segments, 3)
    assert left > 2, "too few were stopped between the first item and the last"


def caught(emulator, tmp_path, old, new, run, schedules, **options):
    """In how many schedules a changed kernel gives wrong numbers."""
    changed = broken(tmp_path, old, new)
    emulator.instead = {gradient_sums._sums_kernel: changed._sums_kernel}
    wrong = 0
    for seed in range(schedules):
        try:
            run(emulator, seed, **options)
        except AssertionError:
            wrong += 1
            _launch.release()
    return wrong


@pytest.mark.parametrize("counter", ["arrived", "counters + segment", "counters + num_segments"])
def test_a_relaxed_atomic_is_caught(counter, emulator, tmp_path):
    """Of a tensor's items, of a segment's tensors, of the segments."""
    atomic = f'tl.atomic_add({counter}, 1, sem="{{}}"'
    assert caught(
        emulator, tmp_path, atomic.format("acq_rel"), atomic.format("relaxed"), rows, schedules=8, num_segments=3
    )


def test_a_missing_barrier_between_reading_the_count_and_writing_it_is_caught(emulator, tmp_path):
    assert caught(emulator, tmp_path, BEFORE_THE_COUNT, "", rows, schedules=6, num_segments=33)
