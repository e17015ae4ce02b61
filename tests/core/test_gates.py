"""Every question of every gate: passes at its limit, fails one step beyond, and says what it did not know."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seedtriton.core.errors import ConfigurationError
from seedtriton.core.evidence import (
    HOST_UNDEFINED,
    MEASURED,
    NEVER_MEASURED,
    NO_GRADIENT,
    NOT_FINITE,
    STATUSES,
    Sample,
    SeedEvidence,
    collect_evidence,
)
from seedtriton.core.gates import GATE_OF, QualityGates
from seedtriton.core.harm import Watch
from seedtriton.core.lifecycle import Stage
from seedtriton.core.probe import FALL_ERRORS, RISE_ERRORS, BlendProbe
from seedtriton.core.schedules import ProgressThreshold
from seedtriton.core.thresholds import GateThresholds
from seedtriton.core.verdict import PERMISSIVE, STRICT, Check, Gate, SeedStatus

NAN, INF = math.nan, math.inf

ALWAYS_ASKED = {"stage", "measured"}
# Told, whatever the thresholds, and nothing depends on it.
TOLD = {"identity", "modes"}
# question: the threshold that switches it off
QUESTIONS = {
    "finite": "max_dropped_share",
    "quarantine": "max_seed_not_finite",
    "clipping": "max_plateau_share",
    "optimizer": "require_optimizer",
    "displacement": "min_displacement",
    "runaway": "max_displacement",
    "live_share": "min_live_share",
    "gradient_ratio": "min_gradient_ratio",
    "exploding": "max_gradient_ratio",
    "exploding_tensors": "max_exploding_share",
    "samples": "min_samples",
    "age": "max_sample_age",
    "epochs": "min_training_epochs",
    "improvement": "min_training_improvement",
    "isolation": "max_isolation_violations",
    "blend_gain": "min_blend_gain_t",
    "probe_gain": "min_probe_gain",
    "probe_harm": "max_probe_harm",
}
# The same for questions that are off unless a limit is set.
OFF = {"vanishing": "max_vanishing_share", "health": "min_health"}
# question, what is changed, at the default limit, one step beyond it, name of yes, name of no
LIMITS = [
    (
        "improvement", "improvement", 1.0, math.nextafter(1.0, 0),
        "global_improvement", "global_improvement_insufficient",
    ),
    ("isolation", "isolation_violations", 3, 4, "isolated", "isolation_violated"),
    ("epochs", "epochs_in_stage", 3, 2, "seed_ready", "seed_not_ready"),
    ("quarantine", "seed_not_finite", 0, 1, "seed_always_finite", "seed_not_finite"),
    ("gradient_ratio", "ratio", 0.05, math.nextafter(0.05, 0), "seed_gradient_active", "seed_gradient_low"),
    ("exploding", "ratio", 1e3, math.nextafter(1e3, INF), "seed_gradient_bounded", "seed_gradient_exploding"),
    (
        "exploding_tensors", "exploding_share", 0.5, math.nextafter(0.5, 1), "gradients_bounded",
        "gradients_exploding",
    ),
    ("samples", "samples", 32, 31, "samples_sufficient", "samples_insufficient"),
    ("age", "age", 20, 21, "samples_fresh", "samples_stale"),
    ("displacement", "displacement", 1e-4, math.nextafter(1e-4, 0), "weights_moved", "weights_not_moved"),
    ("runaway", "displacement", 1e4, math.nextafter(1e4, INF), "weights_bounded", "weights_ran_away"),
    ("live_share", "live_share", 0.5, math.nextafter(0.5, 0), "gradients_alive", "gradients_dead"),
    (
        "clipping", "plateau_share", 0.5, math.nextafter(0.5, 1),
        "not_clipped_before_measuring", "clipped_before_measuring",
    ),
    (
        "blend_gain", "blend_gain_t", 4.0, math.nextafter(4.0, 0),
        "blend_gain_significant", "blend_gain_insignificant",
    ),
    ("probe_gain", "probe", 5e-4, math.nextafter(5e-4, 0), "blend_lowers_loss", "blend_lowers_no_loss"),
]  # fmt: skip


def probed(gain=0.1, harm=None, **changes):
    """A probe without noise: the loss falls by ``gain`` spreads at alpha 0.1 and rises by ``harm`` of them at 1."""
    moves = (-gain, -gain if harm is None else harm)
    known = {"loss": 7.0, "changes": moves, "errors": (0.0, 0.0), "spread": 1.0}
    return BlendProbe(seed="s", alphas=(0.1, 1.0), **{**known, **changes})


EVIDENCE = {field.name for field in dataclasses.fields(SeedEvidence)}


def seed_status(**changes):
    """A seed in TRAINING of which everything is known and good; ``changes`` go where they belong."""
    known = {
        "seed": "s",
        "status": MEASURED,
        "reason": "ratio 0.5 = seed 1 / host 2, 100 samples",
        "ratio": 0.5,
        "rms_ratio": 0.5,
        "seed_norm": 1.0,
        "host_norm": 2.0,
        "samples": 100,
        "age": 0,
        "blend_gain": 0.1,
        "blend_gain_t": 10.0,
        "effective_samples": 50.0,
        "displacement": 0.1,
        "live_share": 1.0,
        "vanishing_share": 0.0,
        "exploding_share": 0.0,
        "health": 1.0,
        "in_optimizer": True,
        "optimizer_steps": 100,
        "plateau_share": 0.02,
    }
    rest = {
        "stage": Stage.TRAINING,
        "epochs_in_stage": 10,
        "parameters": 50,
        "preserves_shape": True,
        "improvement": 3.0,
        "handed_on": 1.0,
        "accuracy_change": 0.0,
        "alpha": 1.0,
    }
    if isinstance(changes.get("probe"), float):
        changes["probe"] = probed(changes["probe"])
    if "evidence" not in changes:
        known |= {name: changes.pop(name) for name in EVIDENCE & changes.keys()}
        changes["evidence"] = SeedEvidence(**known)
    return SeedStatus(**{"seed": "s", **rest, **changes})


# Questions that are off unless told, and asked in these tests.
EVERYTHING = GateThresholds.original(max_exploding_share=0.5)


def judge(target=Stage.BLENDING, thresholds=EVERYTHING, mode=STRICT, **changes):
    return QualityGates(thresholds, mode).judge(target, seed_status(**changes))


def answer(verdict, question):
    (found,) = [check for check in verdict.checks if check.question == question]
    return found


def failed(verdict):
    return [check.question for check in verdict.failed]


def without_ratio():
    return GateThresholds().without("min_gradient_ratio")


# --- G2, question by question -----------------------------------------------------------------------


def test_g2_asks_these_questions_and_a_good_seed_passes_all():
    verdict = judge()
    assert (verdict.gate, verdict.target, verdict.seed, verdict.mode) == (Gate.G2, Stage.BLENDING, "s", STRICT)
    assert verdict.passed is True
    assert {check.question for check in verdict.checks} == ALWAYS_ASKED | TOLD | QUESTIONS.keys() | OFF.keys()
    assert len(verdict.checks) == 24
    unasked = {check.question for check in verdict.checks if check.passed is None}
    assert unasked == OFF.keys() | {"probe_gain", "probe_harm", "modes"}
    assert {check.question for check in judge(probe=probed()).checks if check.passed is not True} == OFF.keys()
    assert all(check.passed is not False and check.reason for check in verdict.checks)


@pytest.mark.parametrize("question, field, limit, beyond, yes, no", LIMITS, ids=[case[0] for case in LIMITS])
def test_exactly_at_the_limit_passes_and_one_step_beyond_fails(question, field, limit, beyond, yes, no):
    passed = judge(**{field: limit})
    check = answer(passed, question)
    assert passed.passed is True
    assert (check.name, check.passed, check.value, check.limit) == (yes, True, limit, limit)

    refused = judge(**{field: beyond})
    check = answer(refused, question)
    assert refused.passed is False
    assert failed(refused) == [question]
    assert (check.name, check.passed, check.value, check.limit) == (no, False, beyond, limit)
    assert check.reason


@pytest.mark.parametrize("question, field, limit, beyond, yes, no", LIMITS, ids=[case[0] for case in LIMITS])
def test_a_question_switched_off_is_listed_and_decides_nothing(question, field, limit, beyond, yes, no):
    name = QUESTIONS[question]
    verdict = judge(thresholds=GateThresholds().without(name), **{field: beyond})
    check = answer(verdict, question)
    assert verdict.passed is True
    assert (check.passed, check.value, check.limit) == (None, beyond, None)
    assert check.reason == f"not asked: {name} is None"
    assert check not in verdict.failed


@pytest.mark.parametrize(
    "question, field, limit, beyond, yes, no",
    [
        (
            "vanishing", "vanishing_share", 0.25, math.nextafter(0.25, 1),
            "gradients_substantial", "gradients_vanishing",
        ),
        ("health", "health", 0.75, math.nextafter(0.75, 0), "gradients_healthy", "gradients_unhealthy"),
    ],
)  # fmt: skip
def test_a_question_that_is_off_is_asked_once_it_has_a_limit(question, field, limit, beyond, yes, no):
    thresholds = GateThresholds(**{OFF[question]: limit})
    passed, refused = judge(thresholds=thresholds, **{field: limit}), judge(thresholds=thresholds, **{field: beyond})
    assert (passed.passed, answer(passed, question).name) == (True, yes)
    assert (failed(refused), answer(refused, question).name) == ([question], no)
    unknown = judge(thresholds=thresholds, **{field: None})
    assert (failed(unknown), answer(unknown, question).name) == ([question], f"{question}_never_measured")
    off = answer(judge(**{field: beyond}), question)
    assert (off.passed, off.value, off.reason) == (None, beyond, f"not asked: {OFF[question]} is None")


@pytest.mark.parametrize(
    "question, field",
    [
        ("improvement", "improvement"),
        ("displacement", "displacement"),
        ("live_share", "live_share"),
        ("exploding_tensors", "exploding_share"),
        ("blend_gain", "blend_gain_t"),
        ("optimizer", "in_optimizer"),
        ("gradient_ratio", "ratio"),
        ("exploding", "ratio"),
    ],
)
def test_what_is_not_known_does_not_pass(question, field):
    verdict = judge(**{field: None})
    check = answer(verdict, question)
    assert verdict.passed is False
    assert (check.passed, check.value) == (False, None)
    assert check.name.endswith(("_never_measured", "_undefined"))
    assert set(failed(verdict)) <= {question, "gradient_ratio", "exploding", "runaway"}


@pytest.mark.parametrize(
    "question, field",
    [
        ("improvement", "improvement"),
        ("displacement", "displacement"),
        ("live_share", "live_share"),
        ("blend_gain", "blend_gain_t"),
        ("gradient_ratio", "ratio"),
        ("exploding", "ratio"),
        ("clipping", "plateau_share"),
    ],
)
def test_nan_does_not_pass(question, field):
    verdict = judge(**{field: NAN})
    assert verdict.passed is False
    assert question in failed(verdict)


def test_too_few_samples_to_tell_a_plateau_are_listed_as_not_asked():
    verdict = judge(plateau_share=None, samples=7, thresholds=GateThresholds().without("min_samples"))
    check = answer(verdict, "clipping")
    assert verdict.passed is True
    assert (check.passed, check.value, check.limit) == (None, None, 0.5)
    assert check.reason == "not asked: 7 samples are too few to tell a plateau"


def test_clipping_before_measuring_is_told_with_the_way_out():
    assert "measure before you clip" in str(judge(plateau_share=1.0))


def test_the_share_of_dropped_samples_passes_at_its_limit():
    at = judge(samples=90, dropped=10)
    check = answer(at, "finite")
    assert at.passed is True
    assert (check.name, check.value, check.limit) == ("gradients_finite", 0.1, 0.1)

    beyond = judge(samples=90, dropped=10, thresholds=GateThresholds(max_dropped_share=math.nextafter(0.1, 0)))
    assert failed(beyond) == ["finite"]
    assert answer(beyond, "finite").name == "gradients_not_finite"
    assert failed(judge(samples=89, dropped=10)) == ["finite"]

    off = judge(samples=50, dropped=50, thresholds=GateThresholds(max_dropped_share=None))
    assert off.passed is True
    assert (answer(off, "finite").passed, answer(off, "finite").value) == (None, 0.5)


def test_a_seed_must_be_in_an_optimizer_that_steps():
    for changes, name, value in [
        ({"in_optimizer": True}, "seed_in_optimizer", True),
        ({"optimizer_steps": 1}, "seed_in_optimizer", True),
        ({"optimizer_steps": None}, "seed_in_optimizer", True),
        ({"optimizer_steps": 0}, "optimizer_never_stepped", 0),
        ({"in_optimizer": False}, "seed_in_no_optimizer", False),
        ({"in_optimizer": None}, "optimizer_never_measured", None),
    ]:
        verdict = judge(**changes)
        check = answer(verdict, "optimizer")
        passes = name == "seed_in_optimizer"
        assert (check.name, check.passed, check.value) == (name, passes, value)
        assert check.reason
        assert failed(verdict) == ([] if passes else ["optimizer"])
        for off in (None, False):
            verdict = judge(thresholds=GateThresholds(require_optimizer=off), **changes)
            assert verdict.passed is True
            assert answer(verdict, "optimizer").passed is None


def test_g2_is_only_for_a_seed_in_training():
    for stage in set(Stage) - {Stage.TRAINING}:
        verdict = judge(stage=stage)
        assert failed(verdict) == ["stage"]
        assert answer(verdict, "stage").name == "not_in_training"
        assert answer(verdict, "stage").value == str(stage)


def test_without_an_optimizer_the_age_is_unknown_and_the_optimizer_question_refuses():
    verdict = judge(age=None, in_optimizer=None, optimizer_steps=None)
    assert failed(verdict) == ["optimizer", "age"]
    check = answer(verdict, "age")
    assert (check.name, check.passed) == ("samples_age_unknown", False)
    assert "give the monitor its optimizers" in check.reason


def test_the_ratio_is_of_the_kind_that_the_thresholds_name():
    low, high, limits = 0.001, 5000.0, GateThresholds(ratio="rms")
    assert failed(judge(rms_ratio=low)) == failed(judge(rms_ratio=high)) == []
    assert failed(judge(thresholds=limits, rms_ratio=low)) == ["gradient_ratio"]
    assert failed(judge(thresholds=limits, rms_ratio=high)) == ["exploding"]
    assert failed(judge(thresholds=limits, ratio=low)) == failed(judge(thresholds=limits, ratio=high)) == []
    unknown = judge(thresholds=limits, rms_ratio=None)
    assert answer(unknown, "gradient_ratio").name == "gradient_ratio_undefined"
    assert "rms" in answer(judge(thresholds=limits, rms_ratio=low), "gradient_ratio").reason


# --- what the validation loss would be --------------------------------------------------------------


def test_harm_at_any_alpha_is_refused_although_the_loss_falls_at_another():
    limit = GateThresholds().max_probe_harm
    assert judge(probe=probed(harm=limit)).passed is True
    refused = judge(probe=probed(harm=math.nextafter(limit, 1)))
    assert [check.name for check in refused.failed] == ["blend_would_harm"]
    assert "at alpha 0.1" in str(refused)
    assert judge(thresholds=GateThresholds().without("max_probe_harm"), probe=probed(harm=9.0)).passed is True


def test_a_change_within_the_noise_of_the_validation_set_is_none():
    def noisy(changes, error):
        return probed(loss=-3.0, changes=changes, errors=(error, error), spread=2.0)

    assert (noisy((-0.1, -0.2), 0.0).gain, noisy((-0.1, -0.2), 0.0).harm) == (0.1, 0.0)
    assert (noisy((0.1, 0.2), 0.0).gain, noisy((0.1, 0.2), 0.0).harm) == (0.0, 0.1)
    for error, gain in [(0.199 / FALL_ERRORS, 0.1), (0.201 / FALL_ERRORS, 0.0)]:
        assert noisy((-0.1, -0.2), error).gain == gain
    for error, harm in [(0.199 / RISE_ERRORS, 0.1), (0.201 / RISE_ERRORS, 0.0)]:
        assert noisy((-0.9, 0.2), error).harm == harm
    assert [check.name for check in judge(probe=noisy((-0.1, -0.2), 0.1)).failed] == ["blend_lowers_no_loss"]
    assert judge(probe=noisy((-0.9, 0.2), 0.201)).passed is True
    assert [check.name for check in judge(probe=noisy((-0.9, 0.2), 0.199)).failed] == ["blend_would_harm"]


def test_a_probe_measures_what_the_blend_gain_predicts():
    """With a probe the gain need not be certain any more, only not against the seed."""
    assert failed(judge(probe=None, blend_gain_t=3.9)) == ["blend_gain"]
    assert judge(probe=probed(), blend_gain_t=0.0).passed is True
    for gain in (-1e-9, NAN, None):
        assert failed(judge(probe=probed(), blend_gain_t=gain)) == ["blend_gain"]
    assert judge(probe=probed(), blend_gain_t=-9.0, thresholds=GateThresholds().without("min_blend_gain_t")).passed
    off = GateThresholds().without("min_probed_gain_t")
    assert judge(probe=probed(), blend_gain_t=-9.0, thresholds=off).passed is True
    assert failed(judge(probe=None, blend_gain_t=-9.0, thresholds=off)) == ["blend_gain"]


def test_a_mean_without_its_noise_takes_nothing_from_the_blend_gain():
    """It made G2 weaker than no probe: random labels passed in 6 of 10 runs."""
    mean = {"errors": None, "spread": None}
    assert judge(probe=probed(**mean), blend_gain_t=4.0).passed is True
    assert failed(judge(probe=probed(**mean), blend_gain_t=3.9)) == ["blend_gain"]
    assert judge(probe=probed(), blend_gain_t=3.9).passed is True
    # Of what size a move of a mean is nobody knows: any fall is one, and any rise.
    assert judge(probe=probed(1e-12, **mean)).passed is True
    assert [check.name for check in judge(probe=probed(0.0, 0.0, **mean)).failed] == ["blend_lowers_no_loss"]
    assert [check.name for check in judge(probe=probed(0.5, 1e-12, **mean)).failed] == ["blend_would_harm"]


@pytest.mark.parametrize("factor, offset", [(1.0, 0.0), (1e3, 0.0), (1e-3, 0.0), (1.0, 1e6), (7.0, -7.0)])
def test_a_verdict_knows_no_unit_and_no_zero_of_the_loss(factor, offset):
    def written(gain, harm, error):
        changes, errors = (-gain * factor, harm * factor), (error * factor, error * factor)
        return probed(loss=offset, changes=changes, errors=errors, spread=2.0 * factor)

    for gain, harm, error, names in [
        (0.1, -0.1, 0.03, []), (0.1, -0.1, 0.034, ["blend_lowers_no_loss"]),
        (0.0011, -0.1, 0.0, []), (0.0009, -0.0009, 0.0, ["blend_lowers_no_loss"]),
        (0.1, 0.0019, 0.0, []), (0.1, 0.0021, 0.0, ["blend_would_harm"]), (0.1, 0.0021, 0.0022, []),
    ]:  # fmt: skip
        assert [check.name for check in judge(probe=written(gain, harm, error)).failed] == names
        verdict = judge(Stage.FOSSILIZED, stage=Stage.HOLDING, probe=written(gain, -gain, error))
        assert verdict.passed is (gain > 2e-3 and gain > FALL_ERRORS * error)


def test_rounding_is_no_move_where_all_losses_are_one():
    same = {"spread": 0.0, "errors": (0.0, 0.0), "loss": 1.0}
    assert probed(6e-8, **same).gain == probed(-6e-8, **same).harm == 0.0
    assert probed(1e-3, **same).gain == probed(-1e-3, **same).harm == INF
    for bad in (None, 3.0, {0.1}):
        with pytest.raises(ConfigurationError, match="list of numbers"):
            probed(changes=bad)


def test_few_losses_make_an_uncertain_error():
    """Of three batches, three standard errors are no more than chance."""
    many, few = (probed(0.1, errors=(0.02, 0.02), degrees=degrees) for degrees in (1000, 3))
    assert (many.gain, few.gain) == (pytest.approx(0.1), 0.0)
    assert probed(0.1, errors=(0.011, 0.011), degrees=3).gain == pytest.approx(0.1)
    assert probed(0.1, errors=(0.02, 0.02)).gain == pytest.approx(0.1)


def test_training_and_evaluation_that_contradict_each_other_are_told():
    for t, changes in [(5.0, (0.2, 0.5)), (-5.0, (-0.2, -0.5))]:
        verdict = judge(blend_gain_t=t, probe=probed(changes=changes, errors=(0.05, 0.1)))
        assert [check.name for check in verdict.warnings] == ["training_and_evaluation_disagree"]
        assert "batch statistics or Dropout" in str(verdict)
    for t, changes, error in [(5.0, (0.2, 0.5), 0.07), (3.9, (0.2, 0.5), 0.05), (5.0, (-0.2, 0.5), 0.05)]:
        assert not judge(blend_gain_t=t, probe=probed(changes=changes, errors=(error, error))).warnings


@pytest.mark.parametrize(
    "changes, suspected",
    [((0.2, 0.5), True), ((0.0, 0.5), True), ((0.0, 0.0), False), ((-0.01, 0.5), False), ((0.5, -0.01), False)],
)
def test_a_loss_that_never_falls_where_gradients_say_it_should_may_be_an_accuracy(changes, suspected):
    verdict = judge(probe=probed(changes=changes, errors=None, spread=None))
    said = [check for check in verdict.failed if "evaluate returns an accuracy" in check.reason]
    assert bool(said) is suspected


def test_a_seed_that_the_probe_alone_refuses_is_told_so():
    alone = judge(probe=probed(-0.5))
    assert all("by its gradients alone it would have passed, t of the blend gain 10" in c.reason for c in alone.failed)
    for changes in ({"blend_gain_t": 3.9}, {"samples": 1}):
        assert "by its gradients alone" not in str(judge(probe=probed(-0.5), **changes))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_loss_that_is_not_finite_is_refused(bad):
    blended = probed(0.5, bad)
    assert [check.name for check in judge(probe=blended).failed] == ["blend_would_harm"]
    before = probed(0.5, loss=bad)
    assert (before.gain, before.harm) == (0.0, INF)
    assert {check.name for check in judge(probe=before).failed} == {"blend_lowers_no_loss", "blend_would_harm"}


def test_without_a_validation_function_the_probe_is_not_asked_and_says_so():
    verdict = judge(probe=None)
    assert verdict.passed is True
    for question in ("probe_gain", "probe_harm"):
        assert answer(verdict, question).passed is None
        assert answer(verdict, question).reason == "not asked: the validation loss was not probed"
    assert answer(judge(probe_due=9), "probe_gain").name == answer(judge(probe_due=9), "probe_harm").name
    waiting = judge(probe_due=9, blend_gain_t=1.0)
    assert [check.name for check in waiting.failed] == ["probe_not_due"] * 2
    assert "epoch 9" in waiting.failed[0].reason
    fossil = judge(Stage.FOSSILIZED, stage=Stage.HOLDING, probe=None)
    assert (fossil.passed, answer(fossil, "contribution").passed) == (True, None)


def test_a_seed_that_contributes_nothing_does_not_become_permanent():
    contributes = {"stage": Stage.HOLDING, "probe": probed(1e-3)}
    assert answer(judge(Stage.FOSSILIZED, **contributes), "contribution").name == "seed_contributes"
    refused = judge(Stage.FOSSILIZED, stage=Stage.HOLDING, probe=probed(math.nextafter(1e-3, 0)))
    assert [check.name for check in refused.failed] == ["seed_contributes_nothing"]


def test_which_gates_need_a_probe():
    gates = QualityGates()
    felt = [Stage.HOLDING, Stage.FOSSILIZED]
    assert [stage for stage in Stage if gates.asks_probe(stage)] == [Stage.BLENDING, *felt]
    limits = {
        "min_probe_gain": [Stage.BLENDING],
        "max_probe_harm": [Stage.BLENDING, *felt],
        "max_accuracy_drop": felt,
        "min_contribution": [Stage.FOSSILIZED],
    }
    for name, stages in limits.items():
        alone = QualityGates(GateThresholds().without(*(limits.keys() - {name})))
        assert [stage for stage in Stage if alone.asks_probe(stage)] == stages
    assert not any(map(QualityGates(GateThresholds().without(*limits)).asks_probe, Stage))
    assert not QualityGates(mode=PERMISSIVE).asks_probe(Stage.BLENDING)


@pytest.mark.parametrize("lists", [((), ()), ((0.1,), (1.0, 2.0)), ((0.1, 1.0), (1.0,))])
def test_a_probe_needs_one_change_for_each_alpha(lists):
    with pytest.raises(ConfigurationError, match="one entry of"):
        BlendProbe(seed="s", loss=1.0, alphas=lists[0], changes=lists[1])
    with pytest.raises(ConfigurationError, match="errors"):
        BlendProbe(seed="s", loss=1.0, alphas=(0.1,), changes=(1.0,), errors=(1.0, 2.0))


def test_a_probe_survives_being_saved():
    probe = BlendProbe(seed="s", loss=1.0, alphas=(0.1, 1.0), changes=(-0.1, 0.2), errors=(0.1, 0.1))
    state = json.loads(json.dumps(probe.state_dict()))
    assert BlendProbe.from_state_dict(state) == probe


# --- five answers -----------------------------------------------------------------------------------

GOOD = Sample(16.0, 9.0, 3, 5, 400, 100, 5, 0.5, False, 0, 0)
WINDOWS = {
    "gradient_never_measured": [],
    "seed_gradient_missing": [GOOD._replace(seed_sumsq=0.0, seed_tensors=0)] * 40,
    "gradient_not_finite": [GOOD._replace(seed_sumsq=NAN)] * 40,
    "host_gradient_undefined": [GOOD._replace(host_sumsq=0.0)] * 40,
    "seed_gradient_low": [GOOD._replace(seed_sumsq=1e-6)] * 40,
}


def measured(window):
    """Evidence of a real window, everything else good."""
    found = collect_evidence(
        "s", window, parameters=5, age=0, displacement=1.0, in_optimizer=True, optimizer_steps=40
    )
    return dataclasses.replace(found, blend_gain_t=10.0, live_share=1.0)


@pytest.mark.parametrize("name", WINDOWS)
def test_five_answers_have_five_names_and_none_of_them_passes(name):
    # A frozen host says nothing about the seed; where the blend gain is not asked, nothing else could decide.
    thresholds = GateThresholds().without("min_blend_gain_t")
    verdict = judge(evidence=measured(WINDOWS[name]), thresholds=thresholds)
    check = answer(verdict, "gradient_ratio")
    assert verdict.passed is False
    assert (check.name, check.passed) == (name, False)
    assert check.reason
    assert [other for other in WINDOWS if other in str(verdict)] == [name]


def test_the_window_behind_the_five_answers_passes_when_it_is_good():
    assert judge(evidence=measured([GOOD] * 40)).passed is True


def test_measuring_after_zero_grad_is_refused_and_says_why():
    nothing = Sample(0.0, 0.0, 0, 0, 0, 0, 0, NAN, False)
    verdict = judge(evidence=measured([nothing] * 40))
    assert "measured" in failed(verdict)
    assert "zero_grad" in str(verdict)


def test_no_evidence_is_never_measured():
    for mode in (STRICT, PERMISSIVE):
        verdict = judge(mode=mode, evidence=None)
        assert verdict.passed is False
        assert answer(verdict, "measured").name == "gradient_never_measured"
        assert "gradient_never_measured" in str(verdict)


def test_a_missing_gradient_fails_the_questions_that_ask_for_it():
    assert failed(judge(evidence=measured([]))) == [
        "measured", "finite", "exploding_tensors", "gradient_ratio", "exploding", "samples",
    ]  # fmt: skip
    assert failed(judge(evidence=measured(WINDOWS["seed_gradient_missing"]))) == [
        "measured", "exploding_tensors", "gradient_ratio", "exploding",
    ]  # fmt: skip
    assert failed(judge(evidence=measured(WINDOWS["gradient_not_finite"]))) == [
        "measured", "finite", "quarantine", "exploding_tensors", "gradient_ratio", "exploding", "samples",
    ]  # fmt: skip
    without_gain = GateThresholds().without("min_blend_gain_t")
    assert failed(judge(evidence=measured(WINDOWS["host_gradient_undefined"]), thresholds=without_gain)) == [
        "gradient_ratio", "exploding",
    ]  # fmt: skip
    assert failed(judge(evidence=measured(WINDOWS["seed_gradient_low"]))) == ["gradient_ratio"]


def test_age_without_any_measurement_is_not_fresh():
    verdict = judge(evidence=SeedEvidence(seed="s"))
    assert (answer(verdict, "age").name, answer(verdict, "age").passed) == ("gradient_never_measured", False)
    for counter in ("samples", "dropped", "empty"):
        verdict = judge(evidence=SeedEvidence(seed="s", **{counter: 1}))
        assert (answer(verdict, "age").name, answer(verdict, "age").passed) == ("samples_age_unknown", False)


def test_behind_a_frozen_host_the_blend_gain_decides():
    """W8: a host norm near 0 read as a dead seed, and a frozen host could never pass."""
    frozen = measured(WINDOWS["host_gradient_undefined"])
    verdict = judge(evidence=frozen)
    assert verdict.passed is True
    for question in ("gradient_ratio", "exploding"):
        check = answer(verdict, question)
        assert (check.name, check.passed, check.value) == ("host_gradient_undefined", None, None)
        assert "the blend gain decides" in check.reason
        assert "frozen host" in check.reason
    for gain in (3.9, None):
        assert failed(judge(evidence=dataclasses.replace(frozen, blend_gain_t=gain))) == ["blend_gain"]
    # Where the blend gain is not asked, somebody has to switch the ratio off and say so.
    assert failed(judge(evidence=frozen, mode=PERMISSIVE)) == ["exploding"]


@pytest.mark.parametrize("mode", [STRICT, PERMISSIVE])
@pytest.mark.parametrize("ratio", [1e30, INF])
def test_the_upper_alarm_refuses_an_enormous_ratio(mode, ratio):
    verdict = judge(mode=mode, ratio=ratio)
    assert failed(verdict) == ["exploding"]
    assert answer(verdict, "exploding").name == "seed_gradient_exploding"


# --- thresholds that change with progress -----------------------------------------------------------

BY_PROGRESS = GateThresholds(min_gradient_ratio=ProgressThreshold(early=0.1, mid=0.2, late=0.3))


@pytest.mark.parametrize("progress, limit", [(0.0, 0.1), (0.5, 0.2), (1.0, 0.3)])
def test_a_threshold_by_progress_is_exact_at_its_limit(progress, limit):
    passed = judge(thresholds=BY_PROGRESS, progress=progress, ratio=limit)
    assert passed.passed is True
    assert answer(passed, "gradient_ratio").limit == limit
    assert failed(judge(thresholds=BY_PROGRESS, progress=progress, ratio=math.nextafter(limit, 0))) == [
        "gradient_ratio"
    ]


def test_unknown_progress_does_not_pass():
    verdict = judge(thresholds=BY_PROGRESS, ratio=5.0)
    assert failed(verdict) == ["gradient_ratio"]
    assert answer(verdict, "gradient_ratio").name == "progress_unknown"
    assert answer(verdict, "gradient_ratio").value == 5.0


def test_unknown_progress_does_not_matter_in_permissive_mode():
    assert judge(thresholds=BY_PROGRESS, mode=PERMISSIVE).passed is True


# --- permissive -------------------------------------------------------------------------------------


def test_permissive_asks_six_questions_and_lists_the_others():
    verdict = judge(mode=PERMISSIVE)
    asked = {check.question for check in verdict.checks if check.passed is not None}
    assert asked == {"stage", "measured", "finite", "exploding", "exploding_tensors", "epochs", "identity"}
    assert {check.question for check in verdict.checks} == ALWAYS_ASKED | TOLD | QUESTIONS.keys() | OFF.keys()
    reasons = {check.reason for check in verdict.checks if check.passed is None and check.question not in TOLD}
    assert reasons == {"not asked: permissive", "not asked: min_health is None"}
    assert verdict.mode == PERMISSIVE


@pytest.mark.parametrize(
    "changes",
    [
        {"improvement": None},
        {"isolation_violations": 99},
        {"ratio": 0.0},
        {"samples": 1},
        {"age": 999},
        {"displacement": 0.0},
        {"displacement": 1e6},
        {"live_share": 0.0},
        {"blend_gain_t": -9.0},
        {"in_optimizer": False},
    ],
    ids=str,
)
def test_permissive_lets_a_seed_pass_that_strict_refuses(changes):
    assert judge(**changes).passed is False
    assert judge(mode=PERMISSIVE, **changes).passed is True


@pytest.mark.parametrize("name", ["gradient_never_measured", "seed_gradient_missing", "gradient_not_finite"])
def test_permissive_still_refuses_what_was_not_measured(name):
    verdict = judge(mode=PERMISSIVE, evidence=measured(WINDOWS[name]))
    assert verdict.passed is False
    assert answer(verdict, "measured").name == name


def test_permissive_still_refuses_nan_exploding_short_and_dropped():
    assert failed(judge(mode=PERMISSIVE, ratio=NAN)) == ["exploding"]
    assert failed(judge(mode=PERMISSIVE, ratio=None)) == ["exploding"]
    assert failed(judge(mode=PERMISSIVE, ratio=math.nextafter(1e3, INF))) == ["exploding"]
    assert failed(judge(mode=PERMISSIVE, exploding_share=0.6)) == ["exploding_tensors"]
    assert failed(judge(mode=PERMISSIVE, exploding_share=None)) == ["exploding_tensors"]
    assert failed(judge(mode=PERMISSIVE, epochs_in_stage=2)) == ["epochs"]
    assert failed(judge(mode=PERMISSIVE, samples=8, dropped=1)) == ["finite"]
    assert failed(judge(mode=PERMISSIVE, stage=Stage.HOLDING)) == ["stage"]


def test_a_health_that_is_wanted_is_asked_in_every_mode():
    healthy = GateThresholds(min_health=0.9)
    for mode in (STRICT, PERMISSIVE):
        assert failed(judge(thresholds=healthy, mode=mode, health=0.89)) == ["health"]
        assert judge(thresholds=healthy, mode=mode, health=0.9).passed is True


def test_permissive_holds_for_g3_and_g5():
    """They asked everything in every mode; harm and an alpha on its way are refused in both."""
    for target, stage in [(Stage.HOLDING, Stage.BLENDING), (Stage.FOSSILIZED, Stage.HOLDING)]:
        lenient = {"stage": stage, "mode": PERMISSIVE}
        for changes in ({"age": 99}, {"accuracy_change": -50.0}, {"accuracy_change": None}):
            assert judge(target, stage=stage, **changes).passed is False
            assert judge(target, **lenient, **changes).passed is True
        for changes, question in [
            ({"epochs_in_stage": 0}, "epochs"), ({"samples": 8, "dropped": 1}, "finite"),
            ({"probe": probed(-1.0)}, "harm"), ({"recent_gain_t": -9.0}, "harm"),
        ]:  # fmt: skip
            assert failed(judge(target, **lenient, **changes)) == [question]
    assert failed(judge(Stage.HOLDING, stage=Stage.BLENDING, mode=PERMISSIVE, alpha=0.5)) == ["alpha"]


def test_permissive_changes_nothing_before_a_seed_trains():
    for target, stage in [(Stage.GERMINATED, Stage.DORMANT), (Stage.TRAINING, Stage.GERMINATED)]:
        for changes in ({}, {"age": 99, "accuracy_change": -50.0, "parameters": 0, "alpha": 0.5}):
            strict = judge(target, stage=stage, **changes)
            assert judge(target, mode=PERMISSIVE, stage=stage, **changes).checks == strict.checks


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigurationError, match="'lenient'"):
        QualityGates(mode="lenient")


# --- no vacuous pass --------------------------------------------------------------------------------

LIMIT_NAMES = {field.name for field in dataclasses.fields(GateThresholds)} - {"ratio"}
NOTHING_ASKED = GateThresholds().without(*LIMIT_NAMES)


def test_with_every_limit_off_gradients_must_still_be_measured():
    for target, stage in [
        (Stage.BLENDING, Stage.TRAINING),
        (Stage.HOLDING, Stage.BLENDING),
        (Stage.FOSSILIZED, Stage.HOLDING),
    ]:
        assert judge(target, NOTHING_ASKED, stage=stage).passed is True
        for evidence in (None, measured([]), *map(measured, list(WINDOWS.values())[1:3])):
            verdict = judge(target, NOTHING_ASKED, stage=stage, evidence=evidence)
            assert failed(verdict) == ["measured"]


shares = st.one_of(st.none(), st.floats(0.0, 1.0))
limits = st.one_of(st.none(), st.floats(0.0, 1e9))
wholes = st.one_of(st.none(), st.integers(0, 50))
thresholds = st.builds(
    GateThresholds,
    min_training_improvement=limits,
    max_isolation_violations=wholes,
    min_training_epochs=wholes,
    min_gradient_ratio=st.one_of(limits, st.just(ProgressThreshold(early=0.0, mid=0.0, late=0.0))),
    ratio=st.sampled_from(["norm", "rms"]),
    max_gradient_ratio=limits,
    min_samples=wholes,
    max_sample_age=wholes,
    max_dropped_share=shares,
    require_optimizer=st.sampled_from([True, False, None]),
    min_displacement=limits,
    min_live_share=shares,
    max_seed_not_finite=wholes,
    max_plateau_share=shares,
    min_blend_gain_t=limits,
)
numbers = st.one_of(st.none(), st.floats())
unmeasured = st.builds(
    SeedEvidence,
    seed=st.just("s"),
    status=st.sampled_from(STATUSES),
    samples=st.just(0),
    dropped=st.integers(0, 5),
    empty=st.integers(0, 5),
    ratio=numbers,
    rms_ratio=numbers,
    age=wholes,
    blend_gain_t=numbers,
    displacement=numbers,
    live_share=numbers,
    in_optimizer=st.sampled_from([True, False, None]),
    optimizer_steps=wholes,
    plateau_share=numbers,
)


@settings(deadline=None, max_examples=300)
@given(
    thresholds=thresholds,
    mode=st.sampled_from([STRICT, PERMISSIVE]),
    evidence=st.one_of(st.none(), unmeasured),
    improvement=numbers,
    epochs=st.integers(0, 1000),
    progress=st.one_of(st.none(), st.floats(0.0, 1.0)),
)
def test_no_seed_without_samples_ever_passes_g2(thresholds, mode, evidence, improvement, epochs, progress):
    verdict = judge(
        thresholds=thresholds,
        mode=mode,
        evidence=evidence,
        improvement=improvement,
        epochs_in_stage=epochs,
        progress=progress,
    )
    assert verdict.passed is False
    assert "measured" in failed(verdict)


# --- G0, G1, G3, G5 ---------------------------------------------------------------------------------


def test_g0_wants_a_free_slot_and_something_to_train():
    passed = judge(Stage.GERMINATED, stage=Stage.DORMANT, evidence=None, parameters=1)
    assert (passed.gate, passed.passed) == (Gate.G0, True)
    assert [check.name for check in passed.checks] == ["slot_free", "has_parameters"]
    assert [check.name for check in judge(Stage.GERMINATED, stage=Stage.DORMANT, parameters=0).failed] == [
        "no_parameters"
    ]
    for stage in set(Stage) - {Stage.DORMANT}:
        assert [check.name for check in judge(Stage.GERMINATED, stage=stage).failed] == ["slot_occupied"]


def test_g1_wants_a_germinated_seed_that_keeps_the_shape():
    passed = judge(Stage.TRAINING, stage=Stage.GERMINATED, evidence=None)
    assert (passed.gate, passed.passed) == (Gate.G1, True)
    assert [check.name for check in passed.checks] == ["germinated", "shape_preserved", "seed_hands_on_host"]
    changed = judge(Stage.TRAINING, stage=Stage.GERMINATED, preserves_shape=False)
    assert [check.name for check in changed.failed] == ["shape_changed"]
    untried = judge(Stage.TRAINING, stage=Stage.GERMINATED, preserves_shape=None)
    assert untried.passed is True
    assert (answer(untried, "shape").name, answer(untried, "shape").passed) == ("shape_untried", None)
    for stage in set(Stage) - {Stage.GERMINATED}:
        assert [check.name for check in judge(Stage.TRAINING, stage=stage).failed] == ["not_germinated"]


@pytest.mark.parametrize("mode", [STRICT, PERMISSIVE])
@pytest.mark.parametrize("target, stage", [(Stage.TRAINING, Stage.GERMINATED), (Stage.BLENDING, Stage.TRAINING)])
def test_a_seed_that_replaces_the_hosts_features_is_told_and_let_pass(target, stage, mode):
    at, below = 0.5, math.nextafter(0.5, 0)
    fine, told, unknown = (judge(target, stage=stage, mode=mode, handed_on=value) for value in (at, below, None))
    assert fine.passed is told.passed is unknown.passed is True
    assert (answer(fine, "identity").name, answer(fine, "identity").passed) == ("seed_hands_on_host", True)
    assert fine.warnings == unknown.warnings == ()
    (check,) = told.warnings
    assert (check.name, check.passed, check.value, check.limit) == ("seed_replaces_host", None, below, at)
    assert (answer(unknown, "identity").name, answer(unknown, "identity").passed) == ("identity", None)
    assert str(told).startswith(f"{told.gate} passed 's' for {target}: ")
    assert "; seed_replaces_host_0.50 (" in str(told)
    assert "f(x) instead of x + f(x)" in str(told)
    assert "seed_replaces_host" in str(judge(target, stage=Stage.HOLDING, mode=mode, handed_on=0.0))
    assert "seed_replaces_host" not in str(fine) + str(unknown)


def test_weights_that_ran_away_are_not_weights_that_moved():
    """27 124 times their own size, as SGD with momentum did with 0.1's rule, passed as moved."""
    refused = judge(displacement=27_124.0)
    assert [check.name for check in refused.failed] == ["weights_ran_away"]
    assert failed(judge(displacement=NAN)) == ["displacement", "runaway"]
    # Whoever asks one of them only is not told of the other.
    without = GateThresholds().without("min_displacement")
    assert failed(judge(thresholds=without, displacement=0.0)) == []
    assert failed(judge(thresholds=without, displacement=None)) == ["runaway"]


