"""The formulas against exact truth, and five different answers for what a window may hold."""

import json
import math
import random
import statistics
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seedtriton.core.errors import ConfigurationError
from seedtriton.core.evidence import (
    EXPLODING_WEIGHT,
    GAIN_SAMPLES,
    HOST_FLOOR,
    HOST_UNDEFINED,
    MEASURED,
    NEVER_MEASURED,
    NO_GRADIENT,
    NOT_FINITE,
    RATIO_EPS,
    RECENT_SAMPLES,
    STATUSES,
    VANISHING_WEIGHT,
    Sample,
    SeedEvidence,
    collect_evidence,
    gradient_health,
    gradient_ratio,
    rms_ratio,
)
from seedtriton.core.series import (
    MIN_GAIN_SAMPLES,
    effective_sample_size,
    plateau_share,
    root_mean,
    student,
    t_statistic,
)

NAN, INF = math.nan, math.inf


def sample(**changes):
    """Host norm 4, seed norm 3, all five tensors of the seed alive."""
    values = {
        "host_sumsq": 16.0,
        "seed_sumsq": 9.0,
        "host_tensors": 3,
        "seed_tensors": 5,
        "host_elements": 400,
        "seed_elements": 100,
        "live_tensors": 5,
        "gain": 0.5,
        "skipped": False,
        "seed_vanishing": 0,
        "seed_exploding": 0,
    }
    return Sample(**{**values, **changes})


NOTHING = sample(
    host_sumsq=0.0,
    seed_sumsq=0.0,
    host_tensors=0,
    seed_tensors=0,
    host_elements=0,
    seed_elements=0,
    live_tensors=0,
    gain=NAN,
)


def collect(samples, **options):
    return collect_evidence("s", samples, **{"parameters": 5, **options})


def noise(n, seed, phi=0.0):
    """A stationary series with autocorrelation ``phi ** lag``."""
    draw = random.Random(seed)
    value = draw.gauss(0, 1) / math.sqrt(1 - phi * phi)
    series = []
    for _ in range(n):
        series.append(value)
        value = phi * value + draw.gauss(0, 1)
    return series


# --- health ---------------------------------------------------------------------------------------


def test_health_is_the_formula_of_the_original_clamped():
    assert (VANISHING_WEIGHT, EXPLODING_WEIGHT) == (0.5, 0.8)
    assert gradient_health(0.0, 0.0) == 1.0
    assert gradient_health(1.0, 0.0) == 0.5
    assert gradient_health(0.0, 1.0) == pytest.approx(0.2)
    assert gradient_health(0.25, 0.5) == pytest.approx(1 - 0.125 - 0.4)
    assert gradient_health(1.0, 1.0) == 0.0


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_health_falls_with_either_share_and_stays_in_its_range(vanishing, exploding, more):
    health = gradient_health(vanishing, exploding)
    assert 0.0 <= health <= 1.0
    assert gradient_health(max(vanishing, more), exploding) <= health
    assert gradient_health(vanishing, max(exploding, more)) <= health


@pytest.mark.parametrize("share", [-0.1, 1.1, NAN, INF])
def test_health_of_an_impossible_share_is_refused(share):
    with pytest.raises(ConfigurationError, match=r"share of vanishing gradients must lie in \[0, 1\]"):
        gradient_health(share, 0.0)
    with pytest.raises(ConfigurationError, match=r"share of exploding gradients must lie in \[0, 1\]"):
        gradient_health(0.0, share)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=20))
def test_shares_are_of_the_gradient_tensors_in_the_samples_that_count(rows):
    window, used = [], []
    for tensors, live, exploding, skipped in rows:
        live, exploding = min(live, tensors), min(exploding, live, tensors)
        vanishing = live - exploding
        counted = {"seed_vanishing": vanishing, "seed_exploding": exploding}
        window.append(sample(seed_tensors=tensors, live_tensors=live, skipped=skipped, **counted))
        if not skipped:
            used.append((tensors, live, vanishing, exploding))
    found = collect(window)
    tensors, live, vanishing, exploding = (sum(column) for column in zip(*used)) if used else (0, 0, 0, 0)
    if not tensors:
        assert (found.vanishing_share, found.exploding_share, found.health) == (None, None, None)
        return
    assert found.vanishing_share == vanishing / tensors
    assert found.exploding_share == exploding / tensors
    # What is all zero is no healthier than what vanishes.
    weak = Fraction(vanishing + tensors - live, tensors)
    right = max(0, 1 - Fraction(1, 2) * weak - Fraction(4, 5) * Fraction(exploding, tensors))
    assert found.health == pytest.approx(float(right), abs=1e-12)


