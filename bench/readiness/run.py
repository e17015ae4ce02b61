"""Readiness benchmark: is gate G2 right about seeds that learn and seeds that do not? python -m bench.readiness

Truth is measured, not labelled: at each verdict, the loss on held-out samples that no gate has seen, with the
seed blended in at alpha 0.1 and at the slot's target, against the loss without it. A seed that helps no more than it
did before it was trained is called lucky: it is no mistake to refuse it, nor to let it pass. One behind which no epoch
of training has a finite loss is not ready, whatever the held-out samples say: they are seen in evaluation mode.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import multiprocessing
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.machine import header
from bench.new_tasks import ALL_TASKS, SETS, chosen
from bench.optimizers import ADAMW, MUON, SGD
from bench.readiness.scenarios import BROKEN, SCENARIOS, Run, Scenario
from bench.readiness.tables import WAITS, refused_for, table
from bench.tasks import Task
from seedtriton import (
    BlendProbe,
    GateThresholds,
    GrowthController,
    QualityGates,
    SeedEvidence,
    SeedStatus,
    Stage,
    Verdict,
)
from seedtriton.gradients.row import ELEMENTS, SUMSQ
from seedtriton.growth.probing import probe, twin_of

SLOT = "slot"
OPTIMIZERS = {ADAMW: 5, SGD: 3, MUON: 3}  # random seeds of each
EPOCHS, STEPS = 10, 40  # of TRAINING; verdicts are given at the end of each epoch
TRUTH_AT = (0.1, 1.0)
# Standard errors of the truth, and the least change of the loss that counts: about one chance in 400 that the
# noise of the held-out samples alone makes a label.
TRUTH_ERRORS = 3.0
TRUTH_FLOOR = 1e-3
READY, NOT_READY, NOISE, LUCK = "ready", "not ready", "within noise", "luck"


def truth(loss: float, changes: Sequence[float], errors: Sequence[float]) -> str:
    """What blending does to the loss: READY if it falls somewhere and rises nowhere, beyond the noise."""
    floor = TRUTH_FLOOR * abs(loss)
    if not all(map(math.isfinite, (*changes, *errors))):
        return NOT_READY
    bounds = [max(TRUTH_ERRORS * error, floor) for error in errors]
    if any(change > bound for change, bound in zip(changes, bounds)):
        return NOT_READY
    return READY if any(change < -bound for change, bound in zip(changes, bounds)) else NOISE


def helped_by_training(task: Task, model: torch.nn.Module, untrained: torch.nn.Module) -> bool:
    """Whether the blend lowers the loss more than it would have before the seed was trained, beyond the noise."""
    for alpha in TRUTH_AT:
        now, then = (twin_of(model) for _ in range(2))
        then.slot.seed = untrained
        found = []
        for twin in (now, then):
            twin.slot.blend_at(alpha)
            found.append(task.sample_losses(twin, task.truth).double())
        change = found[0] - found[1]
        bound = max(TRUTH_ERRORS * (change.std() / len(change) ** 0.5).item(), TRUTH_FLOOR * found[1].mean().item())
        if change.mean().item() < -bound:
            return True
    return False


def trains(task: Task, model: torch.nn.Module, random_seed: int) -> bool:
    """Whether the loss of an epoch in training mode is finite throughout with the seed blended in; nobody steps."""
    twin, batches = twin_of(model).train(), task.batches(random_seed)
    twin.slot.blend_at(max(TRUTH_AT))
    with torch.random.fork_rng(devices=[]):
        return all(bool(task.loss(twin, next(batches)).detach().isfinite()) for _ in range(STEPS))


class Esper:
    """esper-lite's rule, written from its description: RMS ratio of the epoch's last batch, clamped, smoothed."""

    def __init__(self) -> None:
        self.average: float | None = None

    def __call__(self, epoch: int, sample: Sample) -> bool:
        ratio = 0.0
        host, seed = math.sqrt(sample.host_sumsq), math.sqrt(sample.seed_sumsq)
        # Written so that NaN falls through to the clamp, as there.
        if not (host < 1e-8 or sample.seed_elements == 0):
            ratio = seed / host * math.sqrt(sample.host_elements / sample.seed_elements)
            ratio = ratio if ratio < 10.0 else 10.0
        self.average = ratio if self.average is None else 0.9 * self.average + 0.1 * ratio
        return epoch >= 3 and self.average >= 0.10


def original(epoch: int, sample: Sample) -> bool:
    """The rule of the original review: ratio of the gradient norms of the epoch's last batch at least 0.05."""
    host, seed = math.sqrt(sample.host_sumsq), math.sqrt(sample.seed_sumsq)
    ratio = seed / (host + 1e-8) if host > 0 else 0.0
    return epoch >= 3 and ratio >= 0.05


