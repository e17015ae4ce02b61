"""The growth benchmark: its bars on a cheap subset, what it writes, and that it can fail."""

import copy
import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import pytest
import torch

from bench.growth import run as growth
from bench.growth import tables as growth_report
from bench.tasks import TASKS
from seedtriton import Stage
from seedtriton.core.schedules import AlphaSchedule

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHORT = growth.Phases(warm=30, training=20, ramp=AlphaSchedule(steps=20), after=20)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What `--quick` says and writes."""
    output = tmp_path_factory.mktemp("growth") / "quick.json"
    command = [sys.executable, "-m", "bench.growth", "--quick", "--processes", "1", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert output.is_file(), done.stderr
    return done, json.loads(output.read_text(encoding="utf-8"))


def of(record, strategy):
    return {(r["task"], r["random_seed"]): r for r in record["runs"] if r["strategy"] == strategy}


def test_the_bars_are_kept_and_printed(quick):
    done, _ = quick
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = done.stdout.splitlines()[-2 * len(growth.QUICK_TASKS) :]
    assert all(line.startswith("kept") for line in verdicts)


def test_the_raw_output_has_every_field(quick):
    _, record = quick
    assert record["header"].keys() == {
        "command", "date", "torch", "python", "commit", "machine", "threads", "processes", "phases", "default",
        "rates",
    }  # fmt: skip
    assert record["header"]["torch"] == torch.__version__
    assert record["header"]["command"].startswith("python -m bench.growth --quick")
    assert len(record["runs"]) == len(growth.QUICK_TASKS) * len(growth.QUICK_STRATEGIES) * growth.QUICK_SEEDS
    numbers = {"loss_at_germination", "loss_before_blending", "worst_while_blending", "final_loss", "seconds"}
    for run in record["runs"]:
        assert run.keys() == numbers | {
            "task", "optimizer", "strategy", "random_seed", "final_accuracy", "parameters", "steps", "behind",
            "ended",
        }  # fmt: skip
        assert run["optimizer"] == "AdamW"
        assert run["ended"] is None
        assert (run["behind"] is None) == (run["strategy"] not in growth.ISOLATIONS)
        assert all(type(run[name]) is float and run[name] > 0 for name in numbers)
        assert (run["final_accuracy"] is None) == (run["task"] == "regression")


def test_lives_under_the_gates_can_be_lived_again_in_their_place(tmp_path, monkeypatch):
    def life(strategy, seed, **more):
        return {"task": "spirals", "optimizer": "AdamW", "strategy": strategy, "random_seed": seed, **more}

    head = {"phases": dataclasses.asdict(growth.Phases(training=7)), "commit": "before"}
    sabotaged = next(iter(growth.SABOTAGED))
    before = [life(growth.NO_GROWTH, 0, old=1), life(growth.GATED, 1, old=2), life(sabotaged, 0, old=3)]
    path = tmp_path / "growth.json"
    path.write_text(json.dumps({"header": head, "runs": before}), encoding="utf-8")
    seen = []

    def run_all(cases, processes):
        seen.extend(cases)
        return [life(case.strategy, case.random_seed, new=processes) for case in cases]

    monkeypatch.setattr(growth, "run_all", run_all)
    runs = growth.again_by_gates(path, "again", 2)
    assert [case.strategy for case in seen] == [growth.GATED, sabotaged]
    assert {case.phases for case in seen} == {growth.Phases(training=7)}
    assert runs == [before[0], life(growth.GATED, 1, new=2), life(sabotaged, 0, new=2)]
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["runs"] == runs
    assert (written["header"]["commit"], written["header"]["gates"]["command"]) == ("before", "again")


def test_straight_through_is_seen_to_be_worse(quick):
    """The benchmark can fail: the same bars, asked of what earlier systems do."""
    _, record = quick
    bad, good = of(record, growth.STRAIGHT_THROUGH), of(record, growth.DEFAULT)
    for case, run in bad.items():
        assert run["final_loss"] > good[case]["final_loss"]
        if case[0] == "regression":
            assert growth_report.over(run) > 2.0
            assert growth_report.over(good[case]) < 1.0
    assert not all(bar.passed for bar in growth.bars(record["runs"], growth.STRAIGHT_THROUGH))
    assert all(bar.passed for bar in growth.bars(record["runs"]))


def test_every_row_sees_the_same_host_until_it_is_blended(quick):
    """Same weights, same batches, and a host that does not feel what learns behind it: equal to the last bit."""
    _, record = quick
    alone = of(record, growth.NO_GROWTH)
    for run in record["runs"]:
        without = alone[run["task"], run["random_seed"]]
        for name in ("loss_at_germination", "loss_before_blending", "steps"):
            assert run[name] == without[name]


def test_blending_at_once_and_the_larger_network():
    runs = {
        strategy: growth.run(growth.Case("spirals", strategy, 0, SHORT))
        for strategy in (growth.NO_GROWTH, growth.AT_ONCE, growth.DEFAULT, growth.LARGER)
    }
    alone, at_once, grown, larger = runs.values()
    assert at_once["loss_at_germination"] == at_once["loss_before_blending"] == alone["loss_at_germination"]
    assert at_once["final_loss"] != alone["final_loss"]
    assert larger["worst_while_blending"] is None
    assert larger["loss_at_germination"] != alone["loss_at_germination"]
    assert larger["parameters"] == at_once["parameters"] == grown["parameters"] > alone["parameters"]
    assert {run["steps"] for run in runs.values()} == {60 + SHORT.warm}


def test_the_gates_blend_a_seed_that_learns_and_none_that_had_no_time():
    phases = growth.Phases(warm=200, training=300, after=100)
    found = growth.run(growth.Case("spirals", growth.GATED, 0, phases))
    alone = growth.run(growth.Case("spirals", growth.NO_GROWTH, 0, phases))
    assert found["loss_at_germination"] == alone["loss_at_germination"]
    assert found["worst_while_blending"] is not None
    assert found["final_loss"] < 0.7 * alone["final_loss"]
    assert found["steps"] == alone["steps"]
    early = growth.run(growth.Case("spirals", growth.GATED, 0, SHORT))
    assert (early["loss_before_blending"], early["worst_while_blending"]) == (None, None)
    assert early["final_loss"] == growth.run(growth.Case("spirals", growth.NO_GROWTH, 0, SHORT))["final_loss"]


def test_a_shadow_learns_at_full_amplitude_and_its_host_as_without_it():
    task = TASKS["regression"]()
    life = growth.Life(task, 0)
    host = copy.deepcopy(life.model)
    batch = next(task.batches(0))
    life.plant()
    life.slot.move(Stage.BLENDING)
    blended = copy.deepcopy(life.model)
    blended.slot.set_alpha(1.0)
    task.loss(blended, batch).backward()
    task.loss(host, batch).backward()
    life.step(shadow=True)
    for ours, truth in zip(life.slot.seed.parameters(), blended.slot.seed.parameters()):
        assert torch.equal(ours.grad, truth.grad)
        assert truth.grad.abs().sum() > 0
    for name in ("first", "last"):
        for ours, truth in zip(getattr(life.model, name).parameters(), getattr(host, name).parameters()):
            assert torch.equal(ours.grad, truth.grad)
    assert life.slot.alpha_value == 0.0


def behind(t, gain, early, late):
    return {"steps": [100, 600], "t": [None, t], "gain": [0.0, gain], "displacement": [early, late]}


def run_of(
    strategy, random_seed=0, germination=1.0, worst=1.0, final=0.5, optimizer="AdamW", behind=None, ended=None
):
    return {
        "task": "spirals", "optimizer": optimizer, "strategy": strategy, "random_seed": random_seed,
        "loss_at_germination": germination,
        "loss_before_blending": germination, "worst_while_blending": worst, "final_loss": final,
        "behind": behind, "ended": ended,
    }  # fmt: skip


@pytest.mark.parametrize(
    "ours, passed",
    [
        ({"worst": 1.0}, [True, True]),
        ({"worst": 1.04}, [True, True]),
        ({"worst": 1.06}, [False, True]),
        ({"worst": math.inf}, [False, True]),
        ({"final": 0.9}, [True, False]),
        ({"final": math.inf}, [True, False]),
    ],
)
def test_bars(ours, passed):
    runs = [run_of(growth.NO_GROWTH, final=0.9), run_of(growth.DEFAULT, **ours)]
    assert [bar.passed for bar in growth.bars(runs)] == passed


def ended(stage, later=None):
    return {"stage": stage, "reason": None, "epochs_felt": later}


def many():
    """Lives under the gates beside others, and sabotaged ones."""
    runs = [run_of(growth.NO_GROWTH, seed, final=1.0) for seed in range(3)]
    runs += [run_of(growth.AT_ONCE, seed, final=0.5) for seed in range(3)]
    runs += [run_of(growth.AGAIN, seed, final=0.5 + 0.2 * (seed == 0)) for seed in range(3)]
    finals = (0.5, 0.509, 1.03)
    runs += [run_of(growth.GATED, s, final=final, ended=ended("FOSSILIZED")) for s, final in enumerate(finals)]
    silent, shuffled = "sabotaged: silent once felt", "sabotaged: gradients shuffled"
    runs += [run_of(silent, seed, ended=ended("PRUNED", 3 + seed)) for seed in range(2)]
    runs += [run_of(shuffled, 0, final=0.9, ended=ended("FOSSILIZED")), run_of(shuffled, 1, ended=ended("TRAINING"))]
    return runs


def test_single_lives_are_held_against_no_growth_chance_and_sabotage():
    alone, at_once, sabotaged = growth.lives(many())
    assert [bar.passed for bar in (alone, at_once, sabotaged)] == [False, False, True]
    assert "1 of 3 lives end more than 2% above no growth" in str(alone)
    assert "2 of 3 lives end below blending at once or within 2% of it" in str(at_once)
    assert "itself does so in 2 of 3" in str(at_once)
    assert "1 of 4 sabotaged seeds became permanent, 0 of them" in str(sabotaged)
    harmful = [*many(), run_of("sabotaged: noisy once felt", 0, final=1.03, ended=ended("FOSSILIZED"))]
    assert not list(growth.lives(harmful))[-1].passed
    assert list(growth.lives([run_of(growth.NO_GROWTH)])) == []


def test_the_tables_show_them_and_leave_sabotage_out_of_the_others(quick):
    head = {**quick[1]["header"], "phases": dataclasses.asdict(growth.Phases()), "rates": {"AdamW": None}}
    # Lives by another optimizer are no measure of these.
    others = [run_of(growth.NO_GROWTH, seed, final=0.1, optimizer="SGD") for seed in range(3)]
    others.append(run_of(growth.GATED, 0, final=0.1, optimizer="SGD", ended=ended("PRUNED")))
    head["rates"]["SGD"] = 0.02
    text = growth_report.markdown({"header": head, "runs": [*many(), *others]}, "raw.json")
    assert f"| AdamW, {growth.GATED} | 1 of 3 | 1 of 3 | 1 of 3 | 3 | 0 |" in text
    assert f"| SGD, {growth.GATED} | 0 of 1 | - | - | 0 | 1 |" in text
    assert "| silent once felt | 2 | 2 | 2, 3 to 4 | 0 | 0 |" in text
    assert "| gradients shuffled | 2 | 2 | 0 | 1 | 0 |" in text
    assert text.count("silent once felt") == 1
    assert "sabotaged: " not in text


def test_a_sabotaged_seed_lives_under_the_gates():
    phases = dataclasses.replace(growth.Phases(), warm=100, training=240, after=40)
    idle, silent = (
        growth.run(growth.Case("spirals", f"sabotaged: {name}", 0, phases))
        for name in ("learning rate 0", "silent once felt")
    )
    assert idle["ended"] == {"stage": "TRAINING", "reason": None, "epochs_felt": None}
    assert idle["loss_before_blending"] is None
    assert silent["ended"]["stage"] == "PRUNED"
    assert silent["ended"]["reason"].startswith("harm in 2 epochs in a row")
    assert 2 <= silent["ended"]["epochs_felt"] <= 5


@pytest.mark.parametrize("name", growth.SABOTAGES)
def test_each_sabotage_does_what_it_says(name):
    torch.manual_seed(0)
    task, kind = TASKS["spirals"](), growth.SABOTAGES[name]()
    seed, x = task.seed(), torch.randn(5, task.width)
    group = {"lr": 0.1}
    for parameter in seed.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [seed(x).detach(), *(p.grad.clone() for p in seed.parameters())]
    kind.before_step(seed)
    kind.once_felt(seed, group)
    gradients = [torch.equal(p.grad, old) for p, old in zip(seed.parameters(), before[1:])]
    changed = {
        "task": kind.task(task, 0) is not task,
        "germinate": kind.germinate() != {},
        "gradients": not all(gradients),
        "output": not torch.equal(seed(x).detach(), before[0]),
        "rate": group["lr"] != 0.1,
    }
    assert {what for what, found in changed.items() if found} == {
        "in no optimizer": {"germinate"}, "learning rate 0": {"germinate"}, "gradients shuffled": {"gradients"},
        "random labels": {"task"}, "silent once felt": {"output"}, "noisy once felt": {"output"},
        "turned round once felt": {"output", "rate"}, "wild once felt": {"rate"},
    }[name]  # fmt: skip


def test_a_run_that_never_blended_cannot_rise():
    runs = [run_of(growth.NO_GROWTH, final=0.9), run_of(growth.GATED, worst=None, final=0.8)]
    blending, end = growth.bars(runs, growth.GATED)
    assert (blending.passed, end.passed) == (True, True)
    assert "0 of 0 runs that blended" in str(blending)


def test_one_run_is_enough_to_miss_the_bar_on_blending_and_the_median_decides_on_the_end():
    runs = [run_of(growth.NO_GROWTH, seed, final=0.6) for seed in range(3)]
    runs += [run_of(growth.DEFAULT, seed, worst=1 + 0.1 * (seed == 1), final=0.5 + 0.2 * seed) for seed in range(3)]
    blending, end = growth.bars(runs)
    assert not blending.passed
    assert "2 of 3 runs" in str(blending)
    assert not end.passed
    assert "1 of 3 runs" in str(end)


def test_a_missed_bar_is_an_exit_code(monkeypatch, capsys):
    worst = 1.0
    monkeypatch.setattr(
        growth, "run_all", lambda *_: [run_of(growth.NO_GROWTH), run_of(growth.DEFAULT, worst=worst, final=0.1)]
    )
    assert growth.main(["--quick"]) == 0
    worst = 1.2
    assert growth.main(["--quick"]) == 1
    assert "MISSED" in capsys.readouterr().out


def test_a_loss_that_is_no_number_is_the_worst_of_all():
    life = growth.Life(TASKS["spirals"](), 0)
    with torch.no_grad():
        life.model.last.bias.fill_(math.nan)
    assert life.validate() == math.inf


@pytest.mark.parametrize("option", ["--seeds", "--processes", "--warm"])
def test_no_runs_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        growth.main([option, "0", "--quick"])
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def test_another_choice_of_lives_does_not_go_with_those_of_an_output(capsys):
    with pytest.raises(SystemExit):
        growth.main(["--gates-of", "growth.json", "--seeds", "2"])
    assert "leave --seeds out" in capsys.readouterr().err


def test_tables_give_median_and_worst(quick):
    _, record = quick
    phases = dataclasses.asdict(growth.Phases())
    runs = [run_of(growth.DEFAULT, seed, worst=worst, final=seed) for seed, worst in enumerate((3.0, 0.5, 1.5))]
    runs.append(run_of(growth.LARGER, worst=None, final=0.25))
    runs += [run_of(growth.NO_GROWTH, seed, worst=1.05, final=1.5) for seed in range(3)]
    runs[0]["behind"] = behind(3.0, 0.5, 0.1, math.nan)
    runs += [run_of(growth.OLD_RULE, seed, worst=2.0, final=0.1, optimizer="SGD") for seed in range(3)]
    runs[-1]["behind"] = behind(None, None, 2.0, 4.0)
    runs += [run_of(growth.NO_GROWTH, seed, worst=0.9, final=0.1 * seed, optimizer="SGD") for seed in range(3)]
    head = {**record["header"], "phases": phases, "rates": {"AdamW": None, "SGD": 0.02}}
    text = growth_report.markdown({"header": head, "runs": runs}, "raw.json")
    assert "SGD at 0.02, medians of 3:" in text
    assert f"| {growth.OLD_RULE} | 2, 0.1 | 1 of 3 |" in text
    assert f"| {growth.NO_GROWTH} | 0.9, 0.1 | - |" in text
    assert f"| AdamW, {growth.DEFAULT} | 3.0 (0.5) | 0.1, 0.1 | inf, inf |" in text
    assert f"| SGD, {growth.OLD_RULE} | - (-) | 2, 2 | 4, 4 |" in text
    assert f"| {growth.DEFAULT} | 1.50 / 3.00 |" in text
    assert f"| {growth.DEFAULT} | 1.000 / 2.000 |" in text
    assert f"| {growth.DEFAULT} | +200.0% | 2 of 3 |" in text
    assert f"| {growth.NO_GROWTH} | +5.0% | - |" in text
    assert f"| {growth.LARGER} | - | 1 of 1 |" in text
    assert text.count(growth.LARGER) == 2  # it has nothing to say about blending
    assert "median / worst of 3 random seeds" in text
    assert "600 steps behind the host, 200 of blending, 400 more" in text
    assert "bench/results/raw.json" in text


def test_the_picture_is_drawn_even_of_a_loss_that_left_every_scale(quick, tmp_path):
    _, record = quick
    runs = [*record["runs"], run_of(growth.LARGER, worst=None), run_of(growth.AT_ONCE, worst=math.inf, final=1e9)]
    growth_report.figure({**record, "runs": runs}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_a_bar_is_of_one_optimizer_and_none_is_promised_where_no_rule_works():
    runs = [run_of(growth.NO_GROWTH, final=0.9), run_of(growth.DEFAULT, final=0.1)]
    runs += [run_of(growth.NO_GROWTH, final=0.2, optimizer="SGD"), run_of(growth.DEFAULT, final=0.5, optimizer="SGD")]
    runs += [run_of(growth.NO_GROWTH, optimizer="fast SGD"), run_of(growth.DEFAULT, worst=9.0, optimizer="fast SGD")]
    bars = list(growth.bars(runs))
    assert [bar.passed for bar in bars] == [True, True, True, False]
    assert [str(bar).split()[1] for bar in bars] == ["AdamW,", "AdamW,", "SGD,", "SGD,"]


@pytest.mark.parametrize("optimizer", growth.ROWS)
def test_a_life_by_every_optimizer_says_what_the_gates_would_know(optimizer):
    found = growth.run(growth.Case("spirals", growth.DEFAULT, 0, SHORT, optimizer))
    assert found["optimizer"] == optimizer
    assert found["behind"]["steps"] == [SHORT.training]
    (moved,), (gain,), (t,) = (found["behind"][name] for name in ("displacement", "gain", "t"))
    assert 0.0 < moved < 1.0
    assert math.isfinite(gain)
    assert math.isfinite(t)
    assert found["final_loss"] != growth.run(growth.Case("spirals", growth.OLD_RULE, 0, SHORT, optimizer))["final_loss"]
