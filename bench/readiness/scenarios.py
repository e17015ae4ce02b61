"""What can go right and wrong while a seed trains behind a host: the rows of the readiness benchmark.

Each scenario changes one thing of an ordinary training loop, and names the check of gate G2 that has to
speak up. Whether the seed was ready is measured, not written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.tasks import Data, Residual, Task
from seedtriton import GrowthController

LEARNING, NOT_LEARNING, BROKEN = "learning", "not learning", "broken measurement"


class Run:
    """One training run: what a scenario may lay hands on."""

    def __init__(self, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.task, self.model, self.optimizer = task, model, optimizer
        self.growth: GrowthController
        self.batches: Any
        self.seed: nn.Module
        self.step = 0  # optimizer steps since germination
        self.steps = 0  # of the whole run

    def host_parameters(self) -> list[Tensor]:
        own = {id(parameter) for parameter in self.seed.parameters()}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in own]

    def seed_gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.seed.parameters() if parameter.grad is not None]

    def seed_group(self) -> dict[str, Any]:
        own = {id(parameter) for parameter in self.seed.parameters()}
        return next(group for group in self.optimizer.param_groups if id(group["params"][0]) in own)


class Scenario:
    """The healthy seed in an ordinary loop; the others override one step of it.

    Attributes:
        name: of the row.
        kind: what it usually is, for grouping only: LEARNING, NOT_LEARNING, or BROKEN when nothing true can be
            measured and a refusal that says so is the only right verdict.
        causes: checks of G2, one of which a refusal must name.
    """

    name = "healthy"
    kind = LEARNING
    causes: tuple[str, ...] = ()

    def task(self, task: Task, random_seed: int) -> Task:
        """The task, changed before anything is trained."""
        return task

    def seed(self, task: Task) -> nn.Module:
        """The seed."""
        return task.seed()

    def germinate(self, task: Task) -> dict[str, Any]:
        """Arguments of ``growth.germinate``."""
        return {}

    def prepare(self, run: Run) -> None:
        """Once, after germination."""

    def one_step(self, run: Run) -> None:
        """From a batch to the optimizer's step."""
        self.backward(run)
        self.before_measuring(run)
        run.growth.measure()
        self.before_stepping(run)
        run.optimizer.step()
        run.optimizer.zero_grad()

    def backward(self, run: Run) -> None:
        """Fill the gradients."""
        self.loss(run, next(run.batches)).backward()

    def loss(self, run: Run, batch: Data) -> Tensor:
        """The loss of one batch."""
        return run.task.loss(run.model, batch)

    def before_measuring(self, run: Run) -> None:
        """Between backward and ``measure()``."""

    def before_stepping(self, run: Run) -> None:
        """Between ``measure()`` and the step."""


# --- usually learning ---------------------------------------------------------------------------------------


class ZeroStart(nn.Module):
    """A residual branch behind a gate that starts at 0 (ReZero)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch, self.gate = branch, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.branch(x)


class ReZero(Scenario):
    """The branch is multiplied by a scalar that starts at 0: no gradient for its weights at first."""

    name = "ReZero start"

    def seed(self, task: Task) -> nn.Module:
        hidden = task.hidden
        return ZeroStart(nn.Sequential(task.layer(task.width, hidden), nn.ReLU(), task.layer(hidden, task.width)))


class LowRank(Scenario):
    """x + B A x with B = 0, as LoRA starts."""

    name = "LoRA start"

    def seed(self, task: Task) -> nn.Module:
        seed = Residual(task.width, task.hidden, task.layer)
        nn.init.zeros_(seed.contract.weight)
        nn.init.zeros_(seed.contract.bias)
        return seed


class FrozenHost(Scenario):
    """No parameter of the host trains: the ratio has nothing to divide by."""

    name = "frozen host"

    def prepare(self, run: Run) -> None:
        for parameter in run.host_parameters():
            parameter.requires_grad_(False)
            parameter.grad = None


class SmallSeed(Scenario):
    """Two hidden units behind a host eight times as wide."""

    name = "small seed, large host"

    def task(self, task: Task, random_seed: int) -> Task:
        return task.widened(8)

    def seed(self, task: Task) -> nn.Module:
        return task.seed(hidden=2)


class LargeSeed(Scenario):
    """Many times the host's parameters."""

    name = "large seed, small host"

    def seed(self, task: Task) -> nn.Module:
        return task.seed(hidden=8 * task.hidden)


class LateBloomer(Scenario):
    """The seed's learning rate is 0 for the first third of the run."""

    name = "late bloomer"

    def before_stepping(self, run: Run) -> None:
        run.seed_group()["lr"] = run.task.lr if run.step >= run.steps // 3 else 0.0


class Autocast(Scenario):
    """Forward passes in bf16."""

    name = "bf16 autocast"

    def loss(self, run: Run, batch: Data) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = run.model(batch[0])
        return run.task.losses(output.float(), batch[1]).mean()