@dataclasses.dataclass(frozen=True)
class Sample:
    """The last measurement of an epoch, as it was: what the other judges look at."""

    host_sumsq: float
    seed_sumsq: float
    host_elements: float
    seed_elements: float

    @classmethod
    def last_of(cls, growth: GrowthController) -> Sample:
        monitor = growth.monitor
        row = monitor.ring[(int(monitor.count) - 1) % monitor.window].tolist()
        sums = [segment[SUMSQ] for segment in row]
        elements = [segment[ELEMENTS] for segment in row]
        return cls(sums[0], sums[1], elements[0], elements[1])


UNPROBED, MEAN_ONLY, REWRITTEN = "G2 without probe", "G2, sum of losses alone", "G2, 1000 loss + 100"
JUDGES = ("original", "esper-lite", UNPROBED, MEAN_ONLY, "G2", REWRITTEN, "G2 with improvement")


def opinions(
    epoch: int, sample: Sample, esper: Esper, verdict: Verdict, improvement: float | None,
    probed: Callable[[Callable[[Tensor], Any]], BlendProbe],
) -> dict[str, bool]:
    """Whether each judge would let the seed blend now; ``probed`` probes a rewritten loss."""
    asked = {check.question: check for check in verdict.checks}
    rest = [check for name, check in asked.items() if name != "blend_gain" and not name.startswith("probe")]
    fine = all(check.passed is not False for check in rest)
    # Where the loss was probed, the verdict holds the gain against a lower limit than G2 has without a probe.
    limits, gain = GateThresholds(), asked["blend_gain"].value
    certain = gain is not None and gain >= limits.min_blend_gain_t
    asked_now = fine and any(check.passed is not None for check in verdict.checks if check.question == "probe_gain")
    waits = any(check.name == WAITS for check in verdict.checks)
    status = SeedStatus(seed=SLOT, stage=Stage.TRAINING, evidence=SeedEvidence(seed=SLOT, blend_gain_t=gain))

    def by(write: Callable[[Tensor], Any]) -> bool:
        """The questions that a probe of this loss answers; the others have been answered."""
        found = QualityGates().judge(Stage.BLENDING, dataclasses.replace(status, probe=probed(write)))
        decisive = ("blend_gain", "probe_gain", "probe_harm")
        return all(check.passed is not False for check in found.checks if check.question in decisive)

    return {
        "original": original(epoch, sample),
        "esper-lite": esper(epoch, sample),
        UNPROBED: certain and fine,
        MEAN_ONLY: certain and fine and by(lambda losses: losses.sum().item()),
        "G2": verdict.passed,
        REWRITTEN: asked_now and not waits and by(lambda losses: 1000.0 * losses.double() + 100.0),
        "G2 with improvement": verdict.passed and improvement is not None and improvement >= 1.0,
    }


