"""Every object survives JSON and ``torch.load(weights_only=True)``, and a state that does not fit is refused."""

import io
import json

import pytest
import torch

from seedtriton.core import Check, GateThresholds, QualityGates, SeedStatus, Verdict
from seedtriton.core.errors import ConfigurationError, StateDictError
from seedtriton.core.evidence import NEVER_MEASURED, Sample, SeedEvidence, collect_evidence
from seedtriton.core.lifecycle import Lifecycle, Stage
from seedtriton.core.schedules import AlphaSchedule, ProgressThreshold


def some_life():
    life = Lifecycle()
    for stage in (Stage.GERMINATED, Stage.TRAINING, Stage.PRUNED):
        life.tick()
        life.move(stage, "a reason, with ümläuts")
    life.tick()
    return life


def some_evidence():
    window = [Sample(4.0, n / 7, 3, 2, 30, 20, 2, n / 3 - 1, n == 5) for n in range(20)]
    return collect_evidence(
        "s", window, parameters=2, age=1, displacement=0.1, in_optimizer=True, optimizer_steps=19
    )


def some_verdict(mode="strict"):
    status = SeedStatus(seed="s", stage=Stage.TRAINING, epochs_in_stage=1, evidence=some_evidence())
    return QualityGates(mode=mode).judge(Stage.BLENDING, status)


PHASES = ProgressThreshold(early=0.01, mid=0.05, late=0.1)
OBJECTS = {
    "thresholds": GateThresholds(min_samples=None, ratio="rms", require_optimizer=False),
    "thresholds_default": GateThresholds(),
    "thresholds_by_progress": GateThresholds(min_gradient_ratio=PHASES),
    "verdict": some_verdict(),
    "verdict_permissive": some_verdict("permissive"),
    "check": Check("gradient_ratio", "seed_gradient_low", False, 0.01, 0.05, "too low"),
    "check_not_asked": Check("shape", "shape_untried", None),
    "evidence": some_evidence(),
    "evidence_empty": SeedEvidence(seed="s"),
    "alpha": AlphaSchedule(target=0.7, start=0.1, steps=30, curve="sigmoid", steepness=3.5),
    "progress": PHASES,
    "gates": QualityGates(GateThresholds(min_gradient_ratio=PHASES), "permissive"),
}


def through_json(state):
    return json.loads(json.dumps(state, allow_nan=False))