def test_no_measurement_has_no_health_and_a_dead_seed_half_of_it():
    for window in ([], [NOTHING], [sample(skipped=True)], [sample(seed_sumsq=NAN)], [sample(seed_tensors=0)]):
        found = collect(window)
        assert (found.vanishing_share, found.exploding_share, found.health) == (None, None, None)
    dead = collect([sample(seed_sumsq=0.0, live_tensors=0)])
    assert (dead.vanishing_share, dead.exploding_share, dead.health) == (0.0, 0.0, 0.5)
    assert collect([sample()]).health == 1.0


@pytest.mark.parametrize("name, share", [("seed_vanishing", "vanishing_share"), ("seed_exploding", "exploding_share")])
def test_what_was_not_counted_in_one_sample_has_no_share(name, share):
    found = collect([sample(), sample(**{name: None})])
    assert getattr(found, share) is None
    assert found.health is None


# --- formulas ---------------------------------------------------------------------------------------


def test_the_ratio_is_the_formula_of_the_design():
    assert RATIO_EPS == 1e-8
    assert gradient_ratio(3.0, 4.0) == 3.0 / (4.0 + 1e-8)
    assert gradient_ratio(3.0, 4.0, eps=0.5) == 3.0 / 4.5
    assert gradient_ratio(2e-8, 1e-8) == 1.0
    assert gradient_ratio(1.0, 0.0) == 1e8
    assert gradient_ratio(0.0, 0.0) == 0.0


@pytest.mark.parametrize("bad", [-1e-300, NAN, INF, -INF])
def test_a_norm_that_cannot_be_is_refused_by_name(bad):
    with pytest.raises(ConfigurationError, match="seed_norm"):
        gradient_ratio(bad, 1.0)
    with pytest.raises(ConfigurationError, match="host_norm"):
        gradient_ratio(1.0, bad)


def test_the_rms_ratio_divides_each_norm_by_the_root_of_its_elements():
    assert rms_ratio(0.75, 400, 100) == 1.5
    assert rms_ratio(0.5, 100, 400) == 0.25
    seed_norm, host_norm, seed_elements, host_elements = 3.0, 4.0, 7, 300
    exact = (seed_norm / math.sqrt(seed_elements)) / (host_norm / math.sqrt(host_elements))
    assert rms_ratio(gradient_ratio(seed_norm, host_norm, 0.0), host_elements, seed_elements) == pytest.approx(exact)


def test_the_rms_ratio_of_equal_intensities_is_one_whatever_the_size():
    """Upstream added eps to an intensity: 0.50 for 10 000 parameters, 0.909 for 100."""
    for elements in (100, 10_000, 10_000_000):
        norm = 1e-4 * math.sqrt(elements)
        assert rms_ratio(gradient_ratio(norm, norm), elements, elements) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("elements", [(0, 1), (1, 0), (-1, 1), (1, -1)])
def test_the_rms_ratio_needs_elements_on_both_sides(elements):
    with pytest.raises(ConfigurationError, match="elements"):
        rms_ratio(1.0, *elements)


# --- root_mean --------------------------------------------------------------------------------------


def exactly(values):
    """``sqrt(mean)`` by integers alone, to 60 digits, and rounded once."""
    mean = sum(map(Fraction, values)) / len(values)
    scale = 10**2 ** 10
    return float(Fraction(math.isqrt(mean.numerator * scale * scale // mean.denominator), scale))


def test_root_mean_of_small_examples():
    assert root_mean([9.0]) == 3.0
    assert root_mean([1.0, 49.0]) == 5.0
    assert root_mean([]) == root_mean([0.0, 0.0]) == 0.0
    assert root_mean([0.0, 8.0]) == pytest.approx(2.0, rel=1e-15)


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 1e308), min_size=1, max_size=30))
def test_root_mean_is_right_to_the_last_bits_over_the_whole_range(values):
    assert root_mean(values) == pytest.approx(exactly(values), rel=1e-14, abs=0.0)


