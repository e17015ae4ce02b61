"""From BLENDING to FOSSILIZED every epoch asks whether the seed harms, and something is done about one that does."""

import dataclasses

import numpy
import pytest
import torch
from networks import Residual
from scripts import Script, blending
from torch import nn

from seedtriton import (
    AlphaSchedule,
    BlendProbe,
    ConfigurationError,
    GateThresholds,
    Stage,
    StraightThrough,
    TrustRegion,
)
from seedtriton.core.evidence import SeedEvidence
from seedtriton.core.harm import Watch, pace_of
from seedtriton.growth.life import usual_change

FELT = (Stage.BLENDING, Stage.HOLDING)


class Epochs(Script):
    """The script with epochs of 64 steps, and what it tells at the end of one chosen by ``told``."""

    def __init__(self, told="accuracy", **options):
        self.evaluations = 0
        if options.pop("evaluate", False):
            options["evaluate"] = self.losses
        super().__init__(schedule=AlphaSchedule(steps=64), **options)
        self.told = told
        self.held = torch.randn(512, 8)
        teacher = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
        self.y, self.labels = teacher(self.x).argmax(dim=1), teacher(self.held).argmax(dim=1)

    def losses(self, model):
        self.evaluations += 1
        with torch.no_grad():
            return nn.functional.cross_entropy(model(self.held), self.labels, reduction="none")

    def epoch(self):
        for _ in range(4):
            for batch in torch.randperm(len(self.x), generator=self.generator).split(32):
                nn.functional.cross_entropy(self.model(self.x[batch]), self.y[batch]).backward()
                self.growth.measure()
                self.optimizer.step()
                self.optimizer.zero_grad()
        with torch.no_grad():
            output = self.model(self.held)
            told = {
                "accuracy": float((output.argmax(dim=1) == self.labels).double().mean()),
                "loss": float(nn.functional.cross_entropy(output, self.labels)),
            }
        return self.growth.end_epoch(**{name: told[name] for name in (self.told,) if name})

    def until(self, *stages, most=40):
        """Epochs until the slot is in one of ``stages``; how many."""
        for count in range(most):
            if self.slot.stage in stages:
                return count
            self.epoch()
        return most

    @property
    def slot(self):
        return self.growth.slots["early"]

    def grow(self):
        self.epochs(1)
        self.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
        self.until(Stage.BLENDING)
        return self


def spoil(script):
    """From now on the seed puts out nothing, and takes the host's features with it as far as it is blended in."""
    script.slot.seed.register_forward_hook(lambda module, given, output: 0.0 * output)


@pytest.mark.parametrize("told, evaluate", [("loss", False), ("accuracy", False), (None, True), ("loss", True)])
def test_a_good_seed_becomes_permanent_by_each_way_to_know_how_the_model_does(told, evaluate):
    script = Epochs(told, evaluate=evaluate).grow()
    assert script.until(Stage.FOSSILIZED, Stage.PRUNED) < 20
    assert script.slot.stage is Stage.FOSSILIZED
    assert not script.of("harm")
    g5 = script.of("gate")[-1]
    answers = {check["question"]: check for check in g5["checks"]}
    assert (g5["gate"], answers["blend_gain"]["name"], answers["harm"]["passed"]) == ("G5", "blend_gain_agrees", True)


def test_without_any_way_to_know_it_the_refusal_names_the_three():
    script = Epochs(None).grow()
    script.epochs(6)
    assert script.slot.stage is Stage.BLENDING
    (refused,) = [c for c in script.epoch()[0].failed if c.question == "accuracy"]
    for way in ("end_epoch(accuracy=...)", "end_epoch(loss=...)", "evaluate="):
        assert way in refused.reason