def through_torch(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_plain(value):
    assert type(value) in (int, float, bool, str, type(None), list, dict)
    if isinstance(value, dict):
        assert all(type(key) is str for key in value)
        for item in value.values():
            assert_plain(item)
    elif isinstance(value, list):
        for item in value:
            assert_plain(item)


@pytest.mark.parametrize("through", [through_json, through_torch])
@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_comes_back_equal(name, through):
    saved = OBJECTS[name].state_dict()
    assert_plain(saved)
    restored = type(OBJECTS[name]).from_state_dict(through(saved))
    assert restored == OBJECTS[name]
    assert restored.state_dict() == saved
    assert type(restored) is type(OBJECTS[name])


@pytest.mark.parametrize("through", [through_json, through_torch])
def test_a_life_cycle_comes_back_and_goes_on(through):
    life, restored = some_life(), Lifecycle()
    saved = life.state_dict()
    assert_plain(saved)
    restored.load_state_dict(through(saved))
    assert restored.state_dict() == saved
    assert restored.stage is Stage.PRUNED
    for one in (life, restored):
        one.tick()
        one.move(Stage.EMBARGOED, "next")
    assert restored.state_dict() == life.state_dict()


def test_a_restored_verdict_has_real_stages_and_checks():
    restored = Verdict.from_state_dict(through_json(OBJECTS["verdict"].state_dict()))
    assert restored.target is Stage.BLENDING
    assert isinstance(restored.checks, tuple)
    assert [check.question for check in restored.failed] == [check.question for check in OBJECTS["verdict"].failed]
    assert str(restored) == str(OBJECTS["verdict"])


def test_a_restored_threshold_by_progress_still_changes():
    restored = GateThresholds.from_state_dict(through_json(OBJECTS["thresholds_by_progress"].state_dict()))
    assert [restored.min_gradient_ratio(p) for p in (0.0, 0.5, 1.0)] == [0.01, 0.05, 0.1]


def load(name, state):
    if name == "life":
        return Lifecycle().load_state_dict(state)
    return type(OBJECTS[name]).from_state_dict(state)


def saved(name):
    return some_life().state_dict() if name == "life" else OBJECTS[name].state_dict()


@pytest.mark.parametrize("name", ["life", *OBJECTS])
def test_a_state_that_does_not_fit_is_refused_and_named(name):
    for version in (0, 2, "1", None, True):
        with pytest.raises(StateDictError, match=f"version {version!r}.*reads version 1"):
            load(name, {**saved(name), "version": version})
    later = set() if name == "life" else getattr(type(OBJECTS[name]), "LATER", {}).keys()
    for key in saved(name).keys() - {"version"} - later:
        short = saved(name)
        del short[key]
        with pytest.raises(StateDictError, match=rf"missing \['{key}'\]"):
            load(name, short)
    with pytest.raises(StateDictError, match=r"unknown \['surprise'\]"):
        load(name, {**saved(name), "surprise": 1})
    with pytest.raises(StateDictError, match="version None"):
        load(name, {key: value for key, value in saved(name).items() if key != "version"})
    for other, kind in ((None, "NoneType"), ([], "list"), ("state", "str")):
        with pytest.raises(StateDictError, match=f"must be a dict, got {kind}"):
            load(name, other)


def test_thresholds_of_a_release_without_a_question_do_not_ask_it():
    """The first had no upper limit of the displacement, and no watch: its thresholds go on deciding as they did."""
    later = (
        "max_seed_not_finite", "max_displacement", "max_loss_rise", "max_harm_t", "max_pace", "harm_epochs",
        "lasting_harm_epochs",
    )  # fmt: skip
    old = GateThresholds(min_samples=5).state_dict()
    for name in later:
        del old[name]
    restored = GateThresholds.from_state_dict(through_json(old))
    assert restored == GateThresholds(min_samples=5).without(*later)
    assert not old.keys() & set(later)
    gates = {**QualityGates().state_dict(), "thresholds": old}
    assert QualityGates.from_state_dict(gates).thresholds == restored
    assert dict.fromkeys(later) == GateThresholds.LATER


def test_a_curve_of_a_release_that_had_one_sigmoid_is_that_sigmoid():
    old = AlphaSchedule(steps=30, curve="sigmoid").state_dict()
    del old["steepness"]
    assert AlphaSchedule.from_state_dict(through_json(old)) == AlphaSchedule(steps=30, curve="sigmoid", steepness=12.0)


def test_missing_and_unknown_keys_are_told_together():
    state = OBJECTS["progress"].state_dict()
    del state["mid"]
    with pytest.raises(StateDictError, match=r"ProgressThreshold: .*missing \['mid'\] and unknown \['7'\]"):
        ProgressThreshold.from_state_dict({**state, 7: 1})


def test_a_value_that_the_constructor_refuses_is_refused():
    with pytest.raises(ConfigurationError, match="min_samples"):
        GateThresholds.from_state_dict({**GateThresholds().state_dict(), "min_samples": -1})
    with pytest.raises(ConfigurationError, match="'cubic'"):
        AlphaSchedule.from_state_dict({**AlphaSchedule().state_dict(), "curve": "cubic"})
    with pytest.raises(ConfigurationError, match="'fine'"):
        SeedEvidence.from_state_dict({**SeedEvidence(seed="s").state_dict(), "status": "fine"})


def test_a_damaged_threshold_by_progress_is_refused():
    state = OBJECTS["thresholds_by_progress"].state_dict()
    del state["min_gradient_ratio"]["late"]
    with pytest.raises(StateDictError, match=r"ProgressThreshold.*late"):
        GateThresholds.from_state_dict(state)


def test_a_damaged_verdict_is_refused():
    state = OBJECTS["verdict"].state_dict()
    for changes in ({"gate": "G4"}, {"checks": "none"}, {"checks": [{"version": 1}]}, {"checks": [None]}):
        with pytest.raises(StateDictError):
            Verdict.from_state_dict({**state, **changes})


@pytest.mark.parametrize("changes", [{"target": "GROWING"}, {"target": []}, {"gate": []}], ids=str)
def test_an_unknown_stage_or_gate_in_a_verdict_is_a_state_that_does_not_fit(changes):
    with pytest.raises(StateDictError):
        Verdict.from_state_dict({**OBJECTS["verdict"].state_dict(), **changes})


DAMAGED = [
    {"version": 2},
    {"stage": "GROWING"},
    {"stage": 3},
    {"stage": "5"},
    {"stage": None},
    {"stage": []},
    {"epochs_in_stage": -1},
    {"epochs_in_stage": 1.0},
    {"epochs_in_stage": True},
    {"epochs_in_stage": 5},
    {"epochs_total": "4"},
    {"epochs_total": None},
    {"history": None},
    {"history": {}},
    {"history": [1]},
    {"history": [{"source": "DORMANT"}]},
    {"history": [{**some_life().history[0], "surprise": 1}]},
    {"history": [some_life().history[0]] * 101},
    {"surprise": 1},
]


@pytest.mark.parametrize("changes", DAMAGED, ids=[str(changes)[:40] for changes in DAMAGED])
def test_a_life_cycle_is_unchanged_after_a_refused_load(changes):
    life = some_life()
    before, history = life.state_dict(), life.history
    with pytest.raises(StateDictError):
        life.load_state_dict({**Lifecycle().state_dict(), "epochs_total": 4, **changes})
    assert life.state_dict() == before
    assert life.history is history


def test_epochs_at_their_bounds_and_a_full_history_are_loaded():
    life = Lifecycle()
    entry = some_life().history[0]
    life.load_state_dict({**life.state_dict(), "epochs_in_stage": 4, "epochs_total": 4, "history": [entry] * 100})
    assert (life.epochs_in_stage, life.epochs_total, len(life.history)) == (4, 4, 100)


def test_loading_takes_a_copy():
    state = some_life().state_dict()
    life = Lifecycle()
    life.load_state_dict(state)
    state["history"][0]["reason"] = "changed"
    state["history"].clear()
    assert life.state_dict() == some_life().state_dict()


def test_a_saved_threshold_by_progress_can_be_changed_without_changing_the_original():
    state = OBJECTS["thresholds_by_progress"].state_dict()
    state["min_gradient_ratio"]["early"] = 9.0
    assert OBJECTS["thresholds_by_progress"].min_gradient_ratio.early == 0.01


def test_the_empty_evidence_says_never_measured_after_a_round_trip():
    restored = SeedEvidence.from_state_dict(through_json(SeedEvidence(seed="s").state_dict()))
    assert restored.status == NEVER_MEASURED
    assert restored.ratio is None