@pytest.mark.parametrize("size", [1e308, 1.7976931348623157e308, 1e-300, 5e-324])
def test_root_mean_at_the_ends_of_fp64(size):
    assert root_mean([size] * 7) == pytest.approx(exactly([size]), rel=1e-14, abs=0.0)
    assert root_mean([size, size, 0.0]) == pytest.approx(exactly([size, size, 0.0]), rel=1e-14, abs=0.0)


def test_a_negative_sum_of_squares_is_refused():
    with pytest.raises(ConfigurationError, match=r"-2\.0"):
        root_mean([1.0, -2.0, -1.0])
    with pytest.raises(ConfigurationError, match="negative"):
        root_mean([-5e-324])
    with pytest.raises(ConfigurationError, match="negative"):
        collect([sample(seed_sumsq=-1.0)])


# --- effective sample size --------------------------------------------------------------------------


def test_effective_sample_size_by_hand():
    # Autocorrelations of 1, 2, 3, 4: 1, 1/4, -3/10, -9/20; only the first pair is positive.
    assert effective_sample_size([1, 2, 3, 4]) == pytest.approx(4 / (2 * 1.25 - 1), rel=1e-14)
    # A pair that is barely positive (0.16) counts.
    series = [2, 2, 3, 1, 0, 2, 0, 0, 1]
    centred = [Fraction(value) - Fraction(sum(series), 9) for value in series]
    rho = [sum(a * b for a, b in zip(centred, centred[lag:])) / sum(a * a for a in centred) for lag in range(6)]
    assert 0 < rho[2] + rho[3] < 0.2
    assert rho[4] + rho[5] < 0
    assert effective_sample_size(series) == pytest.approx(float(9 / (2 * sum(rho[:4]) - 1)), rel=1e-13)
    # Two positive pairs, then one that is not: 1, 2, 3, ..., 10.
    ramp = [value - 5.5 for value in range(1, 11)]
    rho = [sum(a * b for a, b in zip(ramp, ramp[lag:])) / sum(a * a for a in ramp) for lag in range(10)]
    assert rho[2] + rho[3] > 0 > rho[4] + rho[5]
    expected = 10 / (2 * sum(rho[:4]) - 1)
    assert effective_sample_size(list(range(1, 11))) == pytest.approx(expected, rel=1e-13)


def test_white_noise_is_worth_nearly_all_of_its_samples():
    shares = [effective_sample_size(noise(400, seed)) / 400 for seed in range(20)]
    assert all(share > 0.5 for share in shares)
    assert statistics.fmean(shares) > 0.8


def test_a_correlated_series_is_worth_what_theory_says():
    for phi in (0.5, 0.9):
        truth = 1000 * (1 - phi) / (1 + phi)
        found = [effective_sample_size(noise(1000, seed, phi)) / truth for seed in range(10)]
        assert all(1 / 2.5 < value < 2.5 for value in found)
        assert 1 / 1.3 < statistics.fmean(found) < 1.3


def test_what_the_seed_alone_has_spoilt_is_counted_apart_from_what_was_dropped():
    bad = {"seed_sumsq": NAN}
    alone = [sample(**bad), sample(seed_sumsq=INF)]
    others = [sample(**bad, skipped=True), sample(**bad, host_sumsq=INF), sample(host_sumsq=NAN)]
    found = collect([sample(), *alone, *others])
    assert (found.samples, found.dropped, found.seed_not_finite) == (1, 5, 2)


def test_alternating_and_constant_series_count_every_sample():
    assert effective_sample_size([1.0, -1.0] * 20) == 40
    assert effective_sample_size([3.0] * 12) == 12


@settings(deadline=None, max_examples=300)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_a_series_is_worth_between_one_sample_and_all_of_them(values):
    assert 1.0 <= effective_sample_size(values) <= len(values)