# changes, question, yes, no; the first value stands at its limit, the second one step beyond.
BLENDED = [
    ({"age": 20}, {"age": 21}, "age", "samples_fresh", "samples_stale"),
    ({"samples": 9, "dropped": 1}, {"samples": 8, "dropped": 1}, "finite", "gradients_finite", "gradients_not_finite"),
    (
        {"accuracy_change": -5.0}, {"accuracy_change": math.nextafter(-5.0, -INF)},
        "accuracy", "accuracy_kept", "accuracy_lost",
    ),
    ({"accuracy_change": 50.0}, {"accuracy_change": NAN}, "accuracy", "accuracy_kept", "accuracy_lost"),
    ({}, {"accuracy_change": None}, "accuracy", "accuracy_kept", "accuracy_never_measured"),
    ({}, {"status": NO_GRADIENT, "ratio": None}, "measured", "gradient_measured", "seed_gradient_missing"),
    ({}, {"status": NOT_FINITE, "ratio": None}, "measured", "gradient_measured", "gradient_not_finite"),
    (
        {"status": HOST_UNDEFINED}, {"status": NEVER_MEASURED},
        "measured", "gradient_measured", "gradient_never_measured",
    ),
]  # fmt: skip
HOLDING = [
    *BLENDED,
    ({"epochs_in_stage": 1}, {"epochs_in_stage": 0}, "epochs", "blending_complete", "blending_incomplete"),
    ({"alpha": 1.0}, {"alpha": math.nextafter(1.0, 0)}, "alpha", "alpha_target_reached", "alpha_not_at_target"),
    (
        {"alpha_holds": True}, {"alpha_holds": False}, "alpha", "alpha_target_reached", "alpha_not_at_target",
    ),
    (
        {"alpha": 0.1, "alpha_target": 0.1}, {"alpha": 0.0, "alpha_target": 0.0},
        "alpha", "alpha_target_reached", "alpha_not_at_target",
    ),
    (
        {"alpha": 0.5, "alpha_target": 0.5}, {"alpha": 1.0, "alpha_target": 0.5},
        "alpha", "alpha_target_reached", "alpha_not_at_target",
    ),
    ({"stage": Stage.BLENDING}, {"stage": Stage.TRAINING}, "stage", "in_blending", "not_in_blending"),
]  # fmt: skip
FOSSILIZED = [
    *BLENDED,
    ({"epochs_in_stage": 1}, {"epochs_in_stage": 0}, "epochs", "held", "not_held_long_enough"),
    ({"stage": Stage.HOLDING}, {"stage": Stage.BLENDING}, "stage", "in_holding", "not_in_holding"),
]