@pytest.mark.parametrize("stage", FELT, ids=str)
@pytest.mark.parametrize("told, evaluate", [("loss", False), ("accuracy", False), (None, True)])
def test_a_seed_that_goes_wrong_after_it_passed_is_faded_out_within_five_epochs(stage, told, evaluate):
    # Nobody but the watch may keep it from becoming permanent.
    thresholds = GateThresholds(max_accuracy_drop=100.0, max_loss_rise=1e9, min_holding_epochs=99)
    script = Epochs(told, evaluate=evaluate, thresholds=thresholds).grow()
    script.until(stage)
    if stage is Stage.BLENDING:
        script.epoch()
    spoil(script)
    assert script.until(Stage.PRUNED) <= 5
    (event,) = script.of("harm")
    assert (event["seed"], event["action"]) == ("early", "fade")
    assert event["reason"].startswith("harm in 2 epochs in a row: ")
    (pruned,) = script.of("pruned")
    assert (pruned["reason"], pruned["initiator"]) == (event["reason"], "watch")
    (scheduled,) = script.of("prune_scheduled")
    assert 0 < scheduled["steps"] <= 64
    # Once it is out, nothing of it is left.
    assert script.growth.monitor.seeds == ()
    assert script.slot.seed is None


def test_halt_stops_alpha_where_it_is_and_report_tells_only():
    thresholds = GateThresholds(max_accuracy_drop=100.0)
    for action in ("halt", "report"):
        script = Epochs("accuracy", thresholds=thresholds, on_harm=action)
        script.growth.schedule = AlphaSchedule(steps=64 * 8)
        script.grow().epochs(2)
        spoil(script)
        script.epochs(4)
        event = script.of("harm")[0]
        now = script.slot.alpha_value
        assert (event["action"], script.slot.stage) == (action, Stage.BLENDING)
        assert (now == event["alpha"]) if action == "halt" else (now > event["alpha"] > 0.0)
        # Neither takes it out, nor lets it go on.
        assert not script.of("prune_scheduled")
        assert "seed_harms" in {check.name for check in script.growth.advance("early").failed}


@pytest.mark.parametrize("limits, acts", [
    ({"harm_epochs": None, "lasting_harm_epochs": None}, None), ({"harm_epochs": 3}, 3), ({"max_harm_t": None}, None),
], ids=str)  # fmt: skip
def test_when_the_watch_acts_is_for_the_thresholds_to_say(limits, acts):
    script = Epochs("accuracy", thresholds=GateThresholds(max_accuracy_drop=100.0, min_holding_epochs=99, **limits))
    script.grow().until(Stage.HOLDING)
    spoil(script)
    script.epochs(4)
    assert [event["reason"][:16] for event in script.of("harm")] == ([] if acts is None else [f"harm in {acts} epochs"])


def test_harm_that_lasts_is_acted_on_below_the_loss_at_admission_too():
    script = Epochs(None, evaluate=True, thresholds=GateThresholds(min_holding_epochs=99, lasting_harm_epochs=3))
    script.grow().until(Stage.HOLDING)
    noise = torch.linspace(-0.1, 0.1, 64)
    script.growth.evaluate = lambda twin: noise + 0.1 * twin.early.alpha_value
    script.epochs(2)
    assert not script.of("harm")
    script.epochs(1)
    assert script.of("harm")[0]["reason"] == "harm in 3 epochs in a row: the validation loss is higher with it"


@pytest.mark.parametrize("limit", [5.0, None])
def test_a_seed_that_runs_away_once_it_is_felt_is_taken_out(limit):
    """The host goes along with it and is worse without it, so that neither probe nor loss says anything."""
    script = Epochs("loss", thresholds=GateThresholds(max_pace=limit, max_loss_rise=1e9, min_holding_epochs=99))
    script.growth.schedule = AlphaSchedule(steps=64 * 6)
    script.grow().epochs(1)
    assert not script.of("harm")
    group = script.optimizer.param_groups[-1]
    group["lr"] *= 100.0
    script.epochs(4)
    words = {event["reason"] for event in script.of("harm")}
    assert any("its weights move much faster than behind the host" in reason for reason in words) == (limit is not None)


