"""Curves are exact at both ends and never turn back; thresholds change at their boundary exactly."""

import dataclasses
import json
import math
import sys
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seedtriton.core.errors import ConfigurationError, StateDictError
from seedtriton.core.schedules import CURVES, AlphaController, AlphaSchedule, ProgressThreshold, cosine, linear, sigmoid

shares = st.floats(0.0, 1.0)
curves = st.sampled_from(["linear", "cosine", "sigmoid"])


def test_there_are_three_curves():
    assert dict(CURVES) == {"linear": linear, "cosine": cosine, "sigmoid": sigmoid}


LARGEST = sys.float_info.max
# Every steepness is legal: a line, a jump, and what lies next to a change of formula.
steepnesses = st.one_of(st.floats(min_value=5e-324, max_value=LARGEST), st.floats(1e-5, 1e4))


@settings(deadline=None, max_examples=150)
@given(curve=curves, steps=st.integers(0, 500), start=shares, target=shares, steepness=steepnesses)
@example(curve="sigmoid", steps=3, start=1.0, target=0.0, steepness=12.0)
@example(curve="cosine", steps=500, start=0.1, target=0.3, steepness=12.0)
@example(curve="sigmoid", steps=500, start=0.1, target=0.3, steepness=LARGEST)
@example(curve="sigmoid", steps=500, start=0.1, target=0.3, steepness=5e-324)
@example(curve="sigmoid", steps=500, start=0.0, target=1.0, steepness=1e-4)
@example(curve="sigmoid", steps=2, start=0.0, target=1.0, steepness=1420.0)
def test_a_curve_is_exact_at_both_ends_monotone_and_stays_between_them(curve, steps, start, target, steepness):
    steepness = steepness if curve == "sigmoid" else 12.0
    schedule = AlphaSchedule(target=target, start=start, steps=steps, curve=curve, steepness=steepness)
    values = [schedule(step) for step in range(steps + 1)]
    assert values[-1] == schedule(steps + 1) == schedule(10**9) == target
    if steps:
        assert values[0] == start
    for a, b in pairwise(values):
        assert a <= b if start <= target else a >= b
    assert all(min(start, target) <= value <= max(start, target) for value in values)


@pytest.mark.parametrize("start, target", [(0.47, 0.1), (0.1, 0.47)])
@pytest.mark.parametrize("curve", CURVES)
def test_the_last_bit_of_a_very_long_curve_does_not_step_over_the_end(curve, start, target):
    """0.47 + (0.1 - 0.47) is below 0.1, and the cosine of a billion steps rounds to 1 before its last step."""
    steps = 10**9
    schedule = AlphaSchedule(start=start, target=target, steps=steps, curve=curve)
    assert 0.47 + (0.1 - 0.47) < 0.1
    for step in (1, steps - 1):
        assert 0.1 <= schedule(step) <= 0.47


@pytest.mark.parametrize("curve", CURVES)
def test_no_steps_is_a_jump(curve):
    assert AlphaSchedule(start=0.2, target=0.7, steps=0, curve=curve)(0) == 0.7


@pytest.mark.parametrize("curve", CURVES)
def test_curves_are_symmetric_about_their_middle(curve):
    schedule = AlphaSchedule(steps=10, curve=curve)
    assert schedule(5) == pytest.approx(0.5, abs=1e-15)
    for step in range(11):
        assert schedule(step) + schedule(10 - step) == pytest.approx(1.0, abs=1e-12)


def test_values_on_the_curves():
    assert AlphaSchedule(steps=4, curve="linear")(1) == 0.25
    assert AlphaSchedule(steps=4, curve="cosine")(1) == pytest.approx((1 - math.sqrt(0.5)) / 2, rel=1e-12)
    low = 1 / (1 + math.exp(6))
    quarter = (1 / (1 + math.exp(3)) - low) / (1 - 2 * low)
    assert AlphaSchedule(steps=4, curve="sigmoid")(1) == pytest.approx(quarter, rel=1e-12)
    assert AlphaSchedule(start=0.8, target=0.4, steps=4, curve="linear")(1) == pytest.approx(0.7)


def logistic_of_0_1(t):
    low, high = 1 / (1 + math.exp(6.0)), 1 / (1 + math.exp(-6.0))
    return (1 / (1 + math.exp(-(12.0 * (t - 0.5)))) - low) / (high - low)


