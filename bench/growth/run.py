"""Does growth help, and is it safe? Whole lives of a seed by several ways to train it: python -m bench.growth.

Every row of one task and random seed sees the same batches, the same initial weights and the same number of
optimizer steps. Decisions are by step count, but in one row, where the gates decide; whether they decide well is the
readiness benchmark's question.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import multiprocessing
import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import nn

from bench.growth.sabotage import SABOTAGES, Sabotage
from bench.growth.tables import CLOSE, close_to, over, permanent
from bench.machine import header
from bench.new_tasks import ALL_TASKS, NEW_TASKS, SETS, chosen
from bench.optimizers import ADAMW, FAST_SGD, MUON, OPTIMIZERS, SGD
from bench.tasks import TASKS, BatchStream, Task
from seedtriton import GrowthController, Stage, StraightThrough, TrustRegion
from seedtriton.core.evidence import GAIN_SAMPLES, t_statistic
from seedtriton.core.schedules import AlphaSchedule
from seedtriton.gradients.marks import Mark
from seedtriton.growth.isolation import NORM

ROOT = pathlib.Path(__file__).resolve().parents[2]

NO_GROWTH, AT_ONCE, SHADOW, LARGER = "no growth", "blending at once", "shadow", "larger network"
AGAIN = "blending at once, another seed"  # other first weights of the seed, all else the same: what chance makes
GATED = "gates decide"  # the library as it comes: the default isolation, and the gates with a probe say when
UNPROBED = "gates decide, no probe"  # they have the gradients, and a mean loss per epoch
SABOTAGED = {f"sabotaged: {name}": kind for name, kind in SABOTAGES.items()}  # the gates decide about such seeds
STRAIGHT_THROUGH = "straight-through"
OLD_RULE = "trust region 0.2, norms"  # the rule that the first version had
ISOLATIONS = {
    STRAIGHT_THROUGH: StraightThrough(),
    OLD_RULE: TrustRegion(0.2, NORM),
    "trust region 0.1": TrustRegion(0.1),
    "trust region 0.2": TrustRegion(0.2),
    "trust region 0.5": TrustRegion(0.5),
    "trust region 1.0": TrustRegion(1.0),
}
STRATEGIES = (NO_GROWTH, AT_ONCE, AGAIN, *ISOLATIONS, GATED, UNPROBED, SHADOW, LARGER)
DEFAULT = next(name for name, isolation in ISOLATIONS.items() if isolation == TrustRegion())
# What is run under which optimizer: everything under the first, what decides under the others.
DECISIVE = (NO_GROWTH, AT_ONCE, STRAIGHT_THROUGH, OLD_RULE, DEFAULT, GATED, UNPROBED)
UNPROMISED = (FAST_SGD,)  # here to be seen
ROWS = {ADAMW: STRATEGIES, SGD: DECISIVE, MUON: DECISIVE, FAST_SGD: DECISIVE}

SEEDS = {ADAMW: 5, SGD: 3, MUON: 3, FAST_SGD: 3}  # random seeds of each
EVERY = 10  # steps between two looks at the validation loss while blending
WATCHED = 100  # steps after the ramp that still count as blending
SABOTAGE_SEEDS = 2  # random seeds of each sabotage, by the first optimizer
EPOCH = 40  # steps between two questions to the gates
LOOKS = (100, 200)  # steps behind the host after which its seed is looked at, and at the end
NOT_WORSE = 0.85  # share of the lives that are to end no higher than by blending at once
MAX_RISE = 0.05  # of the validation loss while blending, over its value at germination


@dataclasses.dataclass(frozen=True)
class Phases:
    """Optimizer steps of a life."""

    warm: int | None = None  # the host alone, ``task.warm_steps`` unless told
    training: int = 600
    ramp: AlphaSchedule = dataclasses.field(default_factory=AlphaSchedule)
    after: int = 400


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: what a process of the pool is handed."""

    task: str
    strategy: str
    random_seed: int
    phases: Phases = dataclasses.field(default_factory=Phases)
    optimizer: str = ADAMW


# Enough to see that growth helps, and that straight-through wrecks the host.
QUICK_TASKS = ("spirals", "regression")
QUICK_STRATEGIES = (NO_GROWTH, STRAIGHT_THROUGH, DEFAULT, SHADOW)
QUICK_SEEDS = 2
QUICK_PHASES = Phases(training=500, after=100)