@pytest.mark.parametrize(
    "target, stage, gate, case",
    [
        *((Stage.HOLDING, Stage.BLENDING, Gate.G3, case) for case in HOLDING),
        *((Stage.FOSSILIZED, Stage.HOLDING, Gate.G5, case) for case in FOSSILIZED),
    ],
)
def test_g3_and_g5_pass_at_each_limit_and_refuse_beyond_it(target, stage, gate, case):
    good, bad, question, yes, no = case
    passed = judge(target, **{"stage": stage, **good})
    assert (passed.gate, passed.passed) == (gate, True)
    assert (answer(passed, question).name, answer(passed, question).passed) == (yes, True)
    refused = judge(target, **{"stage": stage, **bad})
    assert refused.passed is False
    assert [check.name for check in refused.failed] == [no]


def test_g3_and_g5_ask_these_questions():
    shared = {"stage", "measured", "finite", "age", "epochs", "accuracy", "harm"}
    assert {check.question for check in judge(Stage.HOLDING).checks} == shared | {"alpha"}
    assert {check.question for check in judge(Stage.FOSSILIZED).checks} == shared | {"contribution", "blend_gain"}


@pytest.mark.parametrize("target, stage", [(Stage.HOLDING, Stage.BLENDING), (Stage.FOSSILIZED, Stage.HOLDING)])
def test_accuracy_loss_and_probe_are_each_enough(target, stage):
    nothing = {"stage": stage, "accuracy_change": None}
    refused = judge(target, **nothing)
    assert [check.name for check in refused.failed] == ["accuracy_never_measured"]
    for way in ("end_epoch(accuracy=...)", "end_epoch(loss=...)", "evaluate="):
        assert way in str(refused)
    assert judge(target, **nothing, probe=probed()).passed is True
    assert answer(judge(target, **nothing, loss_rise=3.0), "loss").name == "loss_kept"
    for rise in (math.nextafter(3.0, 4), INF, NAN):
        assert [check.name for check in judge(target, **nothing, loss_rise=rise).failed] == ["loss_risen"]
        # An accuracy that is kept is enough; the probe is no excuse for a loss that is told.
        assert judge(target, stage=stage, loss_rise=rise).passed is True
        assert failed(judge(target, **nothing, loss_rise=rise, probe=probed())) == ["loss"]
    assert judge(target, GateThresholds().without("max_loss_rise"), **nothing, loss_rise=99.0).passed is True
    assert judge(target, GateThresholds().without("max_accuracy_drop"), **nothing, loss_rise=99.0).passed is True