def test_a_ramp_is_never_worth_less_than_one_sample():
    for n in (2, 3, 5, 50):
        assert 1.0 <= effective_sample_size(list(range(n))) <= n


# --- t statistic ------------------------------------------------------------------------------------


def test_t_is_the_mean_over_its_corrected_standard_error():
    series = [value + 0.7 for value in noise(60, 1, 0.6)]
    effective = effective_sample_size(series)
    assert 1 < effective < 45
    error = statistics.stdev(series) / math.sqrt(effective)
    assert t_statistic(series) == (pytest.approx(statistics.fmean(series) / error), pytest.approx(effective))


@pytest.mark.parametrize("scale", [2.0**-600, 1e-200, 0.1, 8.0, 1e200, 2.0**900])
def test_t_has_no_unit(scale):
    series = [value + 0.3 for value in noise(50, 2, 0.5)]
    t, effective = t_statistic(series)
    assert t_statistic([value * scale for value in series]) == (pytest.approx(t), pytest.approx(effective))


def test_t_has_the_sign_of_the_mean():
    series = [value + 2.0 for value in noise(50, 3)]
    t, _ = t_statistic(series)
    assert t > 4
    assert t_statistic([-value for value in series])[0] == -t


def test_correlation_lowers_t():
    few = noise(20, 5)
    t, _ = t_statistic([value + 0.5 for value in few])
    repeated, _ = t_statistic([value + 0.5 for value in few for _ in range(5)])
    assert repeated == pytest.approx(t, rel=0.35)  # and not sqrt(5) times as large


def test_too_few_values_have_no_t():
    assert MIN_GAIN_SAMPLES == 8
    series = noise(8, 4)
    assert t_statistic(series[:7]) == (None, 7.0)
    assert t_statistic(series)[0] is not None
    assert t_statistic([0.0] * 7) == (None, 7.0)


@pytest.mark.parametrize("value", [1.0, -0.1, 1e-300, 3.3e200])
def test_a_constant_has_no_standard_error_and_no_t(value):
    assert t_statistic([value] * 20) == (None, 20.0)


# scipy.stats: t.isf(norm.sf(z), degrees)
@pytest.mark.parametrize("z, degrees, quantile", [
    (3.0, 3, 9.2189), (3.0, 4, 6.6202), (3.0, 5, 5.5071), (3.0, 10, 3.9569), (3.0, 30, 3.2703), (3.0, 100, 3.0768),
    (1.0, 1, 1.8373), (1.0, 3, 1.1969), (1.0, 10, 1.0526), (1.0, 100, 1.0050), (-3.0, 10, -3.9569),
])  # fmt: skip
def test_students_quantile_is_that_of_a_table(z, degrees, quantile):
    assert student(z, degrees) == pytest.approx(quantile, rel=0.025 if degrees < 4 else 0.01)
    if degrees >= 10:
        assert student(z, degrees) == pytest.approx(quantile, rel=2e-4)


def test_one_number_alone_has_no_quantile():
    assert student(3.0, 1) > 96  # too small by a half, and far from 3 all the same
    with pytest.raises(ConfigurationError, match="at least 1 degree of freedom, got 0"):
        student(3.0, 0)


def test_the_recent_t_is_that_of_the_last_samples_alone():
    """A seed that went wrong is seen before its good gains have left the longer window."""
    gains = [1.0 + 0.1 * (i % 2) for i in range(80)] + [-1.0 - 0.1 * (i % 3) for i in range(RECENT_SAMPLES)]
    found = collect_evidence("s", [sample(gain=gain) for gain in gains], parameters=2)
    assert found.recent_gain_t == t_statistic(gains[-RECENT_SAMPLES:])[0] < -50
    assert found.blend_gain_t == t_statistic(gains[-GAIN_SAMPLES:])[0] > -2
    assert collect_evidence("s", [sample(gain=1.0)] * 3, parameters=2).recent_gain_t is None


def test_gains_of_zero_are_a_t_of_zero():
    assert t_statistic([0.0] * 20) == (0.0, 20.0)


# --- collect_evidence: five answers -----------------------------------------------------------------