def test_an_unknown_action_is_refused():
    with pytest.raises(ConfigurationError, match=r"\['fade', 'halt', 'report'\], got 'prune'"):
        Script(on_harm="prune")


def test_a_seed_that_puts_out_nan_is_taken_out_at_once():
    """Of a NaN no share is small enough to fade."""
    script = Epochs(None, evaluate=True, thresholds=GateThresholds(min_holding_epochs=99)).grow()
    script.until(Stage.HOLDING)
    growth, place = script.growth, script.slot
    broken = place.seed.contract.bias
    for _ in range(2):
        with torch.no_grad():
            broken.fill_(float("nan"))
        growth.end_epoch()
    assert place.stage is Stage.PRUNED
    assert not script.of("prune_scheduled")
    assert "loss is higher with it" in script.of("pruned")[0]["reason"]


def test_a_seed_on_its_way_out_that_is_kept_begins_a_new_count():
    script = Epochs("accuracy", thresholds=GateThresholds(max_accuracy_drop=100.0, min_holding_epochs=99)).grow()
    script.until(Stage.HOLDING)
    spoil(script)
    script.epochs(2)
    assert script.of("harm")
    pace = script.growth._lives["early"].watch.pace
    script.growth.set_alpha_target("early", 0.9)
    assert script.growth._lives["early"].watch == Watch(pace=pace)
    script.epoch()
    assert len(script.of("harm")) == 1


def test_a_watch_goes_on_where_it_was_saved():
    script = Epochs("loss", thresholds=GateThresholds(max_loss_rise=1e9, min_holding_epochs=99)).grow()
    script.until(Stage.HOLDING)
    spoil(script)
    script.epoch()
    assert script.growth._position.epoch_steps == 64
    assert script.growth._lives["early"].watch.sloped == 1
    saved = script.growth.state_dict()
    again = Epochs("loss")
    again.growth.load_state_dict(saved, seeds={"early": Residual(6, 16)})
    assert again.growth._lives["early"].watch == script.growth._lives["early"].watch
    assert again.growth._position.losses == script.growth._position.losses != []
    assert again.growth._position.loss == script.growth._position.loss is not None
    assert again.growth.state_dict()["lives"] == saved["lives"]


def test_of_two_seeds_that_are_felt_the_one_that_harms_is_taken_out_and_the_other_stays():
    """slot1 was pruned with slot0, because the model did worse and its own t was a little below zero."""
    thresholds = GateThresholds(max_accuracy_drop=100.0, max_loss_rise=1e9, min_holding_epochs=99)
    for random_seed in range(2):
        script = Epochs(None, evaluate=True, thresholds=thresholds)
        torch.manual_seed(random_seed)
        for name in ("early", "late"):
            script.growth.germinate(name, Residual(6, 16), probe=torch.randn(2, 6))
        for _ in range(30):
            script.epoch()
            if all(slot.stage is Stage.HOLDING for slot in script.growth.slots.values()):
                break
        spoil(script)
        script.epochs(5)
        assert [event["seed"] for event in script.of("harm")] == ["early"]
        assert script.growth.slots["late"].stage is Stage.HOLDING


def test_a_sink_may_take_the_seed_out_itself():
    script = Epochs("accuracy", on_harm="report", thresholds=GateThresholds(max_accuracy_drop=100.0))
    script.growth.telemetry.sinks.append(
        lambda event: script.growth.prune(event["seed"]) if event["event"] == "harm" else None
    )
    script.grow()
    script.until(Stage.HOLDING)
    spoil(script)
    script.epochs(3)
    assert script.slot.stage > Stage.FOSSILIZED
    assert script.of("pruned")[0]["initiator"] == "script"


def test_a_fade_takes_two_of_the_last_epochs_however_long_the_first_ones_were():
    script = Epochs("accuracy", thresholds=GateThresholds(max_accuracy_drop=100.0, min_holding_epochs=99))
    script.growth.schedule = AlphaSchedule(steps=400)
    script.growth._position.step = script.growth._position.epoch_began = 100_000
    script.grow()
    script.epochs(2)
    spoil(script)
    assert script.until(Stage.PRUNED) <= 6
    assert script.of("prune_scheduled")[0]["steps"] == 128