def test_the_sigmoid_without_a_told_steepness_is_the_one_it_was_bit_for_bit():
    for told in ({}, {"steepness": 12}):
        schedule = AlphaSchedule(steps=997, curve="sigmoid", **told)
        assert [schedule(step) for step in range(1, 997)] == [logistic_of_0_1(step / 997) for step in range(1, 997)]


def test_a_steeper_sigmoid_is_steeper_and_a_flat_one_is_the_line():
    quarter = [AlphaSchedule(steps=4, curve="sigmoid", steepness=k)(1) for k in (1e-300, 1e-3, 4.0, 12.0, 100.0, 1e300)]
    assert quarter == sorted(quarter, reverse=True)
    low = 1 / (1 + math.exp(2))
    assert quarter[2] == pytest.approx((1 / (1 + math.exp(1)) - low) / (1 - 2 * low), rel=1e-12)
    assert quarter[0] == 0.25
    assert quarter[-1] == 0.0
    assert AlphaSchedule(steps=4, curve="sigmoid", steepness=1e300)(2) == 0.5
    # At the place where one formula follows the other.
    below, above = (sigmoid(0.3, k) for k in (math.nextafter(1e-4, 0), 1e-4))
    assert below == pytest.approx(above, abs=1e-9)


@pytest.mark.parametrize("curve", ["linear", "cosine"])
def test_a_steepness_that_a_curve_would_not_follow_is_refused_with_the_way_out(curve):
    with pytest.raises(ConfigurationError, match=rf"curve '{curve}' has no steepness, got 20.*curve='sigmoid'"):
        AlphaSchedule(curve=curve, steepness=20)
    assert AlphaSchedule(curve=curve, steepness=12.0) == AlphaSchedule(curve=curve)


def test_a_negative_step_is_refused():
    with pytest.raises(ConfigurationError, match=r"step.*-1"):
        AlphaSchedule()(-1)
    with pytest.raises(ConfigurationError, match=r"step.*-1"):
        AlphaSchedule(steps=0)(-1)