def test_a_window_of_equal_samples_gives_the_plain_formula():
    found = collect([sample(gain=g) for g in (1.0, 2.0, 3.0)])
    assert (found.status, found.seed_norm, found.host_norm) == (MEASURED, 3.0, 4.0)
    assert found.ratio == 3.0 / (4.0 + 1e-8)
    assert found.rms_ratio == found.ratio * 2.0
    assert (found.samples, found.dropped, found.empty) == (3, 0, 0)
    assert found.blend_gain == pytest.approx(2.0)
    assert (found.blend_gain_t, found.effective_samples) == (None, 3.0)
    assert found.reason.startswith("ratio 0.75 = seed 3 / host 4, 3 samples")


def test_norms_are_averaged_before_they_are_divided():
    found = collect([sample(seed_sumsq=1.0, host_sumsq=4.0), sample(seed_sumsq=49.0, host_sumsq=196.0)], eps=0.0)
    assert (found.seed_norm, found.host_norm, found.ratio) == (5.0, 10.0, 0.5)


def test_eps_reaches_the_ratio():
    assert collect([sample()], eps=2.0).ratio == 3.0 / 6.0


def test_no_sample_is_never_measured():
    found = collect([])
    assert (found.status, found.samples, found.dropped, found.empty) == (NEVER_MEASURED, 0, 0, 0)
    assert "measure()" in found.reason
    assert SeedEvidence(seed="s").status == NEVER_MEASURED


def test_a_seed_outside_the_forward_pass_has_no_gradient():
    found = collect([sample(seed_sumsq=0.0, seed_tensors=0, seed_elements=0, live_tensors=0)] * 4)
    assert (found.status, found.samples, found.seed_norm, found.ratio) == (NO_GRADIENT, 4, 0.0, None)
    assert "forward pass" in found.reason
    assert "4" in found.reason


def test_measuring_after_zero_grad_is_no_gradient_and_says_so():
    found = collect([NOTHING] * 3)
    assert (found.status, found.samples, found.empty, found.dropped) == (NO_GRADIENT, 0, 3, 0)
    assert "zero_grad" in found.reason


def test_a_window_of_bad_samples_is_not_finite():
    found = collect([sample(seed_sumsq=NAN), sample(host_sumsq=INF)])
    assert (found.status, found.samples, found.dropped, found.ratio) == (NOT_FINITE, 0, 2, None)
    assert "not finite" in found.reason
    assert "2" in found.reason


def test_bad_samples_beside_empty_ones_are_still_not_finite():
    found = collect([NOTHING, sample(seed_sumsq=NAN), NOTHING])
    assert (found.status, found.dropped, found.empty) == (NOT_FINITE, 1, 2)


def test_a_frozen_host_leaves_the_ratio_undefined():
    found = collect([sample(host_sumsq=0.0, host_tensors=0, host_elements=0)])
    assert (found.status, found.host_norm, found.seed_norm) == (HOST_UNDEFINED, 0.0, 3.0)
    assert found.ratio is found.rms_ratio is None
    assert "frozen host" in found.reason


def test_the_floor_of_the_host_norm_is_exact():
    assert HOST_FLOOR == 1e-6
    assert collect([sample(host_sumsq=0.25)], host_floor=0.5).status == MEASURED
    assert collect([sample(host_sumsq=0.25)], host_floor=math.nextafter(0.5, 1)).status == HOST_UNDEFINED
    assert collect([sample(host_sumsq=(1.01e-6) ** 2)]).status == MEASURED
    assert collect([sample(host_sumsq=(0.99e-6) ** 2)]).status == HOST_UNDEFINED


def test_a_gradient_of_zero_is_measured_and_is_a_ratio_of_zero():
    found = collect([sample(seed_sumsq=0.0, live_tensors=0)])
    assert (found.status, found.ratio, found.rms_ratio, found.live_share) == (MEASURED, 0.0, 0.0, 0.0)


def test_one_sample_with_a_gradient_is_enough_to_be_measured():
    found = collect([sample(seed_tensors=0, seed_sumsq=0.0), sample()])
    assert found.status == MEASURED
    assert found.seed_norm == pytest.approx(math.sqrt(4.5))


