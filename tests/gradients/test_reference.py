"""``record_``, number by number, and the views that sums of squares are taken over."""

import math

import pytest
import torch

from seedtriton.gradients import ops, reference, tensor_sums
from seedtriton.gradients.row import (
    CLIP_COEFFICIENT,
    ELEMENTS,
    EXPLODING,
    EXPLODING_RMS,
    EXTRA,
    LIVE,
    MEASURED,
    NO_GAINS,
    QUANTITIES,
    SUMMARY_HEAD,
    SUMSQ,
    TENSORS,
    TOTAL_NORM,
    VANISHING,
    VANISHING_RMS,
    Listed,
    LossScale,
    Rules,
    TensorTable,
    Window,
)

WINDOW, SEGMENTS = 3, 3
EPS = 1e-8


class Record:
    """A ring of three rows for a host and two seeds, and one way to write it."""

    def __init__(self):
        self.ring = torch.full((WINDOW, SEGMENTS, QUANTITIES), -7.0, dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.int64)
        self.summary = torch.full((SUMMARY_HEAD + 3 * SEGMENTS,), -7.0, dtype=torch.float64)
        self.table = TensorTable(
            torch.zeros(400, dtype=torch.float64),
            *torch.zeros(2, 400, dtype=torch.int32).unbind(),
            torch.zeros(2, dtype=torch.int64),
        )
        self.window = Window(self.ring, self.count, self.summary, self.table)

    def write(self, gradients, segments, gains=(), gain_segments=(), max_norm=math.inf, **options):
        tensors = [g if isinstance(g, torch.Tensor) else torch.tensor(g) for g in gradients]
        scale = LossScale(*(options.pop(name, None) for name in ("grad_scale", "gain_scale", "found_inf")))
        rules = Rules(max_norm, EPS, **options)
        reference.record_(Listed(tensors, segments), Listed(gains, gain_segments), self.window, rules, scale)
        return self


HOST = [3.0, 4.0]


def test_every_column_of_the_row():
    gain = torch.tensor(0.5)
    gradients = [HOST, [[0.0, 0.0]], [2.0], torch.empty(0), [0.0]]
    record = Record().write(gradients, [0, 1, 1, 0, 2], [gain], [1])
    row = record.ring[0]
    assert row[:, SUMSQ].tolist() == pytest.approx([25.0, 4.0, 0.0], rel=1e-7)
    assert row[:, LIVE].tolist() == [1.0, 1.0, 0.0]
    assert row[:, VANISHING].tolist() == row[:, EXPLODING].tolist() == [0.0, 0.0, 0.0]
    assert row[:, TENSORS].tolist() == [2.0, 2.0, 1.0]
    assert row[:, ELEMENTS].tolist() == [2.0, 3.0, 1.0]
    assert row[0, EXTRA] == 0.0
    assert row[1, EXTRA] == -0.5
    assert row[2, EXTRA].isnan()
    assert (record.ring[1:] == -7.0).all()
    assert record.count == 1


def test_tensors_are_judged_by_their_root_mean_square_in_fp64():
    torch.manual_seed(0)
    tensors, segments, right = [], [], torch.zeros(SEGMENTS, 3, dtype=torch.float64)
    for n in range(300):
        size = (1, 7, 256, 5000)[n % 4]
        tensor = torch.randn(size) * 10.0 ** (n % 13 - 10)
        tensors.append(tensor if n % 11 else torch.zeros(size))
        segments.append(n * n % SEGMENTS)
        rms = tensors[-1].double().square().mean().sqrt()
        right[segments[-1]] += torch.stack([rms != 0, (rms != 0) & (rms < VANISHING_RMS), rms > EXPLODING_RMS])
    row = Record().write(tensors, segments).ring[0]
    assert torch.equal(row[:, LIVE:TENSORS], right)
    assert (right[:2] > 0).all()
    scale = torch.tensor(1024.0)
    assert torch.equal(
        Record().write([1024 * t for t in tensors], segments, grad_scale=scale).ring[0, :, LIVE:TENSORS], right
    )