def test_an_epoch_is_counted_for_every_seed_when_the_validation_fails():
    script = Epochs("loss")
    for name in ("early", "late"):
        script.growth.germinate(name, Residual(6, 16), probe=torch.randn(2, 6))
    script.epoch()

    def fail(model):
        raise RuntimeError("no data")

    script.growth.evaluate = fail
    for life in script.growth._lives.values():
        script.growth._mover.move(life, Stage.BLENDING, "now", "script")
    with pytest.raises(RuntimeError, match="no data"):
        script.epoch()
    assert [slot.lifecycle.epochs_in_stage for slot in script.growth.slots.values()] == [1, 1]


# --- one look -----------------------------------------------------------------------------------------------

LIMITS = GateThresholds()


def known(t=0.0, recent=None):
    return SeedEvidence(seed="s", blend_gain_t=t, recent_gain_t=recent)


def at_present(change, loss=1.0, error=0.0, **changes):
    more = {"errors": (error,), "spread": 1.0} | changes
    return BlendProbe(seed="s", loss=loss, alphas=(0.3,), changes=(change,), **more)


def looks(*found, admission=1.0, limits=LIMITS):
    """Which of a series of looks act; each is a blend gain's t, a probe, or both."""
    watch, acted = Watch(admission_loss=admission), []
    for t, probe in found:
        watch = watch.look(known(t), probe, limits)
        acted.append(watch.harm(limits) is not None)
    return acted


def test_harm_has_to_come_in_two_epochs_in_a_row():
    bad, good = (-7.0, None), (-6.0, None)
    assert looks(bad, bad) == [False, True]
    assert looks(bad, good, bad, bad) == [False, False, False, True]
    assert looks(bad, bad, bad, limits=GateThresholds(harm_epochs=3)) == [False, False, True]
    for off in ("harm_epochs", "max_harm_t"):
        assert not any(looks(*[bad] * 9, limits=LIMITS.without(off)))
    assert Watch().look(known(0.0, -7.0), None, LIMITS).sloped == 1
    assert Watch(sloped=1).look(known(None), None, LIMITS).sloped == 0


def test_harm_by_the_probe_counts_above_the_loss_at_admission_or_when_it_lasts():
    above, below = (0.0, at_present(0.1)), (0.0, at_present(0.1, loss=0.5))
    assert looks(above, above) == [False, True]
    assert looks(*[below] * 7) == [False] * 5 + [True, True]
    assert looks(above, below, above, below, below, below) == [False] * 5 + [True]
    assert not any(looks(*[below] * 9, limits=LIMITS.without("lasting_harm_epochs")))
    # The first look at a seed that was let in without a probe says where it began.
    assert looks(above, above, admission=None) == [False, True]
    assert looks((0.0, at_present(0.1, loss=2.0)), below, below, admission=None) == [False] * 3


@pytest.mark.parametrize("change, error, more, harms", [
    (0.1, 0.033, {}, True), (0.1, 0.034, {}, False),
    (0.0011, 0.0, {}, True), (0.0009, 0.0, {}, False), (0.0011, 0.0, {"spread": 2.0}, False),
    (float("nan"), 0.0, {}, True), (float("inf"), 0.0, {}, True), (0.1, 0.0, {"loss": float("nan")}, False),
])  # fmt: skip
def test_what_is_harm_by_the_probe(change, error, more, harms):
    look = (0.0, at_present(change, error=error, **more))
    assert looks(look, look) == [False, harms]


