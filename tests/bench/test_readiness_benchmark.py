"""The readiness benchmark in its quick form, and its arithmetic: who is right, and against what."""

import json
import math

import pytest
import torch

from bench.readiness import run as readiness
from bench.readiness.tables import WAITS
from seedtriton import BlendProbe, Check, Gate, Stage, Verdict


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("readiness") / "quick.json"
    code = readiness.main(["--quick", "--output", str(path)])
    return code, json.loads(path.read_text(encoding="utf-8"))


def test_our_gate_makes_no_mistake_and_the_bare_ratios_make_many(quick):
    code, found = quick
    assert code == 0
    wrong = {judge: len(readiness.wrong(found["runs"], judge)) for judge in readiness.JUDGES}
    assert wrong["G2"] == 0
    assert wrong["G2 without probe"] <= 4
    assert wrong["original"] >= 12
    assert wrong["esper-lite"] >= 12


def test_a_loss_written_otherwise_has_the_same_verdicts_and_a_mean_alone_no_worse_ones(quick):
    for run in quick[1]["runs"]:
        one, other = run["verdicts"]["G2"], run["verdicts"]["G2, 1000 loss + 100"]
        assert (one["passed"], one["epoch"]) == (other["passed"], other["epoch"]), run["scenario"]
    wrong = {judge: len(readiness.wrong(quick[1]["runs"], judge)) for judge in readiness.JUDGES}
    assert wrong["G2, sum of losses alone"] <= wrong["G2 without probe"]


def test_the_truth_has_both_kinds(quick):
    truths = [run["verdicts"]["G2"]["truth"] for run in quick[1]["runs"]]
    assert min(truths.count("ready"), truths.count("not ready")) >= 5


def test_what_would_be_the_hosts_nan_is_not_ready_however_well_it_does_on_held_out_samples(quick):
    truths = {(run["scenario"], epoch["truth"]) for run in quick[1]["runs"] for epoch in run["epochs"]}
    assert ("healthy", "ready") in truths
    assert ("NaN bursts", "ready") not in truths
    assert ("NaN bursts", "not ready") in truths


def test_every_refusal_of_a_planted_cause_names_it(quick):
    refused = [run for run in quick[1]["runs"] if run["causes"] and not run["verdicts"]["G2"]["passed"]]
    assert len(refused) >= 12
    assert [run["scenario"] for run in refused if not run["verdicts"]["G2"]["cause_named"]] == []


def test_the_output_says_what_it_was_measured_with_and_holds_every_scenario(quick):
    found = quick[1]
    assert {"command", "date", "python", "torch", "threads", "machine", "commit", "runs"} <= found.keys()
    assert {run["scenario"] for run in found["runs"]} == {make().name for make in readiness.SCENARIOS}
    assert len({make().name for make in readiness.SCENARIOS}) == len(readiness.SCENARIOS) >= 28


@pytest.mark.parametrize(
    "changes, errors, label",
    [
        ((-0.1, -0.1), (0.01, 0.01), "ready"),
        ((-0.1, 0.0), (0.01, 0.01), "ready"),
        ((0.0, -0.1), (0.01, 0.01), "ready"),
        ((-0.1, 0.1), (0.01, 0.01), "not ready"),
        ((0.1, -0.1), (0.01, 0.01), "not ready"),
        ((-0.02, 0.02), (0.01, 0.01), "within noise"),
        ((-0.031, 0.0), (0.01, 0.01), "ready"),
        ((-0.029, 0.0), (0.01, 0.01), "within noise"),
        ((-0.001, 0.001), (0.0, 0.0), "within noise"),
        ((-0.0021, 0.0), (0.0, 0.0), "ready"),
        ((math.nan, -0.1), (0.01, 0.01), "not ready"),
    ],
)
def test_truth_is_what_blending_does_to_the_loss_beyond_the_noise(changes, errors, label):
    assert readiness.truth(2.0, changes, errors) == label


def test_the_other_judges_are_what_they_are_said_to_be():
    def sample(host, seed):
        return readiness.Sample(host_sumsq=host**2, seed_sumsq=seed**2, host_elements=400, seed_elements=100)

    assert readiness.original(3, sample(1.0, 0.051))
    assert not readiness.original(3, sample(1.0, 0.049))
    assert not readiness.original(2, sample(1.0, 1.0))
    assert not readiness.original(3, sample(0.0, 1.0))
    assert not readiness.original(3, sample(1.0, math.nan))
    esper = readiness.Esper()
    assert not esper(3, sample(1.0, 0.049))
    assert esper.average == pytest.approx(0.098)
    assert esper(3, sample(1.0, 0.1))  # 0.9 * 0.098 + 0.1 * 0.2
    assert esper.average == pytest.approx(0.1082)
    nan = readiness.Esper()
    assert nan(3, sample(1.0, math.nan))
    assert nan.average == 10.0