def test_the_five_answers_are_different_in_status_and_in_words():
    windows = [
        [],
        [sample(seed_tensors=0, seed_sumsq=0.0)],
        [sample(seed_sumsq=NAN)],
        [sample(host_sumsq=0.0)],
        [sample()],
    ]
    found = [collect(window) for window in windows]
    assert {one.status for one in found} == set(STATUSES)
    assert len({one.reason for one in found}) == 5
    assert all(one.reason for one in found)


# --- collect_evidence: what is averaged -------------------------------------------------------------


@pytest.mark.parametrize("side", ["host_sumsq", "seed_sumsq"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_sample_that_is_not_finite_is_dropped_and_counted(side, bad):
    found = collect([sample(), sample(**{side: bad}), sample()])
    assert (found.samples, found.dropped, found.empty) == (2, 1, 0)
    assert found.ratio == collect([sample()]).ratio
    assert "1 dropped" in found.reason
    assert found.dropped_share == 1 / 3


def test_a_skipped_step_is_dropped_and_counted():
    found = collect([sample(seed_sumsq=1e6, gain=99.0, live_tensors=0, skipped=True), sample()])
    assert (found.samples, found.dropped, found.seed_norm, found.blend_gain) == (1, 1, 3.0, 0.5)
    assert found.live_share == 1.0
    assert collect([sample(skipped=True)]).status == NOT_FINITE


def test_an_empty_measurement_is_counted_and_not_averaged():
    found = collect([NOTHING, sample(), NOTHING])
    assert (found.status, found.samples, found.empty, found.dropped) == (MEASURED, 1, 2, 0)
    assert (found.seed_norm, found.live_share, found.dropped_share) == (3.0, 1.0, 0.0)


def test_a_host_or_a_seed_alone_is_not_an_empty_measurement():
    assert not sample(host_tensors=0).empty
    assert not sample(seed_tensors=0).empty
    assert NOTHING.empty


def test_one_bad_sample_poisons_nothing():
    """Upstream's averages stayed NaN for ever."""
    good = [sample(seed_sumsq=1.0 + n / 7, gain=math.sin(n)) for n in range(200)]
    clean = collect(good)
    for bad in (sample(seed_sumsq=NAN, gain=NAN), sample(host_sumsq=INF, gain=INF), sample(seed_sumsq=-INF)):
        for window in ([bad, *good], [*good[:90], bad, *good[90:]]):
            found = collect(window)
            for name in ("ratio", "rms_ratio", "seed_norm", "host_norm", "blend_gain", "blend_gain_t", "live_share"):
                assert getattr(found, name) == getattr(clean, name)
            assert (found.samples, found.dropped) == (200, 1)


def test_a_ratio_of_1e30_is_a_number():
    found = collect([sample(seed_sumsq=1e60, host_sumsq=1.0)])
    assert found.ratio == pytest.approx(1e30)
    assert found.rms_ratio == pytest.approx(2e30)


def test_the_rms_ratio_uses_the_elements_that_had_a_gradient():
    found = collect([sample(seed_elements=100), sample(seed_elements=300)], eps=0.0)
    assert found.rms_ratio == pytest.approx(0.75 * math.sqrt(800 / 400))
    dropped = sample(seed_elements=10**9, host_elements=7, skipped=True)
    assert collect([sample(), dropped]).rms_ratio == collect([sample()]).rms_ratio


def test_zero_elements_leave_the_rms_ratio_unknown_and_the_ratio_known():
    found = collect([sample(seed_elements=0)])
    assert found.ratio is not None
    assert found.rms_ratio is None


def test_live_share_counts_tensors_over_the_window():
    assert collect([sample(live_tensors=5), sample(live_tensors=2)]).live_share == 0.7
    assert collect([sample(live_tensors=0)]).live_share == 0.0
    assert collect([sample(live_tensors=9)]).live_share == 1.0


def clipped(sumsqs, max_norm=1.0):
    """What is left of these when each is clipped by itself, as torch does it."""
    return [value * min(1.0, max_norm / (math.sqrt(value) + 1e-6)) ** 2 for value in sumsqs]


WILD = [math.exp(value) for value in noise(128, 3)]


def test_norms_that_were_clipped_lie_on_a_plateau_and_others_do_not():
    assert plateau_share(clipped(WILD, max_norm=0.2)) > 0.9
    assert plateau_share(WILD) == 1 / 128
    assert plateau_share(clipped(WILD, max_norm=1e3)) == 1 / 128


def test_the_plateau_counts_the_samples_that_were_clipped():
    limit = sorted(WILD)[96] ** 0.5 * (1 - 1e-9)  # 32 of 128 are larger
    assert plateau_share(clipped(WILD, max_norm=limit)) == 32 / 128


def test_the_plateau_is_at_the_top_and_as_wide_as_its_tolerance():
    lower = [2.0] * 20 + [3.0 + i for i in range(20)]
    assert plateau_share(lower) == 1 / 40
    just, beyond = (1 - 0.99e-4) ** 2, (1 - 1.01e-4) ** 2
    assert plateau_share([1.0] + [just] * 7) == 1.0
    assert plateau_share([1.0] + [beyond] * 7) == 1 / 8


def test_one_gradient_again_and_again_is_no_plateau():
    assert plateau_share([0.7] * 50) == 0.0
    assert plateau_share([0.0] * 50) == 0.0
    assert plateau_share([0.7] * 49 + [math.nextafter(0.7, 0)]) == 1.0


def test_seven_samples_are_too_few_for_a_plateau():
    assert plateau_share(clipped(WILD[:7], max_norm=0.1)) is None
    assert plateau_share(clipped(WILD[:8], max_norm=0.1)) == 1.0
    assert plateau_share([]) is None


@pytest.mark.parametrize("side", ["host_sumsq", "seed_sumsq"])
def test_a_plateau_of_either_side_is_evidence(side):
    other = {"host_sumsq": "seed_sumsq", "seed_sumsq": "host_sumsq"}[side]
    window = [sample(**{side: c, other: w}) for c, w in zip(clipped(WILD, max_norm=0.2), WILD)]
    assert collect(window).plateau_share > 0.9
    assert collect([sample(host_sumsq=w, seed_sumsq=w) for w in WILD]).plateau_share == 1 / 128
    assert collect([]).plateau_share is None


def test_clipping_by_the_common_norm_is_no_evidence_however_small_the_seed():
    for share in (0.3, 1e-3, 1e-5):
        pairs = [(w, share * w * v) for w, v in zip(WILD, reversed(WILD))]
        scales = [c / (h + s) for c, (h, s) in zip(clipped([h + s for h, s in pairs], 0.2), pairs)]
        window = [sample(host_sumsq=h * x, seed_sumsq=s * x) for (h, s), x in zip(pairs, scales)]
        assert collect(window).plateau_share < 0.1


def test_both_sides_clipped_to_their_own_norms_are_evidence_although_the_common_norm_stands_still():
    window = [sample(host_sumsq=c, seed_sumsq=d) for c, d in zip(clipped(WILD, 0.2), clipped(WILD[::-1], 0.1))]
    assert collect(window).plateau_share > 0.9


def test_dropped_and_empty_samples_have_no_part_in_the_plateau():
    window = [sample(host_sumsq=w, seed_sumsq=w) for w in WILD[:8]]
    unusable = [*[NOTHING] * 9, *[sample(skipped=True)] * 9, sample(host_sumsq=INF)]
    assert collect([*window, *unusable]).plateau_share == 1 / 8


def test_a_seed_with_zero_parameters_has_no_live_share():
    assert collect([sample()], parameters=0).live_share is None
    assert collect([], parameters=0).live_share is None
    assert collect([]).live_share is None


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_gain_that_was_not_measured_is_left_out(bad):
    gains = [1.0 + math.sin(n) for n in range(20)]
    clean = collect([sample(gain=g) for g in gains])
    mixed = collect([sample(gain=g) for g in [bad, *gains[:9], bad, *gains[9:]]])
    assert (mixed.blend_gain, mixed.blend_gain_t) == (clean.blend_gain, clean.blend_gain_t)
    assert mixed.samples == 22
    none = collect([sample(gain=bad)] * 20)
    assert none.blend_gain is none.blend_gain_t is none.effective_samples is None


def test_the_gain_is_judged_by_its_last_100_samples():
    assert GAIN_SAMPLES == 100
    gains = [1.0 + math.sin(n) for n in range(100)]
    recent = collect([sample(gain=g) for g in gains])
    found = collect([sample(gain=g) for g in [-1e6, *gains]])
    assert (found.blend_gain, found.blend_gain_t) == (recent.blend_gain, recent.blend_gain_t)
    assert found.samples == 101
    assert (recent.blend_gain_t, recent.effective_samples) == t_statistic(gains)
    assert collect([sample(gain=g) for g in [-1e6, *gains[1:]]]).blend_gain < 0


def test_the_mean_of_enormous_gains_is_a_number():
    assert collect([sample(gain=1e308)] * 10).blend_gain == pytest.approx(1e308)


def test_what_is_known_elsewhere_is_passed_on():
    found = collect([], age=3, displacement=0.25, in_optimizer=False, optimizer_steps=7)
    assert (found.seed, found.age, found.displacement) == ("s", 3, 0.25)
    assert (found.in_optimizer, found.optimizer_steps) == (False, 7)
    bare = collect([])
    assert bare.age is bare.displacement is bare.in_optimizer is bare.optimizer_steps is None


anything = st.one_of(st.floats(0.0), st.sampled_from([NAN, INF, 0.0, 1.0]))
counts = st.integers(0, 3)


def consistent(sample):
    """No more vanishing or exploding tensors than there are."""
    most = min(sample.seed_tensors, sample.live_tensors)
    kinds = (sample.seed_vanishing, sample.seed_exploding)
    vanishing, exploding = (None if kind is None else min(kind, most) for kind in kinds)
    return sample._replace(seed_vanishing=vanishing, seed_exploding=exploding)


samples = st.builds(
    Sample,
    host_sumsq=anything,
    seed_sumsq=anything,
    host_tensors=counts,
    seed_tensors=counts,
    host_elements=counts,
    seed_elements=counts,
    live_tensors=counts,
    gain=st.one_of(st.floats(-1e300, 1e300), st.sampled_from([NAN, INF])),
    skipped=st.booleans(),
    seed_vanishing=st.none() | counts,
    seed_exploding=st.none() | counts,
).map(consistent)


@settings(deadline=None, max_examples=300)
@given(window=st.lists(samples, max_size=14), parameters=counts)
def test_whatever_was_measured_the_evidence_is_finite_counted_and_in_words(window, parameters):
    found = collect(window, parameters=parameters)
    assert found.samples + found.dropped + found.empty == len(window)
    assert (found.ratio is None) == (found.status != MEASURED)
    assert (found.samples > 0) or found.status in (NEVER_MEASURED, NO_GRADIENT, NOT_FINITE)
    assert (found.status == NEVER_MEASURED) == (not window)
    assert found.reason
    assert found.live_share is None or 0.0 <= found.live_share <= 1.0
    assert (found.plateau_share is None) == (found.samples < 8)
    assert found.plateau_share is None or 0.0 <= found.plateau_share <= 1.0
    json.dumps(found.state_dict(), allow_nan=False)


# --- SeedEvidence -----------------------------------------------------------------------------------


def test_evidence_with_an_unknown_status_or_a_negative_count_is_refused():
    with pytest.raises(ConfigurationError, match="'fine'"):
        SeedEvidence(seed="s", status="fine")
    for name in ("samples", "dropped", "empty"):
        with pytest.raises(ConfigurationError, match=f"{name}.*-1"):
            SeedEvidence(seed="s", **{name: -1})


def test_dropped_share():
    assert SeedEvidence(seed="s").dropped_share == 0.0
    assert SeedEvidence(seed="s", samples=9, dropped=1).dropped_share == 0.1
    assert SeedEvidence(seed="s", dropped=4).dropped_share == 1.0
    assert SeedEvidence(seed="s", samples=1, dropped=1, empty=8).dropped_share == 0.5