def test_a_seed_runs_away_by_the_pace_of_its_weights_and_a_blend_gain_that_does_not_speak_for_it():
    def moved(displacement, steps=100, t=-0.1):
        return dataclasses.replace(known(t), displacement=displacement, optimizer_steps=steps)

    slow = Watch().behind(moved(0.5)).behind(moved(0.6, 400))
    assert slow.pace == pytest.approx(0.05), "the most of any epoch; far in many steps is not fast"
    assert [Watch().behind(moved(*told)).pace for told in ((None, 9), (0.0, 9), (0.6, 0), (0.6, None))] == [None] * 4
    assert slow.behind(moved(float("inf"))) == slow.behind(moved(float("nan"))) == slow

    def runaway(*found, watch=slow, limits=LIMITS):
        return watch.look(moved(*found), None, limits).runaway

    assert [runaway(d) for d in (2.4, 2.6, None, float("nan"))] == [0, 1, 0, 1]
    assert [runaway(2.6, steps) for steps in (0, None, 99, 121)] == [0, 0, 1, 0]
    assert [runaway(1.0, 9), runaway(1.1, 9)] == [0, 1], "as fast, and yet nowhere"
    assert [runaway(9.0, 100, t) for t in (0.1, 0.0, -9.0, None)] == [0, 1, 1, 0]
    assert runaway(9.0, watch=Watch()) == runaway(9.0, limits=LIMITS.without("max_pace")) == 0
    assert slow.begun_anew().pace == slow.admitted(2.0).pace == slow.pace
    assert slow.admitted(2.0).admission_loss == 2.0
    once = dataclasses.replace(slow, runaway=1)
    assert once.suspicion is not None
    assert once.harm(LIMITS) is None
    assert "move much faster" in dataclasses.replace(slow, runaway=2).harm(LIMITS)
    with pytest.raises(ConfigurationError, match="pace must be a finite number or None, got nan"):
        Watch(pace=float("nan"))


def test_a_seed_that_the_probe_lets_in_keeps_its_pace_also_through_a_state():
    script = Epochs(None, evaluate=True).grow()
    watch = script.growth._lives["early"].watch
    assert watch.pace > 0.0
    assert watch.admission_loss is not None
    saved = script.growth.state_dict()
    again = Epochs(None, evaluate=True)
    again.growth.load_state_dict(saved, seeds={"early": Residual(6, 16)}, check_weights=False)
    assert again.growth._lives["early"].watch == watch


@pytest.mark.parametrize("training", [3, 24])
def test_a_seed_that_trained_for_long_or_whose_window_began_anew_has_not_run_away(training):
    """What it moves by in its first epoch of blending is as much as in its first of all."""
    limits = GateThresholds(min_training_epochs=training, max_loss_rise=1e9, min_holding_epochs=99, max_harm_t=None)
    script = Epochs("loss", thresholds=limits)
    script.growth.schedule = AlphaSchedule(steps=64 * 6)
    script.epochs(1)
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    script.epochs(training - 1)
    script.growth.monitor.reset("early")
    script.until(Stage.BLENDING)
    watch, fastest = script.growth._lives["early"].watch, 0.0
    for _ in range(4):
        script.epoch()
        fastest = max(fastest, pace_of(script.growth.monitor.read()["early"]))
    assert fastest < 2.5 * watch.pace
    assert not script.of("harm")


def test_a_watch_that_was_saved_without_a_pace_is_read():
    state = Watch(admission_loss=1.0, sloped=1).state_dict()
    del state["pace"], state["runaway"]
    assert Watch.from_state_dict(state) == Watch(admission_loss=1.0, sloped=1)