@pytest.mark.parametrize("size", [1, 4, 65536])
def test_exactly_at_a_limit_is_neither_vanishing_nor_exploding(size):
    low, high = 2.0**-10, 2.0**6
    for value, kinds in ((low, [0, 0]), (low * 0.99, [1, 0]), (high, [0, 0]), (high * 1.01, [0, 1])):
        record = Record().write([torch.full((size,), value)], [0], vanishing_rms=low, exploding_rms=high)
        assert record.ring[0, 0, [VANISHING, EXPLODING]].tolist() == kinds


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_exploding_whatever_the_limit(bad):
    for limit in (1.0, math.inf):
        record = Record().write([[1.0, bad], torch.empty(0), [0.0]], [0, 1, 2], exploding_rms=limit)
        assert record.ring[0, :, LIVE:TENSORS].tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_sums_taken_elsewhere_give_the_same_row():
    tensors, segments = [torch.randn(n) * 10.0 ** (n - 9) for n in (1, 5, 9, 11)], [2, 0, 0, 1]
    scale = torch.tensor([4.0])
    right = Record().write(tensors, segments, grad_scale=scale)
    ours = Record()
    sums = tensor_sums.tensor_sumsq(tensors, torch.float32, torch.device("cpu"))
    listed = [t.numel() for t in tensors], segments
    ops.record_sums_(sums, listed, NO_GAINS, ours.window, Rules(math.inf, EPS), LossScale(scale))
    assert torch.equal(ours.ring.nan_to_num(-1.0), right.ring.nan_to_num(-1.0))
    assert torch.equal(ours.summary, right.summary)
    assert right.ring[0, :, VANISHING:MEASURED].sum(0).tolist() == [1.0, 1.0]


def test_a_step_without_gradients_is_a_row_of_zeros():
    record = Record().write([], [])
    assert (record.ring[0, :, :EXTRA] == 0.0).all()
    assert record.count == 1
    assert record.summary.tolist() == [0.0, 1.0, 1.0, *[0.0] * 3, *[1.0] * 6]


def test_rows_wrap_around_and_the_count_does_not():
    record = Record()
    for number in range(5):
        record.write([[float(number)]], [0])
    assert record.ring[:, 0, SUMSQ].tolist() == pytest.approx([9.0, 16.0, 4.0])
    assert record.count == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_tensors_are_live(bad):
    row = Record().write([[bad], [1.0]], [1, 0]).ring[0]
    assert row[:, LIVE].tolist() == [1.0, 1.0, 0.0]
    assert row[0, SUMSQ] == 1.0
    assert not row[1, SUMSQ].isfinite()


def test_the_summary_holds_the_total_norm_the_coefficient_and_this_samples_ratios():
    summary = Record().write([HOST, [12.0], [0.5, 0.5]], [0, 1, 2], max_norm=2.0).summary
    total = math.sqrt(25 + 144 + 0.5)
    assert summary[TOTAL_NORM].item() == pytest.approx(total, rel=1e-7)
    assert summary[CLIP_COEFFICIENT].item() == pytest.approx(2.0 / (total + 1e-6), rel=1e-7)
    ratios = summary[SUMMARY_HEAD : SUMMARY_HEAD + 3].tolist()
    assert ratios == pytest.approx([1.0, 12 / 5, math.sqrt(0.5) / 5], rel=1e-6)


def test_the_ratios_of_the_summary_add_eps_to_the_hosts_norm():
    summary = Record().write([[EPS], [EPS]], [0, 1], lanes=torch.float64).summary
    assert summary[SUMMARY_HEAD + 1].item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    "gradient, max_norm, expected",
    [
        (HOST, 5.1, 1.0),
        (HOST, 5.0, 5.0 / (5.0 + 1e-6)),
        (HOST, 1.0, 1.0 / (5.0 + 1e-6)),
        (HOST, math.inf, 1.0),
        ([0.0], 1.0, 1.0),
        ([0.0], 1e-9, 1e-3),
        ([math.inf], 1.0, 0.0),
        ([math.nan], 1.0, math.nan),
        ([math.nan], math.inf, math.nan),
    ],
)
def test_the_clip_coefficient_is_torchs(gradient, max_norm, expected):
    summary = Record().write([gradient], [0], max_norm=max_norm).summary
    assert summary[CLIP_COEFFICIENT].item() == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_gains_are_negated_taken_as_they_are_and_zeroed():
    gains = [torch.tensor(0.25), torch.tensor([-3.0], dtype=torch.bfloat16)]
    record = Record().write([HOST], [0], gains, [2, 1])
    assert record.ring[0, :, EXTRA].tolist() == [0.0, 3.0, -0.25]
    assert [gain.item() for gain in gains] == [0.0, 0.0]
    record.write([HOST], [0])
    assert record.ring[1, 1:, EXTRA].isnan().all()


def test_only_gains_are_written():
    gradient = torch.tensor(HOST)
    Record().write([gradient], [0], max_norm=1.0)
    assert gradient.tolist() == HOST
    assert gradient._version == 0


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scales_of_the_loss_are_divided_out(shape):
    gain = torch.tensor(4.0)
    scale, gain_scale = torch.full(shape, 1024.0), torch.full(shape, 2.0)
    gradients = [[3.0 * 1024, 4.0 * 1024], [1024.0]]
    record = Record().write(
        gradients, [0, 1], [gain], [1], max_norm=1.0, grad_scale=scale, gain_scale=gain_scale
    )
    assert record.ring[0, :, SUMSQ].tolist() == pytest.approx([25.0, 1.0, 0.0])
    assert record.ring[0, 1, EXTRA] == -2.0
    assert record.summary[TOTAL_NORM].item() == pytest.approx(math.sqrt(26))
    assert record.summary[CLIP_COEFFICIENT].item() == pytest.approx(1 / math.sqrt(26))
    assert record.summary[SUMMARY_HEAD + 1].item() == pytest.approx(0.2)