@pytest.mark.parametrize(
    "name, value",
    [
        ("curve", "cubic"),
        ("steps", -1),
        ("steps", 1.5),
        ("steps", True),
        ("steps", "10"),
        ("start", -0.1),
        ("start", math.nextafter(1.0, 2.0)),
        ("start", math.nan),
        ("start", "0"),
        ("start", True),
        ("target", 1.1),
        ("target", -math.inf),
        ("target", None),
        *(("steepness", value) for value in (0.0, -1.0, math.nan, math.inf, 10**400, "12", None, True)),
    ],
)
def test_a_bad_argument_of_a_curve_is_refused_by_name_and_value(name, value):
    with pytest.raises(ConfigurationError) as caught:
        AlphaSchedule(**{"curve": "sigmoid", name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


def test_a_threshold_changes_at_its_boundaries_exactly():
    threshold = ProgressThreshold(early=0.01, mid=0.05, late=0.1, mid_from=0.25, late_from=0.75)
    assert threshold(0.0) == 0.01
    assert threshold(math.nextafter(0.25, 0.0)) == 0.01
    assert threshold(0.25) == 0.05
    assert threshold(math.nextafter(0.75, 0.0)) == 0.05
    assert threshold(0.75) == 0.1
    assert threshold(1.0) == 0.1


def test_phases_are_thirds_unless_told():
    threshold = ProgressThreshold(early=1, mid=2, late=3)
    assert [threshold(p) for p in (0, math.nextafter(1 / 3, 0), 1 / 3, math.nextafter(2 / 3, 0), 2 / 3, 1)] == [
        1, 1, 2, 2, 3, 3,
    ]  # fmt: skip


def test_a_phase_may_be_empty():
    threshold = ProgressThreshold(early=1, mid=2, late=3, mid_from=0.5, late_from=0.5)
    assert [threshold(p) for p in (0.0, 0.5, 1.0)] == [1, 3, 3]
    assert ProgressThreshold(early=1, mid=2, late=3, mid_from=0, late_from=1)(0) == 2


@pytest.mark.parametrize("name", ["early", "mid", "late"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, None, "0.1", True])
def test_a_bad_threshold_is_refused_by_name_and_value(name, value):
    with pytest.raises(ConfigurationError) as caught:
        ProgressThreshold(**{"early": 0.1, "mid": 0.1, "late": 0.1, name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", ["mid_from", "late_from"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, "0.5", False])
def test_a_boundary_outside_the_training_is_refused(name, value):
    with pytest.raises(ConfigurationError, match=name):
        ProgressThreshold(early=1, mid=1, late=1, **{name: value})


def test_phases_out_of_order_are_refused():
    with pytest.raises(ConfigurationError, match=r"mid_from \(0.8\).*late_from \(0.2\)"):
        ProgressThreshold(early=1, mid=1, late=1, mid_from=0.8, late_from=0.2)


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan, None])
def test_progress_outside_the_training_is_refused(progress):
    with pytest.raises(ConfigurationError, match="progress"):
        ProgressThreshold(early=1, mid=1, late=1)(progress)


def test_schedules_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AlphaSchedule().steps = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        ProgressThreshold(early=1, mid=1, late=1).mid = 3


# --- the controller of alpha ---


@pytest.mark.parametrize("curve", sorted(CURVES))
@pytest.mark.parametrize("start, target, mode", [(0.0, 0.7, "UP"), (0.9, 0.2, "DOWN")])
def test_the_controller_walks_the_schedule_and_holds_exactly_at_its_target(curve, start, target, mode):
    alpha = AlphaController(start)
    assert (alpha.mode, alpha.alpha, alpha.target) == ("HOLD", start, start)
    alpha.retarget(target, 7, curve)
    schedule = AlphaSchedule(start=start, target=target, steps=7, curve=curve)
    assert (alpha.start, alpha.target, alpha.curve, alpha.steps_total) == (start, target, curve, 7)
    for step in range(7):
        assert alpha.mode == mode
        assert (alpha.alpha, alpha.steps_done) == (schedule(step), step)
        assert alpha.step() == schedule(step + 1)
    assert (alpha.mode, alpha.alpha) == ("HOLD", target)
    assert alpha.step() == target
    assert alpha.steps_done == 7


def test_the_controller_jumps_in_no_steps_and_stands_when_it_is_there():
    alpha = AlphaController()
    alpha.retarget(0.4, 0)
    assert (alpha.mode, alpha.alpha) == ("HOLD", 0.4)
    alpha.retarget(0.4, 100)
    assert (alpha.mode, alpha.alpha) == ("HOLD", 0.4)


def test_the_controller_sets_out_only_from_hold_and_says_how():
    alpha = AlphaController()
    alpha.retarget(1.0, 4, "linear")
    alpha.step()
    before = alpha.state_dict()
    with pytest.raises(ConfigurationError, match=r"UP to 1, 1 of 4 steps.*halt\(\)"):
        alpha.retarget(0.0, 2)
    assert alpha.state_dict() == before
    alpha.halt()
    assert (alpha.mode, alpha.alpha, alpha.target) == ("HOLD", 0.25, 0.25)
    alpha.retarget(0.0, 2, "linear")
    assert (alpha.mode, alpha.step(), alpha.step()) == ("DOWN", 0.125, 0.0)


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1, math.inf, "1", None, True])
def test_the_controller_refuses_an_alpha_or_target_that_is_none(bad):
    with pytest.raises(ConfigurationError, match="must lie in"):
        AlphaController(bad)
    alpha = AlphaController(0.3)
    with pytest.raises(ConfigurationError, match="target must lie in"):
        alpha.retarget(bad, 3)
    assert alpha.state_dict() == AlphaController(0.3).state_dict()


@pytest.mark.parametrize("steps, curve", [(-1, "linear"), (1.5, "linear"), (True, "linear"), (3, "cubic")])
def test_the_controller_refuses_impossible_paths(steps, curve):
    alpha = AlphaController(0.3)
    with pytest.raises(ConfigurationError, match=r"steps must|unknown curve"):
        alpha.retarget(1.0, steps, curve)
    assert (alpha.mode, alpha.alpha) == ("HOLD", 0.3)


def test_a_restored_controller_goes_on_where_it_was():
    alpha = AlphaController()
    alpha.retarget(0.8, 5, "sigmoid", 3.0)
    alpha.step()
    assert alpha.alpha == AlphaSchedule(target=0.8, steps=5, curve="sigmoid", steepness=3.0)(1)
    assert alpha.steepness == 3.0
    restored = AlphaController.from_state_dict(json.loads(json.dumps(alpha.state_dict())))
    assert [restored.step() for _ in range(6)] == [alpha.step() for _ in range(6)]
    assert restored.mode == "HOLD"


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"steps_done": 6}, {"steps_done": -1}, {"steps_done": 1.0}, {"path": None}, {"more": 1}],
)
def test_a_damaged_controller_is_refused(change):
    alpha = AlphaController()
    alpha.retarget(0.8, 5)
    with pytest.raises(StateDictError):
        AlphaController.from_state_dict({**alpha.state_dict(), **change})