@pytest.mark.parametrize("target, stage", [(Stage.HOLDING, Stage.BLENDING), (Stage.FOSSILIZED, Stage.HOLDING)])
def test_a_probed_loss_above_that_at_admission_is_not_kept(target, stage):
    """A host adapts to a seed that broke, and does worse still without it: the contribution alone says nothing."""
    helps = {"changes": (-0.25, -0.25), "errors": (0.0625, 0.0625), "spread": 1.0, "degrees": 255}
    probe = probed(**helps)
    now, noise = probe.loss - 0.25, probe.noise(RISE_ERRORS, 0.0625)

    def told(admission, probe=probe, limits=None, **known):
        given = {"stage": stage, "accuracy_change": None, "probe": probe, "watch": Watch(admission_loss=admission)}
        return judge(target, limits or GateThresholds(), **{**given, **known})

    assert answer(told(now), "loss").name == "loss_kept"
    assert answer(told(now - 0.999 * noise), "loss").passed is True
    refused = told(now - 1.001 * noise)
    assert [check.name for check in refused.failed] == ["loss_risen"]
    assert answer(refused, "loss").value == pytest.approx(1.001 * noise)
    # In the unit of the samples' losses; of means alone nobody knows the noise; what is told is asked instead.
    wide = dataclasses.replace(probe, spread=2.0, errors=(0.125, 0.125), changes=(-0.5, -0.5), loss=2 * probe.loss)
    assert answer(told(2 * now - 2.002 * noise, wide), "loss").value == pytest.approx(1.001 * noise)
    assert answer(told(now - 9.0, probed(**{**helps, "errors": None})), "loss").passed is None
    assert answer(told(None), "loss").passed is None
    assert told(now - 9.0, accuracy_change=0.0).passed is True
    assert answer(told(now - 9.0, limits=GateThresholds(max_probe_harm=10.0)), "loss").passed is True