def test_a_model_that_does_worse_is_held_against_a_seed_that_its_blend_gain_blames():
    def blamed(t, lost=False, probe=None):
        return Watch(admission_loss=1.0).look(known(t), probe, LIMITS, lost=lost).blamed

    known_well = {"loss": 1.5, "degrees": 10**6}
    worse, noisy = at_present(-0.1, error=0.13, **known_well), at_present(-0.1, error=0.14, **known_well)
    assert [blamed(t, lost=True) for t in (-3.1, -3.0, None)] == [1, 0, 0]
    assert [blamed(-4.0, probe=probe) for probe in (None, worse, noisy)] == [0, 1, 0]
    assert looks((-4.0, worse), (-4.0, worse)) == [False, True]
    assert "blames it" in Watch(blamed=2).harm(LIMITS)
    assert not any(looks(*[(-4.0, worse)] * 3, limits=LIMITS.without("max_harm_t")))
    # Another seed is to blame sooner.
    assert Watch(admission_loss=1.0).look(known(-4.0), worse, LIMITS, lost=True, alone=False).blamed == 0
    # The host has moved since, by no more than the validation set can tell.
    few = at_present(-0.1, loss=1.5, degrees=35)
    assert blamed(-4.0, probe=few) == 0
    assert blamed(-4.0, probe=at_present(-0.1, loss=1.5, degrees=99)) == 1


def test_what_the_watch_found_once_is_enough_not_to_go_on():
    """Of a mean that rises, and of a model that does worse, the gates knew nothing: such a seed became permanent."""
    for counts in ({"above": 1}, {"lasting": 1}, {"sloped": 1}, {"blamed": 1}):
        watch = Watch(admission_loss=1.0, **counts)
        assert watch.suspicion is not None
        assert watch.harm(LIMITS) is None
    assert Watch(admission_loss=1.0).suspicion is None


def test_no_loss_that_is_not_finite_is_where_a_seed_began():
    broken = at_present(0.1, loss=float("nan"))
    watch = Watch().look(known(), broken, LIMITS)
    assert watch == Watch()
    assert watch.look(known(), at_present(0.1, loss=2.0), LIMITS).admission_loss == 2.0


def test_a_harm_that_is_not_asked_is_not_counted_either():
    off = LIMITS.without("max_probe_harm")
    for more in ({}, {"errors": None, "spread": None}):
        assert not any(looks(*[(0.0, at_present(0.5, loss=9.0, **more))] * 9, limits=off))


def test_a_loss_that_the_script_tells_of_is_held_against_the_seed_as_well():
    script = Epochs("loss", thresholds=GateThresholds(max_harm_t=1e9, min_holding_epochs=99)).grow()
    script.until(Stage.HOLDING)
    spoil(script)
    script.epochs(2)
    assert "blames it" in script.of("harm")[0]["reason"]


def test_of_a_mean_without_noise_only_what_lasts_above_admission_is_harm():
    mean = {"errors": None, "spread": None}
    above, below = (0.0, at_present(0.1, **mean)), (0.0, at_present(0.1, loss=0.5, **mean))
    assert looks(*[above] * 6) == [False] * 5 + [True]
    assert not any(looks(*[below] * 9))
    assert not any(looks(*[(0.0, at_present(-0.1, loss=3.0, **mean))] * 9))


def test_a_watch_is_checked_when_it_is_restored():
    watch = Watch(admission_loss=0.5, above=1, lasting=2, sloped=3, blamed=4)
    assert Watch.from_state_dict(watch.state_dict()) == watch
    for damage in ({"above": -1}, {"lasting": 1.0}, {"sloped": True}, {"admission_loss": "low"}):
        with pytest.raises(ConfigurationError, match="Watch"):
            Watch.from_state_dict({**watch.state_dict(), **damage})


# --- what a probe costs -------------------------------------------------------------------------------------


def test_a_seed_that_the_probe_refuses_is_not_probed_in_every_epoch():
    thresholds = GateThresholds(min_probe_gain=1e6)
    script = Epochs("accuracy", evaluate=True, thresholds=thresholds)
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    probed = []
    for _ in range(16):
        before = script.evaluations
        (verdict,) = script.epoch()
        probed.append(script.evaluations - before)
        failed = {check.name for check in verdict.failed}
        if 4 in probed:
            assert "blend_lowers_no_loss" in failed if probed[-1] else failed == {"probe_not_due"}
    first = probed.index(4)
    asked = [epoch - first for epoch, passes in enumerate(probed) if passes]
    assert set(probed) == {0, 4}
    assert asked == [gap for gap in (0, 1, *range(3, 16, 2)) if gap + first < 16]
    # The script may ask at any time, and a new look counts.
    before = script.evaluations
    assert "blend_lowers_no_loss" in [check.name for check in script.growth.advance("early").failed]
    assert script.evaluations == before + 4


