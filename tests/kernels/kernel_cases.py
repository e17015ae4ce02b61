"""What the kernels have to get right, for any device: run by the interpreter lane and by the GPU lane.

Truth is the sum in float64; a case passes when the kernel's error is at most eager torch's plus EPSILON.
Every tensor lies between guards of NaN, so that one element read too many shows in the sum.
"""

from __future__ import annotations

import gc
import itertools
import math
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seedtriton.gradients import reference
from seedtriton.gradients.row import (
    APART,
    APPEND,
    CLIP_COEFFICIENT,
    CLIP_EPS,
    EXTRA,
    GUARDED,
    LAYOUT,
    LIVE,
    NO_GAINS,
    QUANTITIES,
    REPLACE,
    REPLACE_USABLE,
    SUMMARY_HEAD,
    SUMSQ,
    TENSORS,
    TOTAL_NORM,
    UNSCALED,
    Flat,
    Listed,
    LossScale,
    Outside,
    Rules,
    TensorTable,
    Window,
    coefficients_of,
)
from seedtriton.kernels import _launch, _tables, gradient_scale, gradient_sums

EPSILON = 1e-6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 3, 63, 127, 1000, 4097, 65537)
NAN = float("nan")
INF = float("inf")


@pytest.fixture(autouse=True)
def clean_slate(device):
    """No tables from another test, the same numbers every time, and on a CPU NaN in what torch.empty returns."""
    _launch.release()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(device == "cpu")
    yield
    torch.use_deterministic_algorithms(False)
    _launch.release()


def place(values, device, misaligned=0):
    """A copy of ``values`` at an address that is ``misaligned`` modulo 16, between guards of NaN."""
    skip = 16 // values.element_size()
    offset = skip + misaligned // values.element_size()
    buffer = torch.full((offset + values.numel() + skip,), NAN, dtype=values.dtype, device=device)
    view = buffer[offset : offset + values.numel()]
    view.copy_(values.reshape(-1))
    assert values.numel() == 0 or view.data_ptr() % 16 == misaligned
    return view.view(values.shape)


def random(numel, dtype, device, misaligned=0):
    return place(torch.randn(numel).to(dtype), device, misaligned)


def truth(tensors, segments, num_segments):
    sums = torch.zeros(num_segments, dtype=torch.float64)
    for tensor, segment in zip(tensors, segments):
        sums[segment] += tensor.detach().cpu().double().square().sum()
    return sums


def assert_sums(found, tensors, segments, num_segments):
    """The rule of this lane: error <= eager error + EPSILON, relative, segment by segment."""
    right = truth(tensors, segments, num_segments)
    eager = reference.segmented_sumsq([t.cpu() for t in tensors], segments, num_segments)
    allowed = (eager - right).abs() + EPSILON * right
    error = (found.cpu() - right).abs()
    assert found.dtype == torch.float64
    assert bool((error <= allowed).all()), f"error {error.tolist()} where {allowed.tolist()} is allowed"


def rules_and_scale(grad_scale=None, gain_scale=None, found_inf=None, **rules):
    return Rules(**rules), LossScale(grad_scale, gain_scale, found_inf)


def kernel_record(state, gradients, gains=NO_GAINS, rules=Rules(1.0), scale=UNSCALED, **options):  # noqa: B008
    """The kernel's own ``record_``; ``flat`` may be a bare buffer, and ``settled`` beside it."""
    if "flat" in options:
        options["flat"] = Flat(options["flat"], options.pop("settled", True))
    gradient_sums.record_(
        gradients, gains, Window(*state), rules, scale, layout=LAYOUT, clip_eps=CLIP_EPS, **options
    )


# Entries of a table of tensors, and the one of the i-th tensor: another order than the tensors', and gaps.
ENTRIES = 4096


def entry_of(place):
    return (1789 * place + 5) % ENTRIES


class Sample:
    """A ring, a count, a summary and a table of tensors, poisoned, for the kernel and once more for the reference."""

    def __init__(self, num_segments, device, window=4, count=0):
        def state():
            return (
                torch.full((window, num_segments, QUANTITIES), NAN, dtype=torch.float64, device=device),
                torch.tensor(count, device=device),
                torch.full((SUMMARY_HEAD + 3 * num_segments,), NAN, dtype=torch.float64, device=device),
                TensorTable(
                    torch.full((ENTRIES,), -7.0, dtype=torch.float64, device=device),
                    torch.full((ENTRIES,), -7, dtype=torch.int32, device=device),
                    torch.zeros(ENTRIES, dtype=torch.int32, device=device),
                    torch.zeros(2, dtype=torch.int64, device=device),
                ),
            )

        self.num_segments = num_segments
        self.device = device
        self.empty = set()  # entries of tensors without elements: the kernel does not see those
        self.ours = state()
        self.theirs = state()

    @property
    def ring(self):
        return self.ours[0]

    @property
    def summary(self):
        return self.ours[2]

    def record(
        self, gradients, segments, gains=(), gain_segments=(), max_norm=1.0, eps=1e-8, more=None, replace=APPEND,
        **options,
    ):  # fmt: skip
        """One measurement by both; ``more`` is only for the kernel."""
        twins = [gain.clone() for gain in gains]
        rules, scale = rules_and_scale(max_norm=max_norm, eps=eps, **options)
        gradients = Listed(gradients, segments, [entry_of(place) for place in range(len(gradients))])
        for gradient, entry in zip(gradients.tensors, gradients.entries):
            (self.empty.discard if gradient.numel() else self.empty.add)(entry)
        copies = gradients._replace(tensors=[gradient.clone() for gradient in gradients.tensors])
        ours = Window(*self.ours, replace)
        kernel_record(ours, gradients, Listed(gains, gain_segments), rules, scale, **(more or {}))
        reference.record_(copies, Listed(twins, gain_segments), Window(*self.theirs, replace), rules, scale)
        for ours, theirs in zip(gradients.tensors, copies.tensors):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        for gain in gains:
            assert gain.item() == 0.0

    def assert_same(self, rtol=EPSILON):
        for ours, theirs in zip(self.ours[:3], self.theirs[:3]):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0.0, equal_nan=True)
        reference.settle_(self.theirs[3], self.theirs[1])
        kept = torch.tensor([entry not in self.empty for entry in range(ENTRIES)], device=self.device)
        for ours, theirs in zip(self.ours[3].columns, self.theirs[3].columns):
            torch.testing.assert_close(ours[kept], theirs[kept], rtol=rtol, atol=0.0, equal_nan=True)


def tables():
    """The only tables in the cache."""
    (found,) = _launch._cache._recent.values()
    return found


def spread(count, num_segments):
    return [index % num_segments for index in range(count)]