@pytest.mark.parametrize("target, stage", [(Stage.HOLDING, Stage.BLENDING), (Stage.FOSSILIZED, Stage.HOLDING)])
def test_a_seed_that_harms_goes_no_further(target, stage):
    fine = {"stage": stage}
    assert answer(judge(target, **fine, probe=probed()), "harm").name == "seed_harmless"
    for t in ("blend_gain_t", "recent_gain_t"):
        assert judge(target, **fine, **{t: -6.0}).passed is True
        assert "harm" in failed(judge(target, **fine, **{t: math.nextafter(-6.0, -9)}))
    rises = {"changes": (0.1, 0.1), "errors": (0.033, 0.033)}
    assert "seed_harms" in [check.name for check in judge(target, **fine, probe=probed(**rises)).failed]
    # Within the noise, or too small to matter, or of a mean alone, it is no harm.
    for change in ({"errors": (0.034, 0.034)}, {"spread": 101.0}, {"errors": None, "spread": None}):
        probe = probed(**{**rises, **change})
        assert answer(judge(target, **fine, probe=probe), "harm").passed is True
    watched = judge(target, **fine, probe=probed(), watch=Watch(blamed=1))
    assert [check.name for check in watched.failed] == ["seed_harms"]
    assert judge(target, **fine, probe=probed(), watch=Watch()).passed is True
    # A loss that is not finite without the seed proves nothing for it.
    broken = judge(target, **fine, probe=probed(loss=NAN), accuracy_change=None)
    assert "accuracy" in failed(broken)
    assert answer(judge(target, **fine, probe=probed(loss=NAN), blend_gain_t=None), "harm").passed is None
    unasked = GateThresholds().without("max_probe_harm")
    assert "accuracy" in failed(judge(target, unasked, **fine, probe=probed(), accuracy_change=None))
    unknown = judge(target, **fine, blend_gain_t=None)
    assert (answer(unknown, "harm").passed, answer(unknown, "harm").name) == (None, "harm")


