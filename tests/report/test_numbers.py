"""The numbers of events, verdicts and evidence by names that stay."""

import json
import math

from scripts import blending

import seedtriton.report.events as events
from seedtriton import Check, SeedEvidence, Stage
from seedtriton.core.probe import BlendProbe
from seedtriton.report.events import local_numbers, numbers, step_of

KNOWN = {
    "ratio", "rms_ratio", "host_norm", "seed_norm", "blend_gain", "blend_gain_t", "samples", "dropped",
    "seed_not_finite", "displacement", "live_share", "vanishing_share", "exploding_share", "health", "plateau_share",
}  # fmt: skip


def test_a_name_says_slot_and_number():
    where = {"event": "epoch", "epoch": 2, "step": 9, "stage": "TRAINING"}
    assert numbers({**where, "seed": "block2", "ratio": 0.5}) == {
        "growth/block2/stage": 3.0, "growth/block2/ratio": 0.5,
    }  # fmt: skip
    assert numbers({**where, "seed": None, "stage": None, "accuracy": 1}) == {"growth/accuracy": 1.0}


def test_what_is_no_number_or_unknown_is_left_out_and_nan_stays():
    found = local_numbers({
        "event": "epoch", "seed": "s", "epoch": 1, "step": 2, "stage": "unheard of", "none": None, "word": "x",
        "list": [1], "yes": True, "no": False, "nan": math.nan, "inf": -math.inf, "whole": 3,
    })  # fmt: skip
    assert math.isnan(found.pop("nan"))
    assert found == {"yes": 1.0, "no": 0.0, "inf": -math.inf, "whole": 3.0}
    assert {type(value) for value in found.values()} == {float}


def test_a_gate_says_what_it_measured_for_each_question():
    checks = [{"question": "blend_gain", "value": 2.5}, {"question": "optimizer", "value": True},
              {"question": "health", "value": None}, {"question": "measured", "value": "never"}]  # fmt: skip
    gate = {"event": "gate", "seed": "s", "stage": "HOLDING", "gate": "G5", "target": "FOSSILIZED", "passed": False}
    assert local_numbers({**gate, "checks": checks, "ratio": 0.1}) == {
        "stage": float(Stage.HOLDING), "ratio": 0.1, "G5/passed": 0.0, "G5/blend_gain": 2.5, "G5/optimizer": 1.0,
    }  # fmt: skip


def test_fields_of_other_events_go_by_the_event():
    assert local_numbers({"event": "narrowed", "seed": "s", "rho": 0.1, "before": 0.2, "passed": True}) == {
        "narrowed/rho": 0.1, "narrowed/before": 0.2, "narrowed/passed": 1.0,
    }  # fmt: skip


def test_an_event_without_a_step_belongs_to_the_first():
    assert [step_of({"event": "x"}), step_of({"step": None}), step_of({"step": 7})] == [0, 0, 7]


def test_every_event_of_a_life_has_numbers_that_loggers_can_draw():
    script = blending()
    script.growth.prune("early")
    script.epoch()
    names = {name for event in script.events for name in numbers(event)}
    assert {f"growth/early/{name}" for name in KNOWN} <= names
    assert {"growth/accuracy", "growth/early/alpha", "growth/early/stage", "growth/early/G2/passed"} <= names
    assert "growth/early/G2/gradient_ratio" in names
    assert "growth/early/germinated/parameters" in names
    assert not [name for name in names if name.endswith(("/epoch", "/step"))]
    assert {name.split("/")[1] for name in names} == {"early", "accuracy"}
    stages = [numbers(event)["growth/early/stage"] for event in script.events if event["seed"]]
    assert {Stage.TRAINING, Stage.BLENDING, Stage.PRUNED, Stage.EMBARGOED} <= set(stages)
    assert events.COORDINATES == ("event", "seed", "epoch", "step", "stage")


# --- as_dict ---


def test_evidence_as_a_dict_has_every_field_by_name():
    evidence = SeedEvidence(seed="s", ratio=math.inf, blend_gain_t=2.0, samples=3, frozen=True)
    found = evidence.as_dict()
    assert found.keys() == vars(evidence).keys()
    assert found["ratio"] is None
    assert (found["seed"], found["blend_gain_t"], found["samples"], found["frozen"]) == ("s", 2.0, 3, True)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "version" not in found


def test_a_check_as_a_dict_has_its_fields():
    check = Check("probe_harm", "blend_would_harm", False, math.nan, 0.5, "the loss is not finite")
    assert check.as_dict() == {
        "question": "probe_harm", "name": "blend_would_harm", "passed": False, "value": None, "limit": 0.5,
        "reason": "the loss is not finite",
    }  # fmt: skip


def test_a_verdict_as_a_dict_has_names_instead_of_numbers_and_its_checks():
    script = blending()
    [verdict] = script.epoch()
    found = verdict.as_dict()
    assert list(found) == ["gate", "target", "seed", "passed", "checks", "mode"]
    assert (found["gate"], found["target"], found["seed"], found["mode"]) == ("G3", "HOLDING", "early", "strict")
    assert found["passed"] is verdict.passed
    assert found["checks"] == [check.as_dict() for check in verdict.checks]
    assert len(found["checks"]) > 3
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_tuples_are_lists_at_every_depth():
    probe = BlendProbe(seed="s", loss=1.0, alphas=(0.1, 1.0), changes=(-0.5, math.nan))
    assert probe.as_dict()["changes"] == [-0.5, None]
    assert json.loads(json.dumps(probe.as_dict(), allow_nan=False)) == probe.as_dict()