@pytest.mark.parametrize("num_segments", [1, 2, 8, 64])
@pytest.mark.parametrize("misaligned", [0, 4, 8, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_all_sizes_at_each_alignment(dtype, misaligned, num_segments, device):
    tensors = [random(size, dtype, device, misaligned) for size in SIZES]
    segments = [segment * (num_segments // min(num_segments, 8)) for segment in spread(len(SIZES), num_segments)]
    found = gradient_sums.segmented_sumsq(tensors, segments, num_segments)
    assert_sums(found, tensors, segments, num_segments)


@pytest.mark.parametrize("misaligned", [2, 6, 10, 14])
def test_half_precision_at_odd_alignments(misaligned, device):
    tensors = [random(size, dtype, device, misaligned) for size in SIZES for dtype in DTYPES[1:]]
    assert_sums(gradient_sums.segmented_sumsq(tensors, [0] * 16, 1), tensors, [0] * 16, 1)


def test_the_rule_can_fail(device):
    tensors = [random(1000, torch.float32, device)]
    found = gradient_sums.segmented_sumsq(tensors, [0], 1)
    for wrong in (torch.zeros_like(found), found * (1 + 3e-6), torch.full_like(found, NAN)):
        with pytest.raises(AssertionError, match="is allowed"):
            assert_sums(wrong, tensors, [0], 1)


def test_sizes_around_the_edges_of_words_blocks_and_chunks(device):
    # 1024 fp32 and 2048 bf16 are a block, four of them a group; 8192 fp32 and 16384 bf16 are a chunk.
    sizes = [1, 2, 4, 5, 8, 1023, 1024, 1025, 2048, 3073, 4095, 4096, 4097, 8191, 8192, 8193, 12288, 16384, 16385]
    for dtype, misaligned in itertools.product(DTYPES[:2], (0, 8)):
        tensors = [random(size, dtype, device, misaligned) for size in sizes]
        segments = list(range(len(sizes)))
        found = gradient_sums.segmented_sumsq(tensors, segments, len(sizes))
        assert_sums(found, tensors, segments, len(sizes))


def test_mixed_dtype_list_is_not_read_with_the_first_tensors_dtype(device):
    # Megatron-LM#7338: [bf16, fp32] came out as 0.2165 where 0.25 is right.
    for order in itertools.permutations(DTYPES):
        tensors = [place(torch.full((n,), 0.25, dtype=d), device) for d, n in zip(order, (5, 1000, 6))]
        found = gradient_sums.segmented_sumsq(tensors, [0, 0, 0], 1)
        assert found.item() == 1011 / 16


def test_zero_size_tensors(device):
    full = random(100, torch.float32, device)
    none = torch.empty(0, 3, device=device)
    sample = Sample(2, device)
    for gradients in ([none, full, none, full], [full, none], [none, none, full], [full]):
        sample.record(gradients, spread(len(gradients), 2))
        sample.assert_same()


def test_bf16_result_is_not_rounded(device):
    # 257 needs nine bits; bf16 has eight and would answer 256 (pytorch#194033).
    tensor = place(torch.ones(257, dtype=torch.bfloat16), device)
    assert gradient_sums.segmented_sumsq([tensor], [0], 1).item() == 257.0


def test_scratch_is_not_rectangular(device):
    # pytorch#190549: one large tensor and many small ones took largest x count, 24 MB for 20 KB.
    tensors = [random(65537, torch.float32, device)] + [random(1, torch.float32, device) for _ in range(20)]
    gradient_sums.segmented_sumsq(tensors, spread(21, 2), 2)
    assert tables().work.numel() == (9 + 20) + 4 * 2 + 5 + 3 * 21
    assert tables().counters.numel() == 2 * (3 + 21)


def test_unaligned_base_still_right(device):
    whole = random(70000, torch.float32, device)
    tensors = [whole[1:30000], whole[30000:30001], whole[30001:]]
    found = gradient_sums.segmented_sumsq(tensors, [0, 0, 0], 1)
    assert_sums(found, tensors, [0, 0, 0], 1)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("segment", [0, 1, 2])
def test_nan_and_inf_propagate_and_stay_in_their_segment(segment, value, device):
    for where in (0, 5000, 8999):
        tensors = [random(9000, dtype, device, 4) for dtype in DTYPES]
        tensors[segment][where] = value
        found = gradient_sums.segmented_sumsq(tensors, [0, 1, 2], 3).cpu()
        assert math.isnan(found[segment]) if math.isnan(value) else found[segment] == INF
        rest = [k for k in range(3) if k != segment]
        assert bool(found[rest].isfinite().all())


@pytest.mark.parametrize("value", [NAN, INF])
def test_row_and_clip_coefficient_of_a_sample_that_is_not_finite(value, device):
    for segment in (0, 1):
        sample = Sample(3, device)
        gradients = [random(100, torch.float32, device) for _ in range(2)]
        gradients[segment][7] = value
        sample.record(gradients, [0, 1])
        sample.assert_same()


def test_fp32_overflow_is_inf_and_fp64_lanes_are_not(device):
    tensors = [place(torch.full((100,), 1e25), device), place(torch.full((100,), 1e-25), device)]
    narrow = gradient_sums.segmented_sumsq(tensors, [0, 1], 2)
    wide = gradient_sums.segmented_sumsq(tensors, [0, 1], 2, lanes=torch.float64)
    assert narrow.tolist() == [INF, 0.0]
    torch.testing.assert_close(wide.cpu(), truth(tensors, [0, 1], 2), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp64_lanes_are_exact(dtype, device):
    tensors = [random(size, dtype, device, 4) for size in SIZES]
    found = gradient_sums.segmented_sumsq(tensors, spread(8, 2), 2, lanes=torch.float64)
    torch.testing.assert_close(found.cpu(), truth(tensors, spread(8, 2), 2), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("used", [u for n in range(4) for u in itertools.combinations(range(3), n)], ids=str)
def test_empty_segments_in_each_position(used, device):
    # An empty segment never reports that it is done: waiting for it would end the sample never, or on stale sums.
    sample = Sample(3, device)
    for _ in range(3):
        gradients = [random(9000, torch.float32, device) for _ in used]
        sample.record(gradients, list(used))
        sample.assert_same()
    if used:
        found = gradient_sums.segmented_sumsq(gradients, list(used), 3)
        assert_sums(found, gradients, list(used), 3)


def test_a_sample_of_empty_tensors_is_still_a_row(device):
    sample = Sample(2, device)
    sample.record([torch.empty(0, device=device)], [1])
    sample.record([], [])
    sample.assert_same()
    assert sample.ours[1].item() == 2
    empty = torch.empty(0, device=device)
    assert gradient_sums.segmented_sumsq([empty], [1], 3).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("two_launches", [False, True])
def test_counters_are_zero_between_calls_and_scratch_does_not_matter(two_launches, device):
    sample = Sample(3, device)
    gradients = [random(n, torch.float32, device) for n in (20000, 5, 300, 9000)]
    for _ in range(3):
        sample.record(gradients, [0, 2, 2, 0], more={"two_launches": two_launches})
        sample.assert_same()
        state = tables()
        assert state.counters.tolist() == [[0] * (3 + 1 + 4)] * 2
        # What lies in the scratch between calls must not matter, but for the numbers of tensors and elements, and where
        # the table of tensors is.
        state.work[: state.items + 6] = NAN
        state.work[state.items + 12 + 5 + 4 :] = NAN


def test_live_counts_tensors_that_are_not_all_zero(device):
    gradients = [torch.zeros(n, device=device) for n in (20000, 20000, 3, 0, 7)]
    sample = Sample(2, device, window=8)
    segments = [0, 0, 0, 1, 1]
    for change in ({}, {0: (19999, 1.0)}, {1: (0, -1.0), 2: (1, NAN)}, {4: (6, INF)}, {}):
        for gradient in gradients:
            gradient.zero_()
        for index, (where, value) in change.items():
            gradients[index][where] = value
        sample.record(gradients, segments)
        sample.assert_same()
    assert sample.ring[:5, :, LIVE].sum(1).tolist() == [0.0, 1.0, 2.0, 1.0, 0.0]


# Mean squares of tensors, by the kind that they are of with limits of 2**-10 and 2**6.
KINDS = {"dead": 0.0, "vanishing": 2.0**-22, "good": 1.0, "exploding": 2.0**14, "nan": NAN, "inf": INF}
RMS = {"vanishing_rms": 2.0**-10, "exploding_rms": 2.0**6}


def of_kind(kind, size, dtype, device, spot=None):
    """A tensor of that mean square: all in one element, or spread out."""
    mean = KINDS[kind]
    if kind in ("nan", "inf"):
        values = torch.ones(size)
        values[spot or 0] = mean
    elif spot is None:
        values = torch.full((size,), math.sqrt(mean))
    else:
        values = torch.zeros(size)
        values[spot] = math.sqrt(mean * size)
    return place(values.to(dtype), device)


def counts_of(kinds, segments, num_segments):
    """LIVE, VANISHING and EXPLODING of every segment, from what each tensor was made as."""
    counts = [[0.0, 0.0, 0.0] for _ in range(num_segments)]
    for kind, segment in zip(kinds, segments):
        counts[segment][0] += kind != "dead"
        counts[segment][1] += kind == "vanishing"
        counts[segment][2] += kind in ("exploding", "nan", "inf")
    return counts


@pytest.mark.parametrize("more", [{}, {"programs": 1}, {"programs": 3}, {"two_launches": True}], ids=str)
def test_vanishing_and_exploding_tensors_are_counted_by_their_size(more, device):
    # Neighbours of other kinds, in tensors of one item and of several: a sum that took one item too many or too few
    # would be of another kind.
    sizes = (1, 8192, 8193, 40000, 16384, 7)
    kinds = [kind for kind in KINDS for _ in range(2)]
    sample = Sample(4, device, window=8)
    for turn in range(3):
        made = kinds[turn:] + kinds[:turn]
        tensors = []
        for n, kind in enumerate(made):
            size, dtype = sizes[n % 6], DTYPES[n % 3 if kind == "good" else 0]
            tensors.append(of_kind(kind, size, dtype, device, (None, 0, size - 1)[n % 3]))
        segments = [(0, 0, 0, 2, 3)[n % 5] for n in range(len(made))]
        sample.record(tensors, segments, more=more, **RMS)
        sample.assert_same()
        assert sample.ring[turn, :, 1:4].tolist() == counts_of(made, segments, 4)


def test_more_than_a_thousand_tensors_are_counted(device):
    # More than one block of marks, of several segments side by side.
    made = [list(KINDS)[n * n % 6] for n in range(1300)]
    tensors = [of_kind(kind, 1 + n % 3, torch.float32, device) for n, kind in enumerate(made)]
    segments = [0 if n < 1100 else 1 + n % 2 for n in range(1300)]
    sample = Sample(3, device)
    sample.record(tensors, segments, more={"programs": 2}, **RMS)
    sample.assert_same()
    assert sample.ring[0, :, 1:4].tolist() == counts_of(made, segments, 3)


# Sizes for which neither side rounds.
@pytest.mark.parametrize("size", [1, 4, 16384])
def test_exactly_at_a_limit_is_neither(size, device):
    sample = Sample(1, device, window=8)
    for value, kinds in (
        (2.0**-10, [0.0, 0.0]),
        (2.0**-10 * (1 - 2**-12), [1.0, 0.0]),
        (2.0**6, [0.0, 0.0]),
        (2.0**6 * (1 + 2**-12), [0.0, 1.0]),
    ):
        for lanes in (torch.float32, torch.float64):
            sample.record([place(torch.full((size,), value), device)], [0], lanes=lanes, **RMS)
            sample.assert_same()
            assert sample.ring[(sample.ours[1].item() - 1) % 8, 0, 2:4].tolist() == kinds


def test_limits_are_of_gradients_without_the_loss_scale(device):
    sample = Sample(1, device, window=8)
    scale = torch.tensor(2.0**8, device=device)
    for rms, kinds in ((2.0**-11, [1.0, 0.0]), (2.0**-9, [0.0, 0.0]), (2.0**5, [0.0, 0.0]), (2.0**7, [0.0, 1.0])):
        sample.record([place(torch.full((9000,), rms * 2**8), device)], [0], grad_scale=scale, **RMS)
        sample.assert_same()
        assert sample.ring[(sample.ours[1].item() - 1) % 8, 0, 2:4].tolist() == kinds


def test_limits_can_be_switched_off_without_another_kernel(device):
    kinds = list(KINDS)
    tensors = [of_kind(kind, 9000, torch.float32, device) for kind in kinds]
    sample = Sample(1, device, window=8)
    sample.record(tensors, [0] * 6, vanishing_rms=0.0, exploding_rms=INF)
    sample.assert_same()
    assert sample.ring[0, 0, 1:4].tolist() == [5.0, 0.0, 2.0]
    sample.record(tensors, [0] * 6, **RMS)
    sample.assert_same()
    assert sample.ring[1, 0, 1:4].tolist() == [5.0, 1.0, 3.0]
    assert len(_launch._cache) == 1


def test_ring_wraps_around(device):
    sample = Sample(2, device, window=3)
    for step in range(7):
        sample.record([random(10 + step % 2, torch.float32, device)], [step % 2])
        sample.assert_same()
    assert sample.ours[1].item() == 7


def test_gains_are_read_negated_and_set_to_zero(device):
    sample = Sample(70, device)
    gradients = [random(10, torch.float32, device)]
    for segments in ([3, 69], [69, 1, 40], []):
        gains = [torch.randn((), device=device) for _ in segments]
        values = [gain.item() for gain in gains]
        sample.record(gradients, [0], gains, segments)
        sample.assert_same()
        row = sample.ring[sample.ours[1].item() - 1, :, EXTRA]
        assert row[segments].tolist() == [-value for value in values]


STALE = {"finite": (1.0, 0.0), "skipped": (1.0, 1.0), "host not finite": (INF, 0.0)}


@pytest.mark.parametrize("more", [{}, {"two_launches": True}], ids=["one-launch", "two-launches"])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 7])  # nothing before it; the first, middle and last place of a ring of 3
@pytest.mark.parametrize("stale", STALE)
@pytest.mark.parametrize("replace", [APPEND, REPLACE, REPLACE_USABLE])
def test_the_newest_row_is_replaced_and_its_gains_are_added_to(replace, stale, count, more, device):
    value, skipped = STALE[stale]
    sample = Sample(40, device, window=3)
    found_inf = torch.tensor(skipped, device=device)
    for index in range(count):
        # The last row before is that of the same step: a seed has a gain, another none.
        old = place(torch.full((5,), value if index == count - 1 else 1.0), device)
        gains = [torch.tensor(2.0, device=device), torch.tensor(0.5, device=device)]
        sample.record([old], [0], gains, [3, 39], found_inf=found_inf)
    new = [random(9, torch.float32, device), random(9, torch.float32, device)]
    gains = [torch.tensor(0.25, device=device), torch.tensor(8.0, device=device)]
    sample.record(new, [0, 3], gains, [3, 7], replace=replace, more=more)
    sample.assert_same()
    replaced = count > 0 and (replace == REPLACE or (replace == REPLACE_USABLE and stale == "finite"))
    assert sample.ours[1].item() == count + (not replaced)
    row = sample.ring[(sample.ours[1].item() - 1) % 3]
    before, other = (2.0, -0.5) if replaced else (0.0, NAN)
    assert row[[0, 3, 7], EXTRA].tolist() == [0.0, -0.25 - before, -8.0]
    assert row[39, EXTRA].item() == pytest.approx(other, nan_ok=True)
    assert row[:, EXTRA].isnan().sum().item() == 40 - (4 if replaced else 3)
    assert row[3, SUMSQ].item() == pytest.approx(truth(new[1:], [0], 1).item())


@pytest.mark.parametrize("bad", [NAN, INF])
def test_the_gain_of_a_segment_that_was_not_finite_is_not_added_to(bad, device):
    sample = Sample(3, device)
    for seed, gains in ((bad, (1.0, 2.0)), (1.0, (4.0, 8.0))):
        gradients = [torch.full((5,), value, device=device) for value in (1.0, seed, 1.0)]
        sample.record(
            gradients, [0, 1, 2], [torch.tensor(gain, device=device) for gain in gains], [1, 2], replace=REPLACE
        )
    sample.assert_same()
    assert sample.ours[1].item() == 1
    assert sample.ring[0, 1:, EXTRA].tolist() == [-4.0, -10.0]


@pytest.mark.parametrize("more", [{}, {"two_launches": True}], ids=["one-launch", "two-launches"])
@pytest.mark.parametrize("replace", [REPLACE, REPLACE_USABLE])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_segment_in_quarantine_is_so_for_all_of_the_step(bad, replace, more, device):
    sample = Sample(40, device, window=2)
    behind = APART | GUARDED
    modes = (0, behind, behind, *[0] * 37)
    sample.record([place(torch.ones(5), device)], [0], modes=modes)  # another step: it stays
    for micro, value in enumerate((bad, 3.0, 4.0)):
        gradients = [place(torch.full((4,), x), device) for x in (1.0, value, 2.0)]
        how = APPEND if micro == 0 else replace
        sample.record(gradients, [0, 1, 2], max_norm=1.0, modes=modes, replace=how, more=more)
        sample.assert_same()
        assert sample.ours[1].item() == 2
        assert sample.ring[1, [0, 2], SUMSQ].tolist() == [4.0, 16.0]
        assert not math.isfinite(sample.ring[1, 1, SUMSQ])
        # What is there now is clipped as it is, and cleared only where it is not finite.
        found = coefficients_of(sample.summary)[:3].tolist()
        assert found == pytest.approx([0.5, -1.0 if micro == 0 else 0.5 / value, 0.25], rel=1e-5)
    sample.record(gradients, [0, 1, 2], modes=modes)
    sample.assert_same()
    assert sample.ours[1].item() == 3
    assert sample.ring[0, [0, 1, 2], SUMSQ].tolist() == [4.0, 64.0, 16.0]


def test_a_gain_that_is_not_a_number_makes_the_sum_of_its_step_one(device):
    sample = Sample(3, device)
    for values in ((0.5, 1.0), (NAN, 1.0)):
        gains = [torch.tensor(value, device=device) for value in values]
        sample.record([random(9, torch.float32, device)], [0], gains, [1, 2], replace=REPLACE)
    sample.assert_same()
    assert sample.ours[1].item() == 1
    assert (math.isnan(sample.ring[0, 1, EXTRA]), sample.ring[0, 2, EXTRA].item()) == (True, -2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scales_and_found_inf(dtype, device):
    gains = [torch.tensor(0.75, device=device)]
    sample = Sample(3, device, window=16)
    gradients = [random(1000, torch.float32, device) for _ in range(3)]
    numbers = [None, torch.tensor([1024.0], dtype=dtype, device=device), torch.tensor(3.0, dtype=dtype, device=device)]
    for grad_scale, gain_scale in itertools.product(numbers, numbers):
        gains[0].fill_(0.75)
        sample.record(gradients, [0, 1, 2], gains, [2], grad_scale=grad_scale, gain_scale=gain_scale)
    for skip in (0.0, 1.0, 2.5):
        found_inf = torch.tensor([skip], dtype=dtype, device=device)
        sample.record(gradients, [0, 1, 2], found_inf=found_inf)
    sample.assert_same()
    assert sample.ring[9:12, 0, EXTRA].tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1.0, 1e9, INF])
def test_clip_coefficient_is_that_of_clip_grad_norm(max_norm, device):
    sample = Sample(2, device)
    parameters = [torch.nn.Parameter(torch.zeros(n, device=device)) for n in (100, 3000)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in parameters]
    sample.record([parameter.grad for parameter in parameters], [0, 1], max_norm=max_norm)
    sample.assert_same()
    gradient_scale.scale_([p.grad for p in parameters], sample.summary[CLIP_COEFFICIENT])
    scaled = [parameter.grad.clone() for parameter in parameters]
    for parameter, gradient in zip(parameters, before):
        parameter.grad = gradient
    total = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    torch.testing.assert_close(sample.summary[TOTAL_NORM].float(), total)
    for ours, parameter in zip(scaled, parameters):
        torch.testing.assert_close(ours, parameter.grad)


MODES = [(0, 0, 0), (0, APART, 0), (0, APART | GUARDED, APART | GUARDED), (0, GUARDED, 0)]


@pytest.mark.parametrize("more", [{}, {"programs": 2}, {"two_launches": True}], ids=str)
@pytest.mark.parametrize("value", [None, NAN, INF])
@pytest.mark.parametrize("modes", MODES)
def test_segments_apart_and_guarded_have_their_own_coefficients(modes, value, more, device):
    sample = Sample(3, device)
    gradients = [random(n, dtype, device) for n, dtype in zip((9000, 33, 8192, 5), [*DTYPES, torch.float32])]
    gradients[1] *= 50
    if value is not None:
        gradients[1][7] = value
    segments = [0, 1, 2, 1]
    sums = truth(gradients, segments, 3)
    sample.record(gradients, segments, max_norm=1.0, modes=modes, more=more)
    sample.assert_same()
    gone = [bool(mode & GUARDED) and not torch.isfinite(total) for mode, total in zip(modes, sums)]
    for gradient, segment in zip(gradients, segments):
        assert not gone[segment] or (gradient == 0).all()
    found = sample.summary[SUMMARY_HEAD + 3 :].reshape(2, 3).tolist()
    assert [number < 0 for number in found[1]] == gone
    expected = [gradient.clone() for gradient in gradients]
    coefficients = coefficients_of(sample.summary)
    reference.scale_segments_(Listed(expected, segments), coefficients, clear=True)
    gradient_scale.scale_segments_(gradients, segments, coefficients, clear=True)
    for ours, theirs, segment in zip(gradients, expected, segments):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert not gone[segment] or (ours == 0).all()


def test_a_segment_at_one_is_not_touched_and_only_whoever_clears_takes_a_negative_for_zeros(device):
    tensors = [random(n, dtype, device) for n, dtype in zip((8193, 40, 17), DTYPES)]
    tensors[0][0] = tensors[2][3] = NAN
    before = [tensor.clone() for tensor in tensors]
    coefficients = torch.tensor([1.0, 0.25, -1.0], dtype=torch.float64, device=device)
    gradient_scale.scale_segments_(tensors, (0, 1, 2), coefficients)
    torch.testing.assert_close(tensors[0], before[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(tensors[1], before[1] * 0.25, rtol=0, atol=0)
    torch.testing.assert_close(tensors[2], -before[2], rtol=0, atol=0, equal_nan=True)
    gradient_scale.scale_segments_(tensors, (0, 1, 2), coefficients, clear=True)
    assert (tensors[2] == 0).all()
    with pytest.raises(ValueError, match="coefficients must be float32 or float64 of one dimension"):
        gradient_scale.scale_segments_(tensors, (0, 1, 2), coefficients.half())


def test_what_is_not_finite_elsewhere_clears_what_the_kernel_holds_of_the_segment(device):
    gradients = [random(9000, torch.bfloat16, device), random(20, torch.float32, device)]
    kept = gradients[0].clone()
    columns = torch.zeros(2, LAYOUT.measured, dtype=torch.float64, device=device)
    columns[1, 0] = NAN
    sample = Sample(2, device)
    kernel_record(
        sample.ours, Listed(gradients, [0, 1]), rules=Rules(modes=(0, GUARDED)),
        outside=Outside(columns, [(0, 0), (1, 1)]),
    )  # fmt: skip
    assert torch.equal(gradients[0], kept)
    assert (gradients[1] == 0).all()


def test_modes_that_change_reach_the_device(device):
    sample = Sample(2, device)
    gradients = [random(10, torch.float32, device) for _ in range(2)]
    for modes in ((0, APART), (), (0, GUARDED), (0, APART)):
        sample.record(gradients, [0, 1], max_norm=0.5, modes=modes)
        sample.assert_same()


def test_tensors_without_entries_of_their_own_are_noted_in_their_order(device):
    # By segment, the kernel takes them in another order, and drops the empty one.
    gradients = [random(n, torch.float32, device) for n in (9000, 3, 0, 20000, 7)]
    gradients[3][19999], segments = INF, [2, 0, 1, 1, 0]
    for more in ({}, {"programs": 2}, {"two_launches": True}):
        sample = Sample(3, device)
        for _ in range(2):
            kernel_record(sample.ours, Listed(gradients, segments), **more)
        sumsq, last, first = (column[:6].tolist() for column in sample.ours[3].columns)
        right = [gradient.double().square().sum().item() for gradient in gradients]
        assert [sumsq[0], sumsq[1], *sumsq[3:5]] == pytest.approx([right[0], right[1], *right[3:5]], rel=EPSILON)
        assert (sumsq[2], sumsq[5]) == (-7.0, -7.0)
        assert last == [2, 2, -7, 2, 2, -7]
        assert first == [0, 0, 0, 1, 0, 0]


def test_other_entries_for_the_same_tensors_are_other_entries_on_the_device(device):
    gradients = [random(10, torch.float32, device) for _ in range(3)]
    sample = Sample(2, device)
    for entries in ([0, 1, 2], [4, 1, 3], None, [4, 1, 3]):
        kernel_record(sample.ours, Listed(gradients, [0, 1, 0], entries))
    right = [gradient.double().square().sum().item() for gradient in gradients]
    assert sample.ours[3].sumsq[:5].tolist() == pytest.approx([*right, right[2], right[0]], rel=EPSILON)
    assert sample.ours[3].last[:6].tolist() == [3, 4, 3, 4, 4, -7]


def test_outside_sums_meet_the_kernels(device):
    sample = Sample(3, device)
    inside = [random(1000, torch.float32, device), random(10, torch.bfloat16, device)]
    other = [torch.randn(50, dtype=torch.float64, device=device), torch.zeros(4, dtype=torch.float64, device=device)]
    other += [torch.full((n,), x, dtype=torch.float64, device=device) for n, x in ((3, 1e-12), (9, 1e3))]
    segments = [0, 2, 1, 0]
    scale = torch.tensor(4.0, device=device)
    entries = [entry_of(place) for place in range(6)]
    sums = reference.sums_of(Listed(other, segments), Rules(), torch.device(device))
    reference.note_tensors_(sample.ours[3], sample.ours[1] + 1, sums, entries[2:])
    outside = reference.columns_of_sums(sums, list(map(torch.Tensor.numel, other)), segments, 3, Rules(), scale)
    kernel_record(
        sample.ours, Listed(inside, [0, 1], entries[:2]), scale=LossScale(scale),
        outside=Outside(outside, [(2, 59), (1, 3), (1, 4)]),
    )  # fmt: skip
    every = Listed(inside + other, [0, 1, *segments], entries)
    reference.record_(every, NO_GAINS, Window(*sample.theirs), Rules(1.0), LossScale(scale))
    sample.assert_same()
    assert sample.ring[0, :, LIVE : TENSORS].tolist() == [[3, 0, 1], [2, 1, 0], [0, 0, 0]]
    found = gradient_sums.segmented_sumsq(inside, [0, 1], 3, outside=outside[:, :1])
    assert_sums(found, inside + other, [0, 1, *segments], 3)
    for wrong in (outside, outside[:2, :1]):
        with pytest.raises(ValueError, match=r"outside must be float64 \[3, 1\]"):
            gradient_sums.segmented_sumsq(inside, [0, 1], 3, outside=wrong)


def test_the_default_device_is_not_asked(device):
    tensors = [random(n, torch.float32, device) for n in (9001, 3, 101)]
    with torch.device("meta"):
        found = gradient_sums.segmented_sumsq(tensors, [0, 1, 0], 2)
        gradient_scale.scale_(tensors, torch.tensor(0.5, device=device))
        halved = gradient_sums.segmented_sumsq(tensors, [0, 1, 0], 2)
    assert_sums(halved, tensors, [0, 1, 0], 2)
    torch.testing.assert_close(found, 4 * halved, rtol=1e-6, atol=0.0)


def test_addresses_that_change_between_calls(device):
    # As under zero_grad(set_to_none=True): the same shapes at other places, at other alignments too.
    kept = []
    for misaligned in (0, 0, 8, 4, 12, 0):
        tensors = [random(n, torch.float32, device, misaligned) for n in (9000, 3, 100)]
        kept.append(tensors)
        found = gradient_sums.segmented_sumsq(tensors, [0, 1, 0], 2)
        assert_sums(found, tensors, [0, 1, 0], 2)
    assert len(_launch._cache) == 1


def test_one_address_with_another_shape_dtype_or_layout_is_another_plan(device):
    whole = random(600, torch.float32, device)
    views = [
        whole[:500], whole[:300], whole[:300].view(torch.bfloat16), whole[:300].view(torch.float16),
        whole[:600].view(20, 30), whole[:600].view(20, 30).t(), whole[:0], whole,
    ]  # fmt: skip
    assert len({view.data_ptr() for view in views if view.numel()}) == 1
    for view in views * 2:
        if view.dtype != torch.float32:
            view.fill_(0.5)
        assert_sums(gradient_sums.segmented_sumsq([view], [0], 1), [view], [0], 1)


def test_a_list_that_is_known_is_looked_at_by_one_call(device, monkeypatch):
    shapes, segments = [(9000,), (3, 5), (0, 4), (100,)], (0, 1, 1, 0)
    for turn in range(3):
        tensors = [torch.randn(shape, device=device) for shape in shapes]
        assert_sums(gradient_sums.segmented_sumsq(tensors, segments, 2), tensors, segments, 2)
        if not turn:
            nobody_asks_each(monkeypatch)
    assert len(_launch._cache) == 1


def nobody_asks_each(monkeypatch):
    for name in ("_signature", "unsupported"):
        monkeypatch.setattr(_launch, name, lambda *args: pytest.fail("each was asked"))


def test_a_layout_with_holes_at_a_known_address_is_refused(device):
    whole = random(600, torch.float32, device).view(30, 20)
    gradient_sums.segmented_sumsq([whole.t()], [0], 1)
    with pytest.raises(_launch.Unsupported, match=r"tensor 1 .*strides \(40, 1\)"):
        gradient_sums.segmented_sumsq([whole, whole[::2]], [0, 0], 1)


def test_other_segments_for_the_same_tensors(device):
    tensors = [random(n, torch.float32, device) for n in (9000, 3, 100)]
    for segments in itertools.permutations(range(3)):
        assert_sums(gradient_sums.segmented_sumsq(tensors, segments, 3), tensors, segments, 3)


def test_flat_mode_follows_its_buffer(device):
    numels = (100, 0, 9001, 33)
    sample = Sample(3, device, window=8)
    for misaligned in (0, 4, 8):
        flat = random(sum(numels), torch.float32, device, misaligned)
        gradients = list(flat.split(numels))
        gains = [torch.randn((), device=device)]
        for _ in range(2):
            sample.record(gradients, [0, 2, 1, 0], gains, [2], more={"flat": flat})
            sample.assert_same()
            flat.mul_(2.0)
    assert len(_launch._cache) == 1


def test_views_that_move_within_their_buffer_are_followed(device, monkeypatch):
    """As DDP moves them when it lays out its buckets anew: same shapes, same size, the same two ends."""
    uploads = []
    upload = _launch.Tables.upload
    monkeypatch.setattr(_launch.Tables, "upload", lambda *args: uploads.append(1) or upload(*args))
    numels = (100, 300, 300, 33)
    sample = Sample(3, device, window=8)
    flat = random(sum(numels), torch.float32, device, 4)
    flat[100:400] *= 100.0  # whoever reads the second for the third sees it

    def record(order, flat):
        views = dict(zip(order, flat.split([numels[i] for i in order])))
        sample.record([views[i] for i in range(4)], [0, 1, 2, 0], more={"flat": flat, "settled": False})
        sample.assert_same()

    record((0, 1, 2, 3), flat)
    nobody_asks_each(monkeypatch)
    record((0, 1, 2, 3), flat)
    assert len(uploads) == 1
    record((0, 2, 1, 3), flat)
    assert len(uploads) == 2
    record((0, 2, 1, 3), random(sum(numels), torch.float32, device, 8))  # the buffer as a whole
    assert len(uploads) == 2
    assert len(_launch._cache) == 1


def test_views_of_other_shapes_or_layouts_in_a_known_buffer_are_another_plan(device):
    sample = Sample(2, device, window=8)
    flat = random(600, torch.float32, device)
    for views in (
        [flat[:300], flat[300:]],
        [flat[:300].view(30, 10), flat[300:].view(10, 30).T],
        [flat[:100], flat[300:]],
    ):
        sample.record(views, [0, 1], more={"flat": flat, "settled": False})
        sample.assert_same()
    holes = [flat[:300], flat[300:].view(20, 15)[:, :7]]
    with pytest.raises(_launch.Unsupported, match="tensor 1"):
        sample.record(holes, [0, 1], more={"flat": flat, "settled": False})


def test_flat_mode_refuses_what_is_not_in_the_buffer(device):
    flat = random(100, torch.float32, device)
    with pytest.raises(ValueError, match="tensor 1 does not lie in the flat buffer"):
        gradient_sums.segmented_sumsq([flat, random(1000, torch.float32, device)], [0, 0], 1, flat=flat)


@pytest.mark.parametrize("lanes", [torch.float32, torch.float64], ids=str)
def test_same_bits_on_every_grid_and_from_two_launches(lanes, device):
    tensors = [random(n, d, device, 4) for n, d in zip((20000, 9000, 70000, 5), DTYPES * 2)]
    segments = [0, 2, 0, 3]
    usual = gradient_sums.segmented_sumsq(tensors, segments, 4, lanes)
    for programs in (1, 2, 5, 1000):
        assert torch.equal(usual, gradient_sums.segmented_sumsq(tensors, segments, 4, lanes, programs=programs))
    assert torch.equal(usual, gradient_sums.segmented_sumsq(tensors, segments, 4, lanes, two_launches=True))
    rows = []
    for more in ({}, {"programs": 1}, {"programs": 3}, {"two_launches": True}):
        sample = Sample(4, device)
        sample.record(tensors, segments, lanes=lanes, more=more)
        rows.append((sample.ring[0].nan_to_num(-1.0), sample.summary, *sample.ours[3].columns))
    for row in rows[1:]:
        for ours, first in zip(row, rows[0]):
            assert torch.equal(ours, first)


def test_dense_layouts_are_walked_in_storage_order(device):
    image = torch.randn(2, 3, 5, 7, device=device)
    tensors = [
        image.to(memory_format=torch.channels_last), image.permute(3, 0, 2, 1), torch.randn(4, 6, device=device).t(),
        torch.tensor(3.0, device=device), torch.randn(5, 1, 1, device=device).transpose(0, 2),
    ]  # fmt: skip
    assert [gradient_sums.unsupported(t, torch.device(device)) for t in tensors] == [None] * 5
    assert_sums(gradient_sums.segmented_sumsq(tensors, [0] * 5, 1), tensors, [0] * 5, 1)


def test_what_the_kernel_cannot_take_is_named(device):
    class Special(torch.Tensor):
        pass

    plain = random(10, torch.float32, device)
    refused = {
        "layout": torch.eye(3, device=device).to_sparse(),
        "complex64": torch.randn(3, dtype=torch.complex64, device=device),
        "float64": torch.randn(3, dtype=torch.float64, device=device),
        "overlap": torch.randn(1, device=device).expand(5),
        "holes": torch.randn(10, device=device)[::2],
        "int32": torch.ones(3, dtype=torch.int32, device=device),
        "negated": torch.randn(3, dtype=torch.complex64, device=device).conj().imag,
        "meta": torch.empty(3, device="meta"),
        "Special": torch.randn(3, device=device).as_subclass(Special),
    }
    assert gradient_sums.unsupported(plain) is None
    for word, tensor in refused.items():
        assert word in gradient_sums.unsupported(tensor)
        with pytest.raises(gradient_sums.Unsupported, match=rf"tensor 1 .*{word}") as caught:
            gradient_sums.segmented_sumsq([plain, tensor], [0, 0], 1)
        assert caught.value.index == 1
    with pytest.raises(ValueError, match="no tensors"):
        gradient_sums.segmented_sumsq([], [], 1)


def test_gains_that_cannot_be_read_are_named(device):
    sample = Sample(3, device)
    one = torch.zeros((), device=device)
    for gains, segments, words in (
        ([one.double()], [1], "gain 0 is torch.float64"),
        ([torch.zeros(2, device=device)], [1], r"gain 0 is torch.float32 \[2\]"),
        ([one, one.clone()], [1, 1], "none twice"),
        ([one], [], "one for each"),
    ):
        with pytest.raises(ValueError, match=words):
            sample.record([], [], gains, segments)


def test_tables_hold_no_gradient_and_are_bounded(device):
    references = []
    for size in range(1, _tables.CACHED + 10):
        tensor = torch.zeros(size, device=device)
        references.append(weakref.ref(tensor))
        gradient_sums.segmented_sumsq([tensor], [0], 1)
        del tensor
    gc.collect()
    assert not any(reference() is not None for reference in references)
    assert len(_launch._cache) == _tables.CACHED
    _launch.release()
    assert len(_launch._cache) == 0


@pytest.mark.parametrize("stopped", [1, 3])
def test_counters_that_a_stopped_launch_has_left_heal_by_themselves(stopped, device):
    sample = Sample(3, device)
    gradients = [random(n, torch.float32, device) for n in (20000, 5, 300, 9000)]
    for number in range(stopped):
        sample.record(gradients, [0, 2, 2, 0])
        state = tables()
        left = state.turn()  # of a launch of which half the programs have run
        row = (left - state.counters.data_ptr()) // state.counters[0].nbytes
        state.counters[row] = torch.arange(8, device=device) + number
        for _ in range(2):
            sample.record(gradients, [0, 2, 2, 0])
            sample.assert_same()
        assert not state.counters.any()


def test_each_capture_has_tables_of_its_own(device, monkeypatch):
    gradients = [random(100, torch.float32, device)]
    sample = Sample(1, device)
    stream = _launch._stream(torch.device(device))[0]
    owned = []
    for capture in (1, 2):
        with monkeypatch.context() as patch:
            sample.record(gradients, [0])
            owned.append(tables())
            for _ in range(2):  # twice in one graph, on one stream
                patch.setattr(_launch, "_stream", lambda _, capture=capture: (stream + 1, capture))
                sample.record(gradients, [0])
            assert len(_launch._cache) == 0
            patch.setattr(_launch, "_stream", lambda _, capture=capture: (stream + 2, capture))
            with pytest.raises(_launch.Uncapturable, match=r"another CUDA graph or to another stream.*before each"):
                sample.record(gradients, [0])
    assert owned[0].work_address != owned[1].work_address
    assert not {owned[0].turn(), owned[0].turn()} & {owned[1].turn(), owned[1].turn()}
    sample.assert_same()


@pytest.mark.parametrize("kind", ["subclass", "negated"])
def test_a_signature_that_is_known_lets_nothing_else_in(kind, device):
    """Same shapes, dtypes and strides, and at the same addresses even: what they are is looked at in every call."""
    class Other(torch.Tensor):
        pass

    tensors = [random(64, torch.float32, device) for _ in range(2)]
    found = gradient_sums.segmented_sumsq(tensors, [0, 1], 2)
    impostor = {
        "subclass": lambda: tensors[1].as_subclass(Other),
        "negated": lambda: torch._neg_view(tensors[1]),
    }[kind]()
    before = tables()._addresses.values.tolist()
    for _ in range(2):
        with pytest.raises(_launch.Unsupported, match=r"Other, not a plain tensor|negated") as caught:
            gradient_sums.segmented_sumsq([tensors[0], impostor], [0, 1], 2)
        assert caught.value.index == 1
        assert tables()._addresses.values.tolist() == before
    assert torch.equal(gradient_sums.segmented_sumsq(tensors, [0, 1], 2), found)


def test_an_upload_during_a_capture_names_the_tensor_that_moved(device, monkeypatch):
    gradients = [random(n, torch.float32, device) for n in (100, 9000)]
    gains = [torch.zeros((), device=device)]
    sample = Sample(2, device)
    sample.record(gradients, [0, 1], gains, [1])
    stream = _launch._stream(torch.device(device))[0]
    monkeypatch.setattr(_launch, "_stream", lambda _: (stream, 1))
    moved = [gradients[0], gradients[1].clone()]
    old, new = (t.data_ptr() for t in (gradients[1], moved[1]))
    expected = f"tensor 1 moved from {old:#x} to {new:#x}.*set_to_none=False"
    with pytest.raises(_launch.Uncapturable, match=expected) as caught:
        sample.record(moved, [0, 1], gains, [1])
    assert (caught.value.index, caught.value.gain) == (1, False)
    with pytest.raises(_launch.Uncapturable, match="gain 0 moved") as caught:
        sample.record(gradients, [0, 1], [gains[0].clone()], [1])
    assert (caught.value.index, caught.value.gain) == (0, True)
    with pytest.raises(_launch.Uncapturable, match="not measured before") as caught:
        sample.record(gradients[:1], [0], gains, [1])
    assert caught.value.index is None
    gains[0].zero_()
    sample.record(gradients, [0, 1], gains, [1])  # these were measured
    sample.assert_same()


def test_of_several_measurements_before_a_capture_the_one_that_differs_least_says_what_moved(device, monkeypatch):
    sample = Sample(1, device)
    stream = _launch._stream(torch.device(device))[0]
    first, second = ([random(n, torch.float32, device) for n in (100, 9000)] for _ in range(2))
    sample.record(first, [0, 0])
    monkeypatch.setattr(_launch, "_stream", lambda _: (stream + 1, 0))
    sample.record(second, [0, 0])
    monkeypatch.setattr(_launch, "_stream", lambda _: (stream, 1))
    with pytest.raises(_launch.Uncapturable, match="tensor 1 moved"):
        sample.record([second[0], second[1].clone()], [0, 0])


def test_tables_of_a_captured_graph_are_never_uploaded_to_again(device, monkeypatch):
    gradients = [random(100, torch.float32, device)]
    sample = Sample(1, device)
    sample.record(gradients, [0])
    captured = tables()
    with monkeypatch.context() as patch:
        stream = _launch._stream(torch.device(device))[0]
        patch.setattr(_launch, "_stream", lambda _: (stream + 1, 1))  # capture happens on a stream of its own
        sample.record(gradients, [0])
        sample.record(gradients, [0])
    held = captured._addresses.values.tolist()
    sample.record([gradients[0].clone()], [0])
    assert tables() is not captured
    assert captured._addresses.values.tolist() == held
    sample.assert_same()


def rounded(values, dtype, device):
    """fp32 to dtype as the device rounds; Triton's interpreter cuts bf16 off instead of rounding it."""
    if dtype == torch.bfloat16 and device == "cpu":
        return (values.contiguous().view(torch.int32) & -65536).view(torch.float32).to(dtype)
    return values.to(dtype)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("misaligned", [0, 4, 8, 12])
def test_scaling_multiplies_in_fp32_and_rounds_once(misaligned, wide, device):
    coefficient = torch.tensor(0.3, dtype=torch.float64 if wide else torch.float32, device=device)
    tensors = [random(size, dtype, device, misaligned) for size in (*SIZES[:7], 9000) for dtype in DTYPES]
    buffers = [tensor._base.clone() for tensor in tensors]
    expected = [rounded(t.float() * coefficient.float(), t.dtype, device) for t in tensors]
    versions = [tensor._version for tensor in tensors]
    gradient_scale.scale_(tensors, coefficient)
    for tensor, right, before, version in zip(tensors, expected, buffers, versions):
        assert torch.equal(tensor, right)
        # Guards: nothing beside the tensor is written.
        inside = tensor.numel()
        start = tensor.storage_offset()
        after = tensor._base.clone()
        after[start : start + inside] = before[start : start + inside]
        assert torch.equal(after.view(torch.int16), before.view(torch.int16))
        assert tensor._version > version


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_agrees_with_torch(dtype, device):
    # fp32 and fp16 to the bit; bf16 within one rounding, because the interpreter does not round it.
    tensor = random(5000, dtype, device)
    expected = (tensor.float() * 0.3).to(dtype)
    gradient_scale.scale_([tensor], torch.tensor(0.3, device=device))
    torch.testing.assert_close(tensor, expected, rtol=2**-7 if dtype == torch.bfloat16 else 0.0, atol=0.0)


def test_a_coefficient_of_exactly_one_touches_nothing(device):
    # A signalling NaN with a payload would come back quiet from any multiplication.
    poison = torch.arange(1, 9001, dtype=torch.int32, device=device) + 0x7F800000
    tensor = poison.clone().view(torch.float32)
    for one in (torch.tensor(1.0, device=device), torch.tensor(1.0, dtype=torch.float64, device=device)):
        gradient_scale.scale_([tensor, random(5, torch.bfloat16, device)], one)
        assert torch.equal(tensor.view(torch.int32), poison)


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_programs_that_scale_go_from_item_to_item(programs, device, monkeypatch):
    monkeypatch.setattr(gradient_scale, "PROGRAMS", programs)
    tensors = [random(size, torch.float32, device, 4) for size in (20000, 5, 40000, 300, 1)]
    factors = torch.tensor([0.5, 1.0, -1.0, 3.0], device=device)
    segments = [3, 0, 1, 2, 3]
    tensors[2][:] = NAN  # its coefficient is 1
    expected = [t * factors[k] if factors[k] > 0 else torch.zeros_like(t) for t, k in zip(tensors, segments)]
    gradient_scale.scale_segments_(tensors, segments, factors, clear=True)
    for tensor, right in zip(tensors, expected):
        assert torch.equal(tensor.nan_to_num(7.0), right.nan_to_num(7.0))


@pytest.mark.parametrize("different", [0, 127, 128, 299])
def test_one_coefficient_of_many_that_is_not_one_is_seen(different, device):
    tensors = [place(torch.full((2,), 3.0), device) for _ in range(300)]
    factors = torch.ones(300, device=device)
    factors[different] = 2.0
    gradient_scale.scale_segments_(tensors, range(300), factors)
    assert [tensor[0].item() for tensor in tensors] == [6.0 if k == different else 3.0 for k in range(300)]


def test_programs_that_scale_have_equal_shares():
    most = gradient_scale.PROGRAMS
    for items in (1, 2, most - 1, most, most + 1, 2 * most, 15_361, 10**6):
        programs = gradient_scale.programs_for(items)
        assert programs <= min(items, most)
        assert -(-items // programs) == -(-items // most)  # as few rounds as all of them would need
        assert items > (-(-items // programs) - 1) * programs
    assert gradient_scale.programs_for(15_361) == 1921


@pytest.mark.parametrize("value", [NAN, INF, 0.0, -1.0, 1.0 + 2**-23])
def test_scaling_by_special_coefficients(value, device):
    tensors = [random(n, torch.float32, device) for n in (1, 3000)]
    expected = [tensor * value for tensor in tensors]
    gradient_scale.scale_(tensors, torch.tensor(value, device=device))
    for tensor, right in zip(tensors, expected):
        torch.testing.assert_close(tensor, right, rtol=0.0, atol=0.0, equal_nan=True)


def test_scaling_refuses_what_it_would_race_on(device):
    tensor = random(10, torch.float32, device)
    coefficient = torch.tensor(0.5, device=device)
    with pytest.raises(gradient_scale.Unsupported, match="lies where tensor 0 does"):
        gradient_scale.scale_([tensor, tensor], coefficient)
    with pytest.raises(ValueError, match="coefficient must be one"):
        gradient_scale.scale_([tensor], torch.ones(2, device=device))
    gradient_scale.scale_([], coefficient)
    gradient_scale.scale_([torch.empty(0, device=device)], coefficient)


LISTS = st.lists(
    st.tuples(st.integers(0, 9000), st.sampled_from(DTYPES), st.sampled_from([0, 4, 8, 12]), st.integers(0, 4)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(items=LISTS, grad_scale=st.sampled_from([None, 2.0, 65536.0]), max_norm=st.floats(0.0, 1e6))
def test_any_list_gives_the_reference_row(items, grad_scale, max_norm, device):
    tensors = [random(n, dtype, device, misaligned) for n, dtype, misaligned, _ in items]
    segments = [segment for *_, segment in items]
    sample = Sample(5, device)
    # Normal numbers of these limits: about half of the tensors are beyond one or the other.
    limits = {"vanishing_rms": 0.99 / (grad_scale or 1.0), "exploding_rms": 1.01 / (grad_scale or 1.0)}
    scale = None if grad_scale is None else torch.tensor(grad_scale, device=device)
    for _ in range(2):
        sample.record(tensors, segments, max_norm=max_norm, grad_scale=scale, **limits)
    sample.assert_same()