def warm_host(task: Task, random_seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The host after training alone, with its optimizer."""
    torch.manual_seed(random_seed)
    model = task.make_host()
    optimizer = task.make_optimizer(model)
    batches = task.batches(random_seed)
    for _ in range(task.warm_steps):
        task.loss(model, next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def train(
    scenario: Scenario, task: Task, random_seed: int, epochs: int, warm: Callable[[Task, int], Any]
) -> list[dict[str, Any]]:
    """One seed behind one host: for every epoch the judges' opinions, the evidence and the truth."""
    task = scenario.task(task, random_seed)
    model, optimizer = copy.deepcopy(warm(task, random_seed))
    torch.manual_seed(random_seed + 1000)
    # gates only report: what happens after a verdict is the growth benchmark's subject.
    growth = GrowthController(
        model, optimizer, auto_advance=(), sinks=(), evaluate=lambda twin: task.sample_losses(twin, task.probe)
    )
    run = Run(task, model, optimizer)
    run.growth, run.batches, run.steps = growth, task.batches(random_seed + 1000), epochs * STEPS
    growth.germinate(SLOT, scenario.seed(task), **scenario.germinate(task))
    assert growth.advance(SLOT).passed
    run.seed = model.slot.seed
    scenario.prepare(run)
    untrained = copy.deepcopy(run.seed)
    esper, rows = Esper(), []

    def probed(write: Callable[[Tensor], Any]) -> BlendProbe:
        return growth.probe(SLOT, lambda twin: write(task.sample_losses(twin, task.probe)))

    start = task.accuracy(model, task.probe)
    for epoch in range(1, epochs + 1):
        for _ in range(STEPS):
            scenario.one_step(run)
            run.step += 1
        accuracy = task.accuracy(model, task.probe)
        improvement = None if accuracy is None or start is None else 100.0 * (accuracy - start)
        (verdict,) = growth.end_epoch(accuracy=accuracy)
        measured = probe(model, SLOT, lambda twin: task.sample_losses(twin, task.truth), TRUTH_AT)
        errors = measured.errors or ()
        label = truth(measured.loss, measured.changes, errors)
        if label == READY and not trains(task, model, random_seed + 2000 + epoch):
            label = NOT_READY
        elif label == READY and not helped_by_training(task, model, untrained):
            label = LUCK
        evidence = growth.evidence()[SLOT]
        rows.append({
            "epoch": epoch,
            "passes": opinions(epoch, Sample.last_of(growth), esper, verdict, improvement, probed),
            "refused_for": [check.name for check in verdict.failed],
            "truth": label,
            "loss": measured.loss,
            "changes": list(measured.changes),
            "errors": list(errors),
            "t": evidence.blend_gain_t,
            "ratio": evidence.ratio,
            "rms_ratio": evidence.rms_ratio,
            "displacement": evidence.displacement,
            "effective_samples": evidence.effective_samples,
        })  # fmt: skip
    return rows


def verdicts(scenario: Scenario, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each judge its verdict (the first pass, or the refusal at the end) and whether it was right.

    "right", "wrong", or "either" where both verdicts are right: within the noise, or when the blend helps no more
    than it did before the seed was trained. Where nothing true can be measured, only a refusal is right.
    """
    found = {}
    for judge in JUDGES:
        passed = next((row for row in rows if row["passes"][judge]), None)
        row = passed or rows[-1]
        named = passed is None and any(cause in refused_for(rows) for cause in scenario.causes)
        if scenario.kind == BROKEN:
            right = "wrong" if passed else "right"
        elif row["truth"] in (NOISE, LUCK):
            right = "either"
        else:
            right = "right" if (passed is not None) == (row["truth"] == READY) else "wrong"
        found[judge] = {
            "passed": passed is not None, "epoch": row["epoch"], "truth": row["truth"], "right": right,
            "cause_named": named if judge.startswith("G2") else None,
        }  # fmt: skip
    return found


def case(job: tuple[str, str, int, int]) -> list[dict[str, Any]]:
    """All scenarios of one optimizer, one task and one random seed; they share the warm host."""
    optimizer, name, random_seed, epochs = job
    torch.set_num_threads(1)
    task = ALL_TASKS[name]().trained_by(optimizer)
    warmed: list[tuple[Task, Any]] = []

    def warm(wanted: Task, random_seed: int) -> Any:
        for known, host in warmed:
            if known is wanted:
                return host
        host = warm_host(wanted, random_seed)
        warmed.append((wanted, host))
        return host

    results = []
    for make in SCENARIOS:
        scenario = make()
        begun = time.perf_counter()
        rows = train(scenario, task, random_seed, epochs, warm)
        results.append({
            "task": name, "optimizer": optimizer, "random_seed": random_seed, "scenario": scenario.name,
            "kind": scenario.kind, "causes": list(scenario.causes), "verdicts": verdicts(scenario, rows),
            "epochs": rows, "seconds": time.perf_counter() - begun,
        })  # fmt: skip
    return results


def run(jobs: Sequence[tuple[str, str, int, int]], processes: int) -> list[dict[str, Any]]:
    """All cases, one after the other or in several processes."""
    if processes == 1:
        return [result for job in jobs for result in case(job)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return [result for results in pool.imap_unordered(case, jobs, chunksize=1) for result in results]


def rounded(value: Any) -> Any:
    """Six digits of every number, and None for what JSON does not have: one run per line stays readable."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def wrong(results: Sequence[dict[str, Any]], judge: str) -> list[dict[str, Any]]:
    """The runs that ``judge`` was wrong about."""
    return [result for result in results if result["verdicts"][judge]["right"] == "wrong"]


def show(results: Sequence[dict[str, Any]]) -> None:
    """A line per scenario and the totals."""
    print(table(results))
    for result in wrong(results, "G2"):
        verdict = result["verdicts"]["G2"]
        row = result["epochs"][verdict["epoch"] - 1]
        print(
            f"WRONG  {result['optimizer']} / {result['scenario']} / {result['task']} / {result['random_seed']}: "
            f"{'passed' if verdict['passed'] else 'refused'} in epoch {verdict['epoch']}, truth {row['truth']}, "
            f"loss {row['loss']:.4g}, changes {row['changes']}, errors {row['errors']}, t {row['t']}, "
            f"refused for {row['refused_for']}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; 1 when our gate was wrong anywhere."""
    parser = argparse.ArgumentParser(prog="python -m bench.readiness", description=__doc__)
    parser.add_argument(
        "--tasks", nargs="+", choices=[*SETS, *ALL_TASKS], default=["first"], metavar="TASK",
        help=f"{', '.join(ALL_TASKS)}, or a set of them: {', '.join(SETS)} (default: first)",
    )  # fmt: skip
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, help=f"random seeds (default: by optimizer, {OPTIMIZERS})")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two cheap tasks, one random seed each")
    parser.add_argument("--output", type=pathlib.Path, help="JSON to write")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tasks, options.optimizers, options.seeds, options.processes = ["digits_mlp", "spirals"], [ADAMW], 1, 1
    begun = time.perf_counter()
    jobs = [
        (optimizer, task, options.first_seed + index, options.epochs)
        for optimizer in options.optimizers
        for index in range(options.seeds or OPTIMIZERS[optimizer])
        for task in chosen(options.tasks)
    ]
    results = run(jobs, options.processes)
    seconds = time.perf_counter() - begun
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        head = header("python -m bench.readiness " + " ".join(arguments if arguments is not None else sys.argv[1:]))
        lines = ",\n".join(json.dumps(rounded(result)) for result in results)
        options.output.write_text(f"{json.dumps(head)[:-1]}, \"runs\": [\n{lines}\n]}}\n", encoding="utf-8")
    show(results)
    print(f"{seconds:.0f} s")
    return int(bool(wrong(results, "G2")))


if __name__ == "__main__":
    sys.exit(main())