def test_no_seed_becomes_permanent_while_nobody_knows_its_blend_gain():
    held = {"stage": Stage.HOLDING}
    assert [c.name for c in judge(Stage.FOSSILIZED, **held, blend_gain_t=None).failed] == ["blend_gain_never_measured"]
    assert [c.name for c in judge(Stage.FOSSILIZED, **held, blend_gain_t=-7.0).failed] == [
        "blend_gain_against", "seed_harms",
    ]  # fmt: skip
    off = GateThresholds().without("max_harm_t")
    assert judge(Stage.FOSSILIZED, off, **held, blend_gain_t=None).passed is True


def test_questions_of_g3_and_g5_can_be_switched_off():
    for target, stage, names in [
        (
            Stage.HOLDING, Stage.BLENDING,
            ("min_blending_epochs", "max_accuracy_drop", "max_sample_age", "max_probe_harm"),
        ),
        (
            Stage.FOSSILIZED, Stage.HOLDING,
            ("min_holding_epochs", "max_accuracy_drop", "max_sample_age", "max_probe_harm", "min_contribution"),
        ),
    ]:  # fmt: skip
        bad = {"stage": stage, "epochs_in_stage": 0, "accuracy_change": -99.0, "age": 1000, "probe": probed(-1.0)}
        assert len(judge(target, **bad).failed) == len(names)
        for name in names:
            assert len(judge(target, GateThresholds().without(name), **bad).failed) == len(names) - 1
        verdict = judge(target, GateThresholds().without(*names), **bad)
        assert verdict.passed is True
        assert sum(check.reason.startswith("not asked") for check in verdict.checks) == len(names) - 1