def test_a_felt_seed_costs_two_passes_an_epoch():
    script = Epochs(None, evaluate=True, thresholds=GateThresholds(min_holding_epochs=99)).grow()
    before = script.evaluations
    script.epochs(4)
    assert script.slot.stage is Stage.HOLDING
    assert script.evaluations == before + 8


# --- the right way, too far ---------------------------------------------------------------------------------


def overshooting(isolation=None, harm=1.0, **options):
    """A healthy seed of which the probe says that ``harm`` times its alpha is lost."""
    script = Epochs("accuracy", **options)
    noise = torch.linspace(-1.0, 1.0, 64)
    script.growth.evaluate = lambda twin: 2.0 + noise + harm * twin.early.alpha_value
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6), isolation=isolation)
    return script


def test_a_seed_that_goes_the_right_way_too_far_trains_on_in_a_smaller_trust_region():
    script = overshooting()
    script.epochs(12)
    told = [(event["before"], event["rho"]) for event in script.of("narrowed")]
    assert told == [(0.2, 0.1), (0.1, 0.05), (0.05, 0.025), (0.025, 0.0125)]
    assert script.slot.isolation == TrustRegion(0.0125)
    assert script.slot.stage is Stage.TRAINING
    # What the gradients say and the probe denies is told, and that nothing but the probe refused.
    told = next(event for event in script.of("gate") if any(c["name"] == "blend_would_harm" for c in event["checks"]))
    answers = {check["question"]: check for check in told["checks"]}
    assert answers["modes"]["name"] == "training_and_evaluation_disagree"
    assert "by its gradients alone it would have passed" in answers["probe_harm"]["reason"]
    # Once the probe has nothing against it, it is let in.
    script.growth.evaluate = lambda twin: 2.0 + torch.linspace(-1.0, 1.0, 64) - 0.5 * twin.early.alpha_value
    assert script.until(Stage.BLENDING) <= 5


@pytest.mark.parametrize("isolation", [
    TrustRegion(0.2, least=0.2), TrustRegion(0.01), TrustRegion(0.2, "norm"), StraightThrough(),
], ids=str)  # fmt: skip
def test_no_other_way_to_train_is_changed(isolation):
    script = overshooting(isolation)
    script.epochs(4)
    assert not script.of("narrowed")
    assert script.slot.isolation == isolation


def test_only_a_certain_gain_and_harm_at_once_are_overshooting():
    for options in ({"harm": -1.0}, {"thresholds": GateThresholds(min_blend_gain_t=1e3)}):
        script = overshooting(**options, auto_advance=())
        script.growth.advance("early")
        script.epochs(4)
        assert not script.of("narrowed")


def test_only_a_refusal_by_the_probe_alone_makes_the_gate_wait():
    script = Epochs("accuracy", evaluate=True, thresholds=GateThresholds(min_probed_gain_t=1e6))
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    life = script.growth._lives["early"]
    script.epochs(8)
    assert (life.probe is not None, life.probe_refusals) == (True, 0)
    # Nor does a script that asks again and again.
    script = overshooting(TrustRegion(0.2, least=0.2))
    while not script.growth._lives["early"].probe_refusals:
        script.epoch()
    before = script.growth._lives["early"].probe_due
    for _ in range(3):
        script.growth.advance("early")
    assert (script.growth._lives["early"].probe_refusals, script.growth._lives["early"].probe_due) == (1, before)


# --- a told loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["accuracy", "loss"])
def test_what_is_told_from_blending_on_begins_there(told):
    """It was never enough: G3 refused for ever, and asked for what it was told in every epoch."""
    script = Epochs(None, thresholds=GateThresholds(min_holding_epochs=1)).grow()
    script.told = told
    assert script.until(Stage.FOSSILIZED) < 20
    assert script.slot.stage is Stage.FOSSILIZED