class Accumulation(Scenario):
    """Four backward passes of a quarter batch per step."""

    name = "accumulation"

    def backward(self, run: Run) -> None:
        inputs, targets = next(run.batches)
        for part in zip(inputs.chunk(4), targets.chunk(4)):
            (self.loss(run, part) / 4).backward()


class GlobalClipping(Scenario):
    """All gradients clipped together, hard, and before measuring."""

    name = "global clipping"

    def before_measuring(self, run: Run) -> None:
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.05)


# --- not learning -------------------------------------------------------------------------------------------

STANDS_STILL = ("weights_not_moved",)
NO_GAIN = ("blend_gain_insignificant",)


class ZeroRate(Scenario):
    """Learning rate 0."""

    name, kind, causes = "learning rate 0", NOT_LEARNING, STANDS_STILL

    def germinate(self, task: Task) -> dict[str, Any]:
        return {"lr": 0.0}


class Crawling(Scenario):
    """A learning rate of 1e-6: the slope at alpha 0 grows certain long before the whole blend is any good."""

    name, kind = "learning rate 1e-6", NOT_LEARNING
    causes = (*STANDS_STILL, *NO_GAIN, "blend_lowers_no_loss", "blend_would_harm")

    def germinate(self, task: Task) -> dict[str, Any]:
        return {"lr": 1e-6}


class NoOptimizer(Scenario):
    """The seed is in no optimizer; its gradients are zeroed with the model's."""

    name, kind, causes = "in no optimizer", NOT_LEARNING, ("seed_in_no_optimizer",)

    def germinate(self, task: Task) -> dict[str, Any]:
        return {"add_to_optimizer": False}

    def before_stepping(self, run: Run) -> None:
        for gradient in run.seed_gradients():
            gradient.zero_()


class NeverStepped(NoOptimizer):
    """The seed has an optimizer of its own, which nobody steps."""

    name, causes = "optimizer never stepped", ("optimizer_never_stepped",)

    def prepare(self, run: Run) -> None:
        self._own = torch.optim.AdamW(run.seed.parameters(), lr=run.task.lr)
        run.growth.monitor.watch(self._own)


class DeadReLU(Scenario):
    """The hidden units are far below zero and never fire; only the last bias gets a gradient."""

    name, kind, causes = "dead ReLU", NOT_LEARNING, ("gradients_dead",)

    def seed(self, task: Task) -> nn.Module:
        seed = task.seed()
        nn.init.constant_(seed.expand.bias, -100.0)
        return seed


class AllZero(Scenario):
    """Every weight is zero: a saddle that only the last bias can leave."""

    name, kind, causes = "all-zero init", NOT_LEARNING, ("gradients_dead",)

    def seed(self, task: Task) -> nn.Module:
        seed = task.seed()
        for parameter in seed.parameters():
            nn.init.zeros_(parameter)
        return seed


class Detaching(nn.Module):
    """A seed whose author detached its output; the addition of a zero keeps autograd content."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).detach() + 0.0 * sum(parameter.sum() for parameter in self.inner.parameters())


class DetachedOutput(Scenario):
    """The seed's output is detached: every gradient is zero."""

    name, kind, causes = "output detached", NOT_LEARNING, ("gradients_dead", "seed_gradient_missing")

    def seed(self, task: Task) -> nn.Module:
        return Detaching(task.seed())


class RandomLabels(Scenario):
    """Labels have nothing to do with the inputs, for the host too: what is learned is learned by heart."""

    name, kind = "random labels", NOT_LEARNING
    causes = (*NO_GAIN, "blend_lowers_no_loss", "blend_would_harm")

    def task(self, task: Task, random_seed: int) -> Task:
        return task.with_shuffled_labels(random_seed)


class BiasesOnly(Scenario):
    """Only the biases train; the weights stay random."""

    name, kind, causes = "only biases move", NOT_LEARNING, (*NO_GAIN, "blend_lowers_no_loss", "blend_would_harm")

    def prepare(self, run: Run) -> None:
        group = run.seed_group()
        group["params"] = [parameter for name, parameter in run.seed.named_parameters() if name.endswith("bias")]
        for name, parameter in run.seed.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))


class WeightDecayAlone(Scenario):
    """The gradients are thrown away after they were measured: only decay moves the weights."""

    name, kind, causes = "weight decay alone", NOT_LEARNING, (*NO_GAIN, "blend_lowers_no_loss", "blend_would_harm")

    def germinate(self, task: Task) -> dict[str, Any]:
        return {"weight_decay": 1.0}

    def before_stepping(self, run: Run) -> None:
        for gradient in run.seed_gradients():
            gradient.zero_()


class Oscillating(Scenario):
    """A learning rate that is far too high."""

    name, kind = "oscillating", NOT_LEARNING
    causes = (*NO_GAIN, "seed_gradient_exploding", "blend_would_harm", "blend_lowers_no_loss")

    def germinate(self, task: Task) -> dict[str, Any]:
        return {"lr": 1.0}