def test_each_scale_touches_only_its_own():
    only_gain = Record().write([HOST], [0], [torch.tensor(4.0)], [1], gain_scale=torch.tensor(2.0)).ring[0]
    assert (only_gain[0, SUMSQ].item(), only_gain[1, EXTRA].item()) == (pytest.approx(25.0), -2.0)
    only_grad = Record().write([HOST], [0], [torch.tensor(4.0)], [1], grad_scale=torch.tensor(5.0)).ring[0]
    assert (only_grad[0, SUMSQ].item(), only_grad[1, EXTRA].item()) == (pytest.approx(1.0), -4.0)


@pytest.mark.parametrize("found, expected", [([0.0], 0.0), (1.0, 1.0), ([2.0], 1.0)])
def test_found_inf_marks_the_row(found, expected):
    assert Record().write([HOST], [0], found_inf=torch.tensor(found)).ring[0, 0, EXTRA] == expected


def test_wide_lanes_reach_the_row():
    record = Record().write([torch.full((2,), 1e20)], [0], lanes=torch.float64)
    assert record.ring[0, 0, SUMSQ].item() == pytest.approx(2e40)
    assert Record().write([torch.full((2,), 1e20)], [0]).ring[0, 0, SUMSQ] == math.inf


def test_the_row_agrees_with_segmented_sumsq():
    tensors, segments = [torch.randn(size) for size in (1500, 3, 700, 5000)], [2, 0, 1, 2]
    record = Record().write(tensors, segments)
    assert torch.equal(record.ring[0, :, SUMSQ], reference.segmented_sumsq(tensors, segments, SEGMENTS))


def test_segmented_sumsq_puts_its_result_where_told():
    assert reference.segmented_sumsq([], [], 2, device=torch.device("meta")).device.type == "meta"
    assert reference.segmented_sumsq([], [], 2).device.type == "cpu"


def test_tensors_of_several_devices_keep_their_places(monkeypatch):
    torch.manual_seed(0)
    tensors = [torch.randn(size, dtype=dtype) for size in (5, 30_000, 600) for dtype in (torch.float32, torch.float16)]
    here = tensor_sums.tensor_sumsq(tensors, torch.float32, torch.device("cpu"))
    places = {id(t): torch.device("cpu", 0) if n in (0, 3, 4) else torch.device("cpu") for n, t in enumerate(tensors)}
    assert len(set(places.values())) == 2
    monkeypatch.setattr(tensor_sums, "_device_of", lambda tensor: places[id(tensor)])
    assert torch.equal(tensor_sums.tensor_sumsq(tensors, torch.float32, torch.device("cpu")), here)
    assert here.unique().numel() == len(tensors)


@pytest.mark.parametrize(
    "tensor, viewable",
    [
        (torch.randn(4, 6), True),
        (torch.randn(4, 6).t(), True),
        (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.randn(2, 3, 4).permute(2, 0, 1), True),
        (torch.randn(30)[7:], True),
        (torch.randn(5, 4, 6)[2].t(), True),
        (torch.randn(1, 6).as_strided((6, 1), (1, 99)), True),
        (torch.randn(()), True),
        (torch.empty(0), True),
        (torch.randn(8)[::2], False),
        (torch.randn(4, 6)[:, :5], False),
        (torch.randn(4, 6)[:, 1:5].t(), False),
        (torch.randn(4, 1).expand(4, 6), False),
        (torch.randn(9).as_strided((3, 3), (2, 1)), False),
    ],
)
def test_dense_view_has_every_element_once_or_is_refused(tensor, viewable):
    view = tensor_sums.dense_view(tensor)
    assert (view is not None) == viewable
    if view is not None:
        assert view.is_contiguous()
        assert view.data_ptr() == tensor.data_ptr()
        assert view.sort().values.tolist() == tensor.reshape(-1).sort().values.tolist()


def test_only_expanded_dimensions_certainly_overlap():
    assert reference.overlaps_itself(torch.ones(1).expand(3))
    assert reference.overlaps_itself(torch.ones(3, 1, 2).expand(3, 4, 2))
    assert not reference.overlaps_itself(torch.ones(3).as_strided((1, 3), (0, 1)))
    assert not reference.overlaps_itself(torch.ones(4, 3)[::2].t())