def test_five_targets_are_guarded_and_any_other_is_an_error():
    guarded = {"GERMINATED": "G0", "TRAINING": "G1", "BLENDING": "G2", "HOLDING": "G3", "FOSSILIZED": "G5"}
    assert {str(stage): str(gate) for stage, gate in GATE_OF.items()} == guarded
    assert {gate.name: gate.value for gate in Gate} == {"G0": 0, "G1": 1, "G2": 2, "G3": 3, "G5": 5}
    for target in (Stage.DORMANT, Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING, 5, None):
        with pytest.raises(ConfigurationError) as caught:
            judge(target)
        for name in guarded:
            assert name in str(caught.value)
        assert str(target) in str(caught.value)


# --- thresholds -------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_original_but_for_two_that_refused_seeds_that_were_ready():
    """Its rise of 1 point refused every second such seed, its ratio of 0.05 a few; see bench/readiness."""
    limits, original = GateThresholds(), GateThresholds.original()
    assert (limits.min_training_improvement, original.min_training_improvement) == (None, 1.0)
    assert (limits.min_gradient_ratio, original.min_gradient_ratio) == (0.01, 0.05)
    assert GateThresholds.original(min_gradient_ratio=0.2).min_gradient_ratio == 0.2
    assert dataclasses.replace(limits, min_training_improvement=1.0, min_gradient_ratio=0.05) == original
    assert limits.max_isolation_violations == 3
    assert limits.min_training_epochs == 3
    assert limits.ratio == "norm"