class Life:
    """One model in training, with the slot's seed in the optimizer once it is planted."""

    def __init__(self, task: Task, random_seed: int) -> None:
        torch.manual_seed(random_seed)
        self.task, self.model, self.seed = task, task.make_host(), task.seed()
        self.batches: BatchStream = task.batches(random_seed)
        self.optimizer = task.make_optimizer(self.model)
        self.steps = 0

    @property
    def slot(self) -> nn.Module:
        return self.model.slot

    def plant(self, isolation: StraightThrough | TrustRegion | None = None) -> None:
        """Put the seed into slot and optimizer, behind the host."""
        self.slot.germinate(self.seed, isolation=isolation)
        self.optimizer.add_param_group({"params": list(self.seed.parameters())})
        self.slot.move(Stage.TRAINING)

    def step(self, measure: Callable[[], None] = lambda: None, shadow: bool = False) -> None:
        """One optimizer step on the next batch."""
        batch = next(self.batches)
        self.optimizer.zero_grad()
        self.task.loss(self.model, batch).backward()
        if shadow:
            self._shadow_gradients(batch)
        measure()
        self.optimizer.step()
        self.steps += 1

    def learn_behind(self, steps: int) -> dict[str, list[Any]]:
        """Steps in TRAINING; at each look, and at the end, what the gates would know of the seed.

        Mean and t of the blend gain are over the last ``GAIN_SAMPLES`` steps, displacement is since germination.
        """
        parameters, gains = list(self.seed.parameters()), []
        mark = Mark.of(parameters, 0)
        found: dict[str, list[Any]] = {"steps": [], "gain": [], "t": [], "displacement": []}
        for step in range(1, steps + 1):
            self.slot.alpha.grad = None
            self.step()
            gains.append(-self.slot.alpha.grad.item())
            if step in LOOKS or step == steps:
                known = [gain for gain in gains[-GAIN_SAMPLES:] if math.isfinite(gain)]
                values = (step, statistics.fmean(known) if known else None, t_statistic(known)[0])
                for name, value in zip(found, (*values, mark.displacement(parameters))):
                    found[name].append(value)
        return found

    def blend_by_gates(
        self, steps: int, ramp: AlphaSchedule, probed: bool, sabotage: Sabotage
    ) -> tuple[float | None, list[float], dict[str, Any]]:
        """Let a controller decide for ``steps``.

        Returns the loss when it began to blend, None if never, those since, and how it ended: the stage, the reason of
        a prune, and how many epochs after ``once_felt`` that was.
        """
        task, began, before = self.task, steps, None
        events: list[dict[str, Any]] = []
        evaluate = (lambda twin: task.sample_losses(twin, task.probe)) if probed else None
        growth = GrowthController(
            self.model, self.optimizer, schedule=ramp, sinks=[events.append], evaluate=evaluate
        )
        growth.germinate("slot", self.seed, **sabotage.germinate())
        losses, touched = [], None

        def measured() -> None:
            growth.measure()
            sabotage.before_step(self.seed)

        for step in range(1, steps + 1):
            self.step(measured)
            if began < step <= began + ramp.steps + WATCHED and step % EVERY == 0:
                losses.append(self.validate())
            if step % EPOCH == 0:
                told = {} if probed else {"loss": task.sample_losses(self.model, task.probe).mean().item()}
                for verdict in growth.end_epoch(**told):
                    if verdict.passed and verdict.target is Stage.BLENDING:
                        began, before = step, self.validate()
                if touched is None and step == began + EPOCH:
                    touched = growth.epoch
                    sabotage.once_felt(self.seed, self.optimizer.param_groups[-1])
        pruned = next((event for event in events if event["event"] == "pruned"), None)
        # A slot whose seed was taken out rests, and is empty at the end.
        ended = {
            "stage": "PRUNED" if pruned else str(self.slot.stage),
            "reason": pruned and pruned["reason"],
            "epochs_felt": pruned and touched and pruned["epoch"] - touched,
        }
        return before, losses, ended

    def _shadow_gradients(self, batch: Any) -> None:
        """Give the seed the gradients of the loss at alpha 1, for one more forward pass; the host keeps its own.

        That pass draws random numbers and moves averages of a BatchNorm, and the host must feel neither.
        """
        kept, numbers = [buffer.detach().clone() for buffer in self.model.buffers()], torch.get_rng_state()
        self.slot.set_alpha(1.0)
        parameters = list(self.seed.parameters())
        gradients = torch.autograd.grad(self.task.loss(self.model, batch), parameters)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        self.slot.set_alpha(0.0)
        torch.set_rng_state(numbers)
        for buffer, before in zip(self.model.buffers(), kept):
            buffer.detach().copy_(before)

    def validate(self) -> float:
        """Mean loss on the held-out truth; a NaN counts as infinite, so that it is the worst in every comparison."""
        loss = self.task.sample_losses(self.model, self.task.truth).mean().item()
        return math.inf if math.isnan(loss) else loss