def test_what_is_usual_is_known_of_losses_of_any_size():
    """Squares of 1e200 raised, half-way into BLENDING."""
    assert usual_change([1.0, 1e200, 1.0]) == pytest.approx(1e200)
    assert usual_change([1e308, -1e308, 1e308]) is None
    assert usual_change([1.0, 2.0]) is None
    assert usual_change([3.0, 0.0, 4.0]) == pytest.approx((12.5) ** 0.5)


def told_losses(before, after):
    """The verdict of G3 on a seed that is blended between these losses."""
    script = Script(schedule=AlphaSchedule(steps=0), auto_advance=())
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    script.growth.advance("early")
    told = iter([*before, *after])
    script.growth.end_epoch, end = (lambda accuracy: end(loss=next(told))), script.growth.end_epoch
    script.epochs(len(before))
    script.growth._mover.move(script.growth._lives["early"], Stage.BLENDING, "now", "script")
    return [script.epoch()[0] for _ in after][-1]


@pytest.mark.parametrize("factor, offset", [(1.0, 0.0), (1e3, 0.0), (1e-4, 50.0), (1.0, -9.0)])
@pytest.mark.parametrize("now, kept", [(0.5, True), (0.7, True), (1.29, True), (1.31, False)])
def test_a_told_loss_may_rise_by_what_was_usual_from_epoch_to_epoch(factor, offset, now, kept):
    losses = [factor * loss + offset for loss in (1.1, 0.9, 0.7, now)]
    verdict = told_losses(losses[:3], losses[3:])
    (check,) = [check for check in verdict.checks if check.question == "loss"]
    assert check.passed is kept
    assert check.value == pytest.approx(max(0.0, (now - 0.7) / 0.2), abs=1e-6)


def test_a_rise_that_nothing_can_be_held_against_is_refused():
    for before, after, kept in [
        ([1.0, 1.0, 1.0], 1.001, False), ([1.0, 1.0, 1.0], 1.0 + 1e-7, True),
        ([1.0, 1.0, 1.0], 1.0, True), ([1.0], 1.1, False), ([1.0], 0.9, True),
        ([1.0, 0.9, 0.8, float("nan")], 0.9, True), ([1.1, 0.9, 0.7], float("nan"), False),
    ]:  # fmt: skip
        verdict = told_losses(before, [after])
        assert [c.passed for c in verdict.checks if c.question == "loss"] == [kept]


@pytest.mark.parametrize("name", ["loss", "accuracy"])
@pytest.mark.parametrize(
    "told", ["0.5", True, [1.0, 2.0], torch.ones(2), object(), 10**400], ids=lambda value: type(value).__name__
)
def test_what_is_no_number_is_refused_and_no_epoch_counted(name, told):
    script = blending()
    before = script.growth.state_dict()
    with pytest.raises(ConfigurationError, match=f"{name} must be a number"):
        script.growth.end_epoch(**{name: told})
    assert script.growth.state_dict()["epoch"] == before["epoch"]
    assert script.growth.state_dict()["losses"] == before["losses"]


@pytest.mark.parametrize("form", [torch.tensor, numpy.float32], ids=["tensor", "numpy"])
def test_numbers_are_told_as_tensors_too_and_saved_as_numbers(form):
    growth = blending().growth
    growth.end_epoch(loss=form(0.5), accuracy=form(0.25))
    state = growth.state_dict()
    assert (state["losses"][-1], state["accuracy"]) == (0.5, 0.25)
    assert [type(number) for number in (state["loss"], state["accuracy"])] == [float, float]


def test_a_schedule_that_leads_nowhere_is_refused_before_anything_is_planted():
    script = Script()
    with pytest.raises(ConfigurationError, match="target of a seed's schedule"):
        script.growth.germinate("early", Residual(6, 16), schedule=AlphaSchedule(target=0.0))
    assert script.growth.slots["early"].stage is Stage.DORMANT
