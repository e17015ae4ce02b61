"""The tasks that nothing was tuned on: each is a whole task, and the benchmarks and their tables keep them apart."""

import dataclasses
import json
import math

import pytest
import torch

from bench import report
from bench.growth import run as growth
from bench.growth import tables as growth_report
from bench.new_tasks import ALL_TASKS, NEW_TASKS, SETS, chosen, contrastive_losses
from bench.readiness import run as readiness
from bench.readiness import tables as readiness_report
from bench.tasks import TASKS, Data
from seedtriton.core.schedules import AlphaSchedule

SHORT = growth.Phases(warm=10, training=20, ramp=AlphaSchedule(steps=10), after=10)
PARTS = ("train", "probe", "truth")
WITHOUT_ACCURACY = {"denoising", "contrastive", "sets", "diabetes", "converged_regression"}


def test_the_first_five_are_what_older_results_are_of_and_no_task_is_in_both():
    assert list(TASKS) == ["digits_mlp", "digits_cnn", "spirals", "regression", "characters"]
    assert not TASKS.keys() & NEW_TASKS.keys()
    assert len(ALL_TASKS) == len(TASKS) + len(NEW_TASKS)
    assert len({make().name for make in ALL_TASKS.values()}) == len(ALL_TASKS)


def test_sets_and_names_may_be_mixed_and_each_counts_once():
    assert chosen(["first"]) == list(TASKS)
    others = [name for name in NEW_TASKS if name != "sets"]
    assert chosen(["sets", "new", "spirals", "sets"]) == ["sets", *others, "spirals"]
    assert not SETS.keys() & ALL_TASKS.keys()


@pytest.mark.parametrize("name", ALL_TASKS)
def test_losses_are_of_samples_and_accuracy_is_a_share_or_nothing(name):
    task = ALL_TASKS[name]()
    model = task.make_host()
    for part in PARTS:
        inputs, targets = getattr(task, part)
        assert len(inputs) == len(targets) >= 100
        assert torch.isfinite(inputs).all()
    losses = task.sample_losses(model, task.truth)
    assert losses.shape == (len(task.truth[1]),)
    assert bool((torch.isfinite(losses) & (losses >= 0)).all())
    accuracy = task.accuracy(model, task.truth)
    assert accuracy is None if name in WITHOUT_ACCURACY | {"regression"} else 0.0 <= accuracy <= 1.0


@pytest.mark.parametrize("name", ALL_TASKS)
def test_a_stream_of_batches_and_a_loss_that_reaches_every_parameter(name):
    task = ALL_TASKS[name]()
    model = task.make_host()
    model.slot.germinate(seed := task.seed())
    model.slot.move(growth.Stage.TRAINING)
    batch: Data = next(task.batches(0))
    assert len(batch[0]) == len(batch[1]) == task.batch
    task.loss(model, batch).backward()
    for parameter in [*model.parameters(), *seed.parameters()]:
        assert bool(torch.isfinite(parameter.grad).all())
    assert all(parameter.grad.abs().sum() > 0 for parameter in seed.parameters())


@pytest.mark.parametrize("name", ALL_TASKS)
def test_shuffled_labels_are_the_same_labels_elsewhere(name):
    task = ALL_TASKS[name]()
    mixed = task.with_shuffled_labels(0)
    assert mixed.with_shuffled_labels(0).name == task.name
    for part in PARTS:
        pairs = list(zip(getattr(task, part), getattr(mixed, part)))
        assert not all(torch.equal(before, after) for before, after in pairs)
        for before, after in pairs:
            assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)


@pytest.mark.parametrize("name", NEW_TASKS)
def test_a_host_does_not_feel_the_seed_behind_it(name):
    """Recurrent layers, Dropout and BatchNorm among them: equal to the last bit."""
    strategies = (growth.NO_GROWTH, growth.DEFAULT, growth.SHADOW)
    alone, *others = [growth.run(growth.Case(name, strategy, 0, SHORT)) for strategy in strategies]
    for grown in others:
        assert grown["loss_before_blending"] == alone["loss_before_blending"]
        assert grown["steps"] == alone["steps"] == 50
        assert grown["final_loss"] != alone["final_loss"]
        assert math.isfinite(grown["final_loss"])


def test_a_host_called_converged_trains_ten_times_as_long():
    for name, usual in (("converged_digits", "digits_mlp"), ("converged_regression", "regression")):
        assert NEW_TASKS[name]().warm_steps == 3000 == 10 * TASKS[usual]().warm_steps