def run(case: Case) -> dict[str, Any]:
    """One life; validation losses are those of the held-out part ``truth``."""
    torch.set_num_threads(1)
    begun = time.perf_counter()
    task, strategy, phases = ALL_TASKS[case.task]().trained_by(case.optimizer), case.strategy, case.phases
    sabotage = SABOTAGED.get(strategy, Sabotage)()
    task = sabotage.task(task, case.random_seed)
    life = Life(task, case.random_seed)
    if strategy == AGAIN:
        life.seed = task.seed()
    if strategy == LARGER:
        life.plant()
        life.slot.move(Stage.BLENDING)
        life.slot.set_alpha(1.0)
    for _ in range(task.warm_steps if phases.warm is None else phases.warm):
        life.step()
    at_germination, behind, ended = life.validate(), None, None
    if strategy in (GATED, UNPROBED, *SABOTAGED):
        steps = phases.training + phases.ramp.steps + phases.after
        before_blending, losses, ended = life.blend_by_gates(steps, phases.ramp, strategy != UNPROBED, sabotage)
    else:
        before_blending, losses, behind = _by_step_count(life, strategy, phases)
    return {
        "task": case.task,
        "optimizer": case.optimizer,
        "strategy": strategy,
        "random_seed": case.random_seed,
        "loss_at_germination": at_germination,
        "behind": behind,
        "ended": ended,
        "loss_before_blending": before_blending,
        # Without growth: what the host alone did in these steps.
        "worst_while_blending": None if strategy == LARGER else max(losses, default=None),
        "final_loss": life.validate(),
        "final_accuracy": task.accuracy(life.model, task.truth),
        "seconds": time.perf_counter() - begun,
        "parameters": sum(parameter.numel() for parameter in life.model.parameters()),
        "steps": life.steps,
    }


def _by_step_count(life: Life, strategy: str, phases: Phases) -> tuple[float, list[float], dict[str, Any] | None]:
    """Behind the host, blended and on, each for so many steps.

    Returns the loss before blending, those while, and what ``learn_behind`` says, for an isolation.
    """
    grows = strategy not in (NO_GROWTH, LARGER)
    at_once = strategy in (AT_ONCE, AGAIN)
    behind = 0 if at_once else phases.training
    if grows:
        life.plant(ISOLATIONS.get(strategy))
    if at_once or strategy == SHADOW:
        # The shadow's host is undisturbed as well: at alpha 0 a blend is exactly the host.
        life.slot.move(Stage.BLENDING)
    known = life.learn_behind(behind) if strategy in ISOLATIONS else None
    for _ in range(0 if known else behind):
        life.step(shadow=strategy == SHADOW)
    before_blending = life.validate()
    if strategy in ISOLATIONS:
        life.slot.move(Stage.BLENDING)
    watched = phases.ramp.steps + min(WATCHED, phases.after)
    losses = []
    for step in range(1, watched + 1):
        life.step()
        if grows:
            life.slot.set_alpha(phases.ramp(step))
        if step % EVERY == 0:
            losses.append(life.validate())
    for _ in range(phases.training - behind + phases.ramp.steps + phases.after - watched):
        life.step()
    return before_blending, losses, known


@dataclasses.dataclass(frozen=True)
class Bar:
    """One promise, and what became of it."""

    passed: bool
    words: str

    def __str__(self) -> str:
        return f"{'kept  ' if self.passed else 'MISSED'} {self.words}"