class Bursting(nn.Module):
    """A seed that returns NaN on every tenth batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return self.inner(x) * (math.nan if self.training and self.calls % 10 == 0 else 1.0)


class NanBursts(Scenario):
    """Now and then the seed's gradients are NaN, and the optimizer steps all the same."""

    name, kind, causes = "NaN bursts", NOT_LEARNING, ("gradients_not_finite", "gradient_not_finite")

    def seed(self, task: Task) -> nn.Module:
        return Bursting(task.seed())


class Loud(nn.Module):
    """A residual branch whose output is multiplied by a large number."""

    def __init__(self, branch: nn.Module, factor: float) -> None:
        super().__init__()
        self.branch, self.factor = branch, factor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor * (self.branch(x) - x)


class Exploding(Scenario):
    """The branch is ten thousand times too loud."""

    name, kind, causes = "exploding", NOT_LEARNING, ("seed_gradient_exploding", "gradients_exploding")

    def seed(self, task: Task) -> nn.Module:
        return Loud(task.seed(), 1e4)


class ZeroedByHook(Scenario):
    """A hook multiplies the seed's gradients by zero."""

    name, kind, causes = "gradients zeroed by a hook", NOT_LEARNING, ("gradients_dead",)

    def prepare(self, run: Run) -> None:
        for parameter in run.seed.parameters():
            parameter.register_hook(torch.zeros_like)


class ValueClipping(Scenario):
    """Every element clipped to 1e-5 before measuring, which makes any ratio; the seed's rate is 1e-8."""

    name, kind, causes = "value clipping", NOT_LEARNING, STANDS_STILL

    def germinate(self, task: Task) -> dict[str, Any]:
        return {"lr": 1e-8}

    def before_measuring(self, run: Run) -> None:
        nn.utils.clip_grad_value_(run.model.parameters(), 1e-5)


class StillScaled(Scenario):
    """The loss is scaled by 65536, the host's gradients are unscaled, the seed's SGD forgets to."""

    name, kind = "one side left loss-scaled", NOT_LEARNING
    causes = ("seed_gradient_exploding", "gradient_not_finite", "gradients_not_finite")

    def germinate(self, task: Task) -> dict[str, Any]:
        return {"add_to_optimizer": False}

    def prepare(self, run: Run) -> None:
        self._own = torch.optim.SGD(run.seed.parameters(), lr=0.01)
        run.growth.monitor.watch(self._own)

    def backward(self, run: Run) -> None:
        (65536.0 * self.loss(run, next(run.batches))).backward()
        for parameter in run.host_parameters():
            parameter.grad.div_(65536.0)
        run.model.slot.alpha.grad.div_(65536.0)

    def before_stepping(self, run: Run) -> None:
        self._own.step()
        self._own.zero_grad()


class Saturated(nn.Module):
    """A residual branch behind a sigmoid deep in its flat part."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.branch(x) - 18.0)


class HostOnly(Scenario):
    """The case of the original review: the host improves, the seed is saturated and does not."""

    name, kind, causes = "host-only improvement", NOT_LEARNING, ("seed_gradient_low",)

    def task(self, task: Task, random_seed: int) -> Task:
        return task.warmed(task.warm_steps // 4)

    def germinate(self, task: Task) -> dict[str, Any]:
        # Adam makes steps of one size out of gradients of any: at the usual rate it would climb out in time.
        return {"lr": 0.01 * task.lr}

    def seed(self, task: Task) -> nn.Module:
        hidden = task.hidden
        return Saturated(nn.Sequential(task.layer(task.width, hidden), nn.ReLU(), task.layer(hidden, task.width)))


# --- nothing true can be measured ---------------------------------------------------------------------------


class PerGroupClipping(Scenario):
    """Host and seed clipped apart before measuring: any ratio can be made that way."""

    name, kind, causes = "per-group clipping", BROKEN, ("clipped_before_measuring",)

    def before_measuring(self, run: Run) -> None:
        nn.utils.clip_grad_norm_(run.host_parameters(), 1e-3)
        nn.utils.clip_grad_norm_(run.seed.parameters(), 1e-3)


class MeasuredTooLate(Scenario):
    """``measure()`` stands behind ``zero_grad()``."""

    name, kind, causes = "measured after zero_grad", BROKEN, ("seed_gradient_missing",)

    def one_step(self, run: Run) -> None:
        self.backward(run)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.growth.measure()


SCENARIOS: tuple[Callable[[], Scenario], ...] = (
    Scenario, ReZero, LowRank, FrozenHost, SmallSeed, LargeSeed, LateBloomer, Autocast, Accumulation, GlobalClipping,
    ZeroRate, Crawling, NoOptimizer, NeverStepped, DeadReLU, AllZero, DetachedOutput, RandomLabels, BiasesOnly,
    WeightDecayAlone, Oscillating, NanBursts, Exploding, ZeroedByHook, ValueClipping, StillScaled, HostOnly,
    PerGroupClipping, MeasuredTooLate,
)  # fmt: skip