@pytest.mark.parametrize("t, alone", [(4.0, True), (3.9, False), (None, False)])
def test_without_its_probe_the_gate_holds_the_gain_against_its_own_limit(t, alone):
    """With a probe the verdict itself holds t against 0, which says nothing of a gate without one."""
    gain, harm = Check("blend_gain", "significant", True, t), Check("probe_harm", "blend_would_harm", False)
    verdict = Verdict(Gate.G2, Stage.BLENDING, "s", False, (gain, harm))
    found = opinions(verdict, (0.01, 0.01))
    assert (found["G2 without probe"], found["G2"]) == (alone, False)


def opinions(verdict, rises):
    """Opinions on a verdict where the losses of two samples change so at each alpha."""
    losses = torch.tensor([1.0, 2.0])
    asked = []

    def probed(write):
        asked.append(write)
        base, blended = (torch.as_tensor(write(losses + change)).reshape(-1) for change in (0.0, torch.tensor(rises)))
        change = (blended - base).double()
        means = {"loss": base.mean().item(), "changes": (change.mean().item(),)}
        if len(base) > 1:
            means |= {"errors": (change.std().item() / 2**0.5,), "spread": base.double().std().item()}
        return BlendProbe(seed="s", alphas=(1.0,), **means)

    found = readiness.opinions(3, readiness.Sample(1.0, 1.0, 1, 1), readiness.Esper(), verdict, None, probed)
    return {**found, "asked": len(asked)}


@pytest.mark.parametrize("t, rises, mean, rewritten", [
    (9.0, (-0.1, -0.1), True, True), (1.0, (-0.1, -0.1), False, True),
    (9.0, (-0.3, 0.1), True, False), (9.0, (0.1, 0.1), False, False),
])  # fmt: skip
def test_the_other_ways_to_write_a_loss_are_judged_by_their_own_probes(t, rises, mean, rewritten):
    checks = Check("blend_gain", "significant", True, t), Check("probe_gain", "blend_lowers_loss", True)
    found = opinions(Verdict(Gate.G2, Stage.BLENDING, "s", True, checks), rises)
    assert (found["G2, sum of losses alone"], found["G2, 1000 loss + 100"]) == (mean, rewritten)
    # Refused for anything else, or not due, nobody asks.
    other = Verdict(Gate.G2, Stage.BLENDING, "s", False, (*checks, Check("samples", "samples_insufficient", False)))
    assert opinions(other, rises)["asked"] == 0
    waits = Check("blend_gain", "significant", True, 1.0), Check("probe_gain", "probe_not_due", False)
    assert opinions(Verdict(Gate.G2, Stage.BLENDING, "s", False, waits), rises)["asked"] == 0


def test_a_verdict_is_the_first_pass_or_the_refusal_at_the_end():
    def row(epoch, passes, truth, refused_for=()):
        return {
            "epoch": epoch, "truth": truth, "refused_for": list(refused_for),
            "passes": dict.fromkeys(readiness.JUDGES, passes),
        }  # fmt: skip

    learning, broken = readiness.Scenario(), readiness.Scenario()
    broken.kind, broken.causes = "broken measurement", ("why",)
    cases = [
        (learning, [row(1, True, "not ready"), row(2, True, "ready")], (True, 1, "wrong", False)),
        (learning, [row(1, False, "ready"), row(2, True, "ready")], (True, 2, "right", False)),
        (learning, [row(1, False, "not ready"), row(2, False, "ready")], (False, 2, "wrong", False)),
        (learning, [row(1, True, "within noise")], (True, 1, "either", False)),
        (learning, [row(1, False, "luck")], (False, 1, "either", False)),
        (learning, [row(1, False, "not ready")], (False, 1, "right", False)),
        (broken, [row(1, False, "ready", ["why"]), row(2, False, "ready", [WAITS])], (False, 2, "right", True)),
        (broken, [row(1, True, "ready")], (True, 1, "wrong", False)),
        (broken, [row(1, False, "ready", ["why"])], (False, 1, "right", True)),
    ]
    for scenario, rows, expected in cases:
        found = readiness.verdicts(scenario, rows)["G2"]
        assert (found["passed"], found["epoch"], found["right"], found["cause_named"]) == expected