def test_a_sample_is_told_from_the_others_of_its_block_and_not_from_itself():
    views = torch.nn.functional.normalize(torch.randn(70, 2, 5, dtype=torch.float64), dim=-1)
    which = torch.arange(70)
    which[9] = 4
    losses = contrastive_losses(views, which)
    alike = views[:64, 0] @ views[:64, 1].T / 0.2
    others = [i for i in range(64) if i != 9]
    wanted = -alike[4, 4] + (alike[4, others].logsumexp(0) + alike[others, 4].logsumexp(0)) / 2
    torch.testing.assert_close(losses[4], wanted)
    torch.testing.assert_close(losses[64:], contrastive_losses(views[64:], which[64:]))


def run_of(strategy, final, task="sets", seed=0):
    return {
        "task": task, "optimizer": "AdamW", "strategy": strategy, "random_seed": seed, "loss_at_germination": 1.0,
        "loss_before_blending": 1.0, "worst_while_blending": 1.0, "final_loss": final, "behind": None,
    }  # fmt: skip


def test_new_tasks_have_tables_of_their_own_and_the_old_ones_do_not_change():
    head = {"phases": dataclasses.asdict(growth.Phases()), "torch": "x", "default": growth.DEFAULT, "rates": {}}
    old = {"header": head, "runs": [run_of(growth.NO_GROWTH, 0.5, "spirals")]}
    new = {"header": head, "runs": [run_of(growth.NO_GROWTH, 0.25)]}
    alone = growth_report.markdown(old, "old.json")
    both = growth_report.markdown(old, "old.json", new, "new.json")
    before, after = both.split("\n\nValidation loss on tasks that the limits and rules were never tuned on")
    assert before == alone
    assert "never tuned on" not in alone
    assert "| TRAINING by | sets |" in after
    assert "| no growth | 0.250 / 0.250 |" in after
    assert "bench/results/new.json" in after


def test_the_verdicts_on_new_tasks_have_a_table_of_their_own():
    verdict = {"passed": False, "epoch": 1, "truth": "not ready", "right": "right", "cause_named": None}
    run = {
        "task": "sets", "optimizer": "AdamW", "random_seed": 0, "scenario": "healthy", "kind": "learning", "causes": [],
        "verdicts": dict.fromkeys(readiness.JUDGES, verdict), "epochs": [{"refused_for": ["why"]}],
    }  # fmt: skip
    other = run | {"optimizer": "SGD", "task": "denoising"}
    record = {"torch": "x", "runs": [run]}
    alone = readiness_report.markdown(record, "old.json")
    both = readiness_report.markdown(record, "old.json", new={"runs": [run, other]}, new_name="new.json")
    assert both.startswith(alone)
    added = both[len(alone) :]
    assert "never tuned on" in added
    assert "1 seeds, 1 tasks, 1 random seeds, AdamW ([raw output](bench/results/new.json)" in added
    assert "SGD: ready / not / either" in added


def test_the_report_finds_each_kind_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    for name in ("growth-2026-01-02.json", "new-growth-2026-01-03.json"):
        (folder / name).write_text(json.dumps({"name": name}), encoding="utf-8")
    assert report.newest("growth").name == "growth-2026-01-02.json"
    assert report.of("new-growth") == ({"name": "new-growth-2026-01-03.json"}, "new-growth-2026-01-03.json")
    assert report.of("new-readiness") == (None, "")


@pytest.mark.parametrize(
    "asked, cases, written",
    [
        ([], TASKS, "growth"),
        (["--tasks", "new"], NEW_TASKS, "new-growth"),
        (["--tasks", "all"], ALL_TASKS, None),
        (["--tasks", "sets"], ["sets"], None),
        (["--tasks", "new", "--seeds", "1"], NEW_TASKS, None),
    ],
)
def test_the_growth_benchmark_runs_the_first_five_unless_told(asked, cases, written, tmp_path, monkeypatch):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    seen = []

    def run_all(found, _):
        seen.extend(dict.fromkeys(case.task for case in found))
        return [run_of(growth.NO_GROWTH, 0.5)]

    monkeypatch.setattr(growth, "run_all", run_all)
    monkeypatch.setattr(growth, "ROOT", tmp_path)
    growth.main(asked)
    assert seen == list(cases)
    names = [path.stem[: -len("-2026-01-01")] for path in (tmp_path / "bench" / "results").iterdir()]
    assert names == ([written] if written else [])


def test_the_readiness_benchmark_takes_sets_too(monkeypatch):
    seen = []
    monkeypatch.setattr(readiness, "run", lambda jobs, _: seen.extend(dict.fromkeys(job[1] for job in jobs)) or [])
    monkeypatch.setattr(readiness, "show", lambda _: None)
    for asked, tasks in (([], TASKS), (["--tasks", "new", "spirals"], [*NEW_TASKS, "spirals"])):
        seen.clear()
        assert readiness.main(asked) == 0
        assert seen == list(tasks)