WHOLE = {
    "max_isolation_violations", "min_training_epochs", "min_samples", "max_sample_age",
    "min_blending_epochs", "min_holding_epochs", "harm_epochs", "lasting_harm_epochs", "max_seed_not_finite",
}  # fmt: skip
SHARES = {
    "max_dropped_share", "min_live_share", "max_plateau_share", "max_vanishing_share", "max_exploding_share",
    "min_health",
}  # fmt: skip
NUMBERS = {
    "min_training_improvement", "min_gradient_ratio", "max_gradient_ratio", "min_displacement", "max_displacement",
    "min_blend_gain_t", "max_accuracy_drop", "min_probe_gain", "max_probe_harm", "min_contribution",
    "min_probed_gain_t", "max_loss_rise", "max_harm_t", "max_pace",
}  # fmt: skip


def test_every_limit_is_of_a_known_kind():
    names = {field.name for field in dataclasses.fields(GateThresholds)}
    assert names == WHOLE | SHARES | NUMBERS | {"ratio", "require_optimizer"}


@pytest.mark.parametrize("name", sorted(WHOLE | SHARES | NUMBERS))
def test_an_impossible_limit_is_refused_at_construction(name):
    bad = [-1, NAN, INF, -INF, True, False, "1", [1], ProgressThreshold(early=0, mid=0, late=0)]
    if name == "min_gradient_ratio":
        bad.pop()
    if name in WHOLE:
        bad += [1.0, 0.5]
    if name in SHARES:
        bad += [math.nextafter(1.0, 2.0), 2]
    if name not in WHOLE:
        bad += [-5e-324]
    for value in bad:
        with pytest.raises(ConfigurationError) as caught:
            GateThresholds(**{name: value})
        assert name in str(caught.value)
        assert repr(value) in str(caught.value)
    for value in [0, 1, None] + [0.5] * (name not in WHOLE) + [1000] * (name not in SHARES):
        assert getattr(GateThresholds(**{name: value}), name) == value


@pytest.mark.parametrize("value", ["cosine", None, 1, True])
def test_an_unknown_ratio_is_refused(value):
    with pytest.raises(ConfigurationError, match="ratio must be one of"):
        GateThresholds(ratio=value)


@pytest.mark.parametrize("value", [1, 0, "yes", 1.0])
def test_require_optimizer_is_yes_or_no(value):
    with pytest.raises(ConfigurationError, match="require_optimizer"):
        GateThresholds(require_optimizer=value)


def test_an_unknown_limit_is_refused():
    with pytest.raises(TypeError, match="min_gradient"):
        GateThresholds(min_gradient=0.1)
    with pytest.raises(TypeError):
        GateThresholds(1.0)


def test_thresholds_and_verdicts_cannot_be_changed():
    for frozen, name in [(GateThresholds(), "ratio"), (judge(), "passed"), (judge().checks[0], "passed")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, True)


def test_without_switches_off_what_it_is_told_and_nothing_else():
    limits = GateThresholds(min_samples=7)
    changed = limits.without("min_blend_gain_t", "min_training_epochs")
    assert changed == GateThresholds(min_samples=7, min_blend_gain_t=None, min_training_epochs=None)
    assert limits == GateThresholds(min_samples=7)
    assert limits.without() == limits
    for name in ("ratio", "min_gradient", "version"):
        with pytest.raises(ConfigurationError, match=repr(name)):
            limits.without("min_samples", name)


def test_the_numbers_of_esper_lite():
    limits = GateThresholds.esper()
    assert limits.min_training_improvement == 0.5
    assert limits.min_training_epochs == 10
    assert limits.min_gradient_ratio == 0.10
    assert limits.ratio == "rms"
    assert limits.min_blending_epochs == 10
    assert limits.max_isolation_violations == 3
    assert GateThresholds.esper(min_training_epochs=2) == dataclasses.replace(limits, min_training_epochs=2)


def test_esper_lite_passes_at_10_epochs_and_a_ratio_of_exactly_0_10():
    limits = GateThresholds.esper()
    at = {"rms_ratio": 0.10, "epochs_in_stage": 10, "improvement": 0.5}
    assert judge(thresholds=limits, **at).passed is True
    assert failed(judge(thresholds=limits, **{**at, "epochs_in_stage": 9})) == ["epochs"]
    assert failed(judge(thresholds=limits, **{**at, "rms_ratio": math.nextafter(0.1, 0)})) == ["gradient_ratio"]


# --- in words ---------------------------------------------------------------------------------------


def test_names_are_words_and_questions_are_asked_once():
    for target in GATE_OF:
        for mode in (STRICT, PERMISSIVE):
            for changes in ({}, {"evidence": None, "improvement": None, "accuracy_change": None}, {"ratio": NAN}):
                for thresholds in (EVERYTHING, NOTHING_ASKED):
                    checks = judge(target, thresholds, mode, **changes).checks
                    questions = [check.question for check in checks]
                    assert len(set(questions)) == len(questions)
                    for word in questions + [check.name for check in checks]:
                        assert word.replace("_", "").isalpha()
                        assert word.islower()


def test_questions_keep_their_names_and_their_order_whatever_the_answer():
    good = [check.question for check in judge().checks]
    for verdict in (judge(evidence=None), judge(thresholds=NOTHING_ASKED), judge(mode=PERMISSIVE, ratio=1e9)):
        assert [check.question for check in verdict.checks] == good


def test_labels_are_those_of_the_original():
    assert answer(judge(ratio=0.01), "gradient_ratio").label == "seed_gradient_low_0.01"
    assert answer(judge(ratio=0.1), "gradient_ratio").label == "seed_gradient_active_0.10"
    assert answer(judge(evidence=None), "gradient_ratio").label == "gradient_never_measured"
    assert Check("q", "in_training", True, "TRAINING").label == "in_training"
    assert Check("q", "seed_in_optimizer", True, True).label == "seed_in_optimizer"


def test_a_refusal_is_one_readable_line():
    line = str(judge(ratio=0.01, displacement=0.0))
    assert "\n" not in line
    assert line.startswith("G2 refused 's' for BLENDING: ")
    assert "weights_not_moved_0.00" in line
    assert "seed_gradient_low_0.01" in line
    assert "at least 0.05" in line
    assert "seed_gradient_bounded" not in line


def test_a_pass_is_one_readable_line():
    line = str(judge(ratio=0.1, thresholds=GateThresholds(min_samples=None)))
    assert line.startswith("G2 passed 's' for BLENDING: ")
    assert "seed_gradient_active_0.10" in line
    assert "samples" not in line.replace("samples_fresh", "")


def test_the_gain_is_told_with_its_samples():
    assert "0.1 over 50 effective samples" in answer(judge(), "blend_gain").reason
    assert "not measured" in answer(judge(blend_gain=None, blend_gain_t=None), "blend_gain").reason
    assert "not measured" in answer(judge(effective_samples=None, blend_gain_t=None), "blend_gain").reason


# --- what is wrong in kind ------------------------------------------------------------------------


@pytest.mark.parametrize("target", [4, "BLENDING", None])
def test_a_target_that_is_no_stage_is_refused(target):
    with pytest.raises(ConfigurationError, match="no gate leads to"):
        QualityGates().judge(target, SeedStatus(seed="s", stage=Stage.TRAINING))


@pytest.mark.parametrize("number", [INF, -INF, math.nan])
@pytest.mark.parametrize("name", ["displacement", "blend_gain_t", "live_share"])
def test_a_number_that_is_not_finite_passes_nothing(name, number):
    assert not judge(**{name: number}).passed


def test_what_fails_several_questions_in_the_same_words_is_said_once():
    line = str(judge(evidence=None))
    assert line.count("call measure()") == 1


def test_an_optimizer_that_is_not_required_is_said_to_be_so():
    check = answer(judge(thresholds=GateThresholds(require_optimizer=False)), "optimizer")
    assert check.reason == "not asked: require_optimizer is False"