def bars(runs: Sequence[dict[str, Any]], strategy: str = DEFAULT) -> Iterator[Bar]:
    """What is promised of the library's default way to train behind the host, and of its gates."""
    promised = [found for found in runs if found["optimizer"] not in UNPROMISED]
    for optimizer, task in dict.fromkeys((found["optimizer"], found["task"]) for found in promised):
        of = {
            name: {
                found["random_seed"]: found
                for found in promised
                if (found["optimizer"], found["task"], found["strategy"]) == (optimizer, task, name)
            }
            for name in (strategy, NO_GROWTH)
        }
        ours, alone = of[strategy], {seed: found["final_loss"] for seed, found in of[NO_GROWTH].items()}
        if not ours:
            continue
        blended = [found for found in ours.values() if found["worst_while_blending"] is not None]
        rises = [over(found) - 1.0 for found in blended]
        later = max((over(found, "loss_before_blending") - 1.0 for found in blended), default=0.0)
        within = sum(one <= MAX_RISE for one in rises)
        yield Bar(
            within == len(rises),
            f"{optimizer}, {task}: {strategy} rises while blending by at most {MAX_RISE:.0%} over germination: "
            f"{max(rises, default=0.0):+.1%}, {within} of {len(rises)} runs that blended ({later:+.1%} over the moment "
            "before blending)",
        )
        finals = [found["final_loss"] for found in ours.values()]
        middle, without = statistics.median(finals), statistics.median(alone.values())
        better = sum(found["final_loss"] < alone[random_seed] for random_seed, found in ours.items())
        yield Bar(
            middle < without,
            f"{optimizer}, {task}: {strategy} ends lower than no growth: {middle:.4f} against {without:.4f}, "
            f"{better} of {len(finals)} runs",
        )


def lives(runs: Sequence[dict[str, Any]]) -> Iterator[Bar]:
    """What is promised of single lives that the gates decide about, against no growth, chance and sabotage."""
    first = [found for found in runs if found["optimizer"] == ADAMW]
    for strategy in (GATED, UNPROBED):
        worse, count = close_to(first, strategy, NO_GROWTH)
        if not count:
            continue
        yield Bar(worse == 0, f"{strategy}: {worse} of {count} lives end more than {CLOSE:.0%} above no growth")
        above, count = close_to(first, strategy, AT_ONCE)
        chance, of = close_to(first, AGAIN, AT_ONCE)
        yield Bar(
            count - above >= NOT_WORSE * count,
            f"{strategy}: {count - above} of {count} lives end below blending at once or within {CLOSE:.0%} of it; "
            f"with other first weights of the seed that itself does so in {of - chance} of {of}",
        )
    sabotaged = [found for found in first if found["strategy"] in SABOTAGED]
    if sabotaged:
        kept = [found for found in sabotaged if permanent(found)]
        harmful, _ = close_to(first, kept, NO_GROWTH)
        yield Bar(
            harmful == 0,
            f"{len(kept)} of {len(sabotaged)} sabotaged seeds became permanent, {harmful} of them in lives that end "
            f"more than {CLOSE:.0%} above no growth",
        )


def run_all(cases: Sequence[Case], processes: int) -> list[dict[str, Any]]:
    """Every case, in this order, with a line each as it is done."""
    runs = []

    def keep(found: dict[str, Any]) -> None:
        runs.append(found)
        worst = found["worst_while_blending"]
        print(
            f"{len(runs):3d}/{len(cases)} {found['optimizer']:8s} {found['task']:20s} {found['strategy']:23s} "
            f"{found['random_seed']}: "
            f"germination {found['loss_at_germination']:.4f}, worst {'-' if worst is None else f'{worst:.4f}'}, "
            f"final {found['final_loss']:.4f}, {found['seconds']:.1f} s",
            flush=True,
        )

    if processes == 1:
        for case in cases:
            keep(run(case))
        return runs
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(run, cases):
            keep(found)
    return runs


def cases_of_gates(record: dict[str, Any]) -> list[Case]:
    """The lives of an earlier output in which the gates decide; nothing else depends on what a gate asks."""
    phases = record["header"]["phases"]
    whole = Phases(**{**phases, "ramp": AlphaSchedule(**phases["ramp"])})
    return [
        Case(found["task"], found["strategy"], found["random_seed"], whole, found["optimizer"])
        for found in record["runs"]
        if found["strategy"] in (GATED, UNPROBED, *SABOTAGED)
    ]


def again_by_gates(path: pathlib.Path, command: str, processes: int) -> list[dict[str, Any]]:
    """Live an output's lives under the gates again, and write them in the place of those; its header says so."""
    record = json.loads(path.read_text(encoding="utf-8"))
    head = {**record["header"], "gates": {**header(command), "threads": 1, "processes": processes}}
    cases = cases_of_gates(record)
    anew = dict(zip(((c.task, c.optimizer, c.strategy, c.random_seed) for c in cases), run_all(cases, processes)))
    runs = [
        anew.get((found["task"], found["optimizer"], found["strategy"], found["random_seed"]), found)
        for found in record["runs"]
    ]
    path.write_text(json.dumps({"header": head, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    return runs


def _judged(runs: Sequence[dict[str, Any]]) -> int:
    found = [*bars(runs), *bars(runs, GATED), *lives(runs)]
    print(*found, sep="\n")
    return 0 if all(bar.passed for bar in found) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tasks", nargs="+", choices=[*SETS, *ALL_TASKS], metavar="TASK",
        help=f"{', '.join(ALL_TASKS)}, or a set of them: {', '.join(SETS)}; the first {len(TASKS)} unless told",
    )  # fmt: skip
    parser.add_argument("--optimizers", nargs="+", choices=ROWS, metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, help=f"random seeds per task and strategy, by optimizer {SEEDS}")
    parser.add_argument("--warm", type=int, help="steps of the host alone; each task's own unless told")
    parser.add_argument("--quick", action="store_true", help="two tasks, few strategies and random seeds, fewer steps")
    parser.add_argument("--processes", type=int, default=2, help="at the same time, one thread each; 2 unless told")
    parser.add_argument("--output", type=pathlib.Path, help="JSON; bench/results/ unless told, for a whole set")
    parser.add_argument(
        "--gates-of", type=pathlib.Path, metavar="OUTPUT",
        help="live the lives of an earlier output in which the gates decide again, in their place, and no others",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    for name in ("seeds", "warm", "processes"):
        number = getattr(options, name)
        if number is not None and number < 1:
            parser.error(f"--{name} must be at least 1, got {number}")
    others = [name for name in ("tasks", "optimizers", "seeds", "warm", "quick", "output") if getattr(options, name)]
    if options.gates_of is not None and others:
        parser.error(f"--gates-of lives the cases of that output again, in its place: leave --{others[0]} out")
    return options


def _cases(
    tasks: Sequence[str], optimizers: Sequence[str], seeds: int | None, phases: Phases, quick: bool
) -> list[Case]:
    """Every way to grow by every optimizer, and the sabotaged seeds by the first."""
    cases = [
        Case(task, strategy, random_seed, phases, optimizer)
        for optimizer in optimizers
        for task in tasks
        for strategy in (QUICK_STRATEGIES if quick else ROWS[optimizer])
        for random_seed in range(seeds or SEEDS[optimizer])
    ]
    if not quick and ADAMW in optimizers:
        cases += [
            Case(task, strategy, random_seed, phases)
            for task in tasks
            for strategy in SABOTAGED
            for random_seed in range(min(seeds or SABOTAGE_SEEDS, SABOTAGE_SEEDS))
        ]
    return cases


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write, and print what became of the bars; 1 when one is missed."""
    options = _options(arguments)
    command = shlex.join(["python", "-m", "bench.growth", *(sys.argv[1:] if arguments is None else arguments)])
    if options.gates_of is not None:
        return _judged(again_by_gates(options.gates_of, command, options.processes))
    tasks = chosen(options.tasks or (QUICK_TASKS if options.quick else TASKS))
    seeds = options.seeds or (QUICK_SEEDS if options.quick else None)
    phases = dataclasses.replace(QUICK_PHASES if options.quick else Phases(), warm=options.warm)
    optimizers = options.optimizers or ([ADAMW] if options.quick else list(ROWS))
    cases = _cases(tasks, optimizers, seeds, phases, options.quick)
    # Before the first run: files may change while it goes on.
    head = {
        **header(command),
        "threads": 1,
        "processes": options.processes,
        "phases": dataclasses.asdict(phases),
        "default": DEFAULT,
        "rates": {name: OPTIMIZERS[name].lr for name in optimizers},
    }
    runs = run_all(cases, options.processes)
    output = options.output
    kind = {tuple(TASKS): "growth", tuple(NEW_TASKS): "new-growth"}.get(tuple(tasks))
    partial = options.quick or options.seeds or options.warm or options.optimizers
    if output is None and kind and not partial:
        output = ROOT / "bench" / "results" / f"{kind}-{datetime.date.today()}.json"
    if output is not None:
        output.write_text(json.dumps({"header": head, "runs": runs}, indent=1) + "\n", encoding="utf-8")
        print(f"written: {output}")
    return _judged(runs)


if __name__ == "__main__":
    sys.exit(main())
