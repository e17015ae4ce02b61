"""For people who write their own seeds and loops, and for our tests: does the host feel what trains behind it?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from .core.errors import ConfigurationError, WiringError
from .core.lifecycle import Stage
from .growth.controller import GrowthController
from .growth.slot import SeedSlot
from .rewind import State, random_states, same

Loss = Callable[[Tensor], Tensor]


@overload
def assert_isolated(step: Callable[[int], object], growth: GrowthController, *others: Any, steps: int = 10) -> None: ...


@overload
def assert_isolated(step: nn.Module, growth: Tensor, loss: Loss | None = None) -> dict[str, Tensor]: ...


def assert_isolated(
    step: Any, growth: Any, *others: Any, steps: int = 10, loss: Any = None
) -> dict[str, Tensor] | None:
    """Assert that a training step leaves the host, bit for bit, as it would without the seeds behind it.

    Takes ``steps`` steps twice from the same state and the same random state: as it is, and with the seeds behind the
    host pruned. After each step every parameter and buffer of the host, the optimizers' state for them and
    the scale of a GradScaler are compared. Afterwards everything is as it was before the call: model, optimizers,
    controller, random state::

        assert_isolated(lambda i: train_step(batches[i]), growth, scaler)

    Args:
        step: one optimizer step of the loop, called with 0, 1, 2, ...; which samples it takes must
            depend on that number or on the random state alone, because every number is asked for twice.
        growth: the controller of the loop; its model, optimizer and schedulers come with it.
        *others: what else a step changes: GradScaler, further optimizers, schedulers and modules, an object of
            yours with attributes. Parameters and buffers of such modules count as host.
        steps: how many. Memory for six copies of the training state is needed, however many they are.
        loss: of ``assert_isolated(model, inputs, loss)``, which is how ``assert_invisible`` was called once.

    Raises:
        AssertionError: after which step, which tensor differs, and the likeliest cause.
        WiringError: no seed is in TRAINING, none got a gradient, or nothing of the host learns.
        ConfigurationError: no controller, steps below 1, or a seed was moved on to blending by the steps.
    """
    if isinstance(step, nn.Module):
        return assert_invisible(step, growth, *(others or (loss,)))
    if not isinstance(growth, GrowthController):
        raise ConfigurationError(
            f"the second argument is the loop's GrowthController, assert_isolated(step, growth), got "
            f"{type(growth).__name__}"
        )
    if type(steps) is not int or steps < 1:
        raise ConfigurationError(f"steps must be a whole number of at least 1, got {steps!r}")
    script = _Script(step, growth, others)
    before = script.state()
    try:
        growth.telemetry.sinks.clear()  # nothing that is tried out is told
        grown = script.state()
        script.prune()
        bare = plain = script.state()
        learned = False
        for number in range(steps):
            grown, with_seed = script.run(grown, number)
            script.refuse_blended(number)
            plain, without = script.run(plain, number)
            different = without.different(with_seed)
            if different:
                repeats = script.repeats(bare, number, without)
                cause = _cause(with_seed, without, different) if repeats else NOT_REPEATABLE
                found = _difference(different, with_seed.state, without.state)
                raise AssertionError(f"after step {number + 1} of {steps}: {found}. Likeliest cause: {cause}")
            learned = learned or with_seed.learned
        if not learned:
            raise WiringError(f"no seed got a gradient in {steps} steps, so nothing was shown: {script.seeds}")
    finally:
        before.restore()
    return None


def assert_invisible(model: nn.Module, inputs: Tensor, loss: Loss | None = None) -> dict[str, Tensor]:
    """Assert that seeds in TRAINING change neither the output nor a host gradient of one pass, bit for bit.

    Runs forward and backward on two copies of the model, one as it is and one with every slot emptied, with
    the same random state. For a seed by itself; what a loop makes of its gradients is seen by ``assert_isolated``.

    Args:
        model: contains slots with seeds in TRAINING; not changed.
        inputs: one batch for the model.
        loss: from the output to a scalar; the sum of squares unless told.

    Returns:
        The gradients that the seeds got, by parameter name.

    Raises:
        AssertionError: something differs, and what.
    """
    loss = loss or (lambda output: output.float().square().sum())
    grown, plain = copy.deepcopy(model), copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, SeedSlot):
            module.seed = module.gate = None
    results = []
    for candidate in (grown, plain):
        candidate.zero_grad(set_to_none=True)
        with torch.random.fork_rng():
            output = candidate(inputs)
            loss(output).backward()
        results.append(output)
    if not same(*results):
        raise AssertionError(f"the output differs by up to {(results[0] - results[1]).abs().max().item():.3g}")
    host = dict(plain.named_parameters())
    seeds = {}
    for name, parameter in grown.named_parameters():
        if name not in host:
            if parameter.grad is not None:
                seeds[name] = parameter.grad
        elif not same(parameter.grad, host[name].grad):
            raise AssertionError(f"the gradient of host parameter {name!r} differs")
    return seeds


# --- one step, and what was seen of it ---


@dataclass
class _Record:
    """One step of one of the two runs: what it must share with the other's, and what tells why it does not."""

    state: dict[str, Any] = field(default_factory=dict)  # compared, under the words of the message
    backward: dict[str, Tensor] = field(default_factory=dict)  # the host's gradients as backward left them
    stepped: dict[str, Tensor] = field(default_factory=dict)  # as an optimizer found them
    optimizer_steps: int = 0
    random: tuple[dict[str, Any], dict[str, Any]] = ({}, {})  # before and after the step
    scales: list[float] = field(default_factory=list)  # of GradScalers, after the step
    leaks: dict[str, int] = field(default_factory=dict)  # by slot, what its own check has found so far
    learned: bool = False  # whether a seed got a gradient

    def different(self, other: _Record) -> list[str]:
        """What is not the same in the other's state, of all that is in this one."""
        return [name for name, value in self.state.items() if not same(other.state.get(name), value)]


class _Script:
    """A step and everything that it is known to work on."""

    def __init__(self, step: Callable[[int], object], growth: GrowthController, others: Iterable[Any]) -> None:
        self.step, self.growth, self.others = step, growth, list(others)
        behind = (Stage.GERMINATED, Stage.TRAINING)
        self.seeds = [name for name, slot in growth.slots.items() if slot.stage in behind]
        if not any(growth.slots[name].stage is Stage.TRAINING for name in self.seeds):
            stages = {name: str(slot.stage) for name, slot in growth.slots.items()}
            raise WiringError(f"no seed trains behind the host, so there is nothing to compare: slots {stages}")
        self.own = {id(p) for name in self.seeds for p in growth.slots[name].parameters()}
        found = [growth.optimizer, *(other for other in others if isinstance(other, torch.optim.Optimizer))]
        self.optimizers = list({id(optimizer): optimizer for optimizer in found}.values())
        self.scalers = [other for other in self.others if isinstance(other, torch.amp.GradScaler)]
        if not any(parameter.requires_grad for parameter in self._parameters().values()):
            raise WiringError(
                "nothing of the host learns, so without the seed there is no step to compare with; "
                "assert_invisible(model, inputs) looks at a single pass"
            )

    def state(self) -> State:
        return State([self.growth, *self.optimizers, *self.others])

    def prune(self) -> None:
        """Take the seeds out as the library does, for good and from everywhere."""
        for name in self.seeds:
            self.growth.prune(name)
            self.growth.slots[name].vacate()

    def refuse_blended(self, number: int) -> None:
        for name in self.seeds:
            stage = self.growth.slots[name].stage
            if stage not in (Stage.GERMINATED, Stage.TRAINING):
                raise ConfigurationError(
                    f"the seed in {name!r} moved to {stage} in step {number + 1}: from there on the host shall feel "
                    "it. Take fewer steps, or end_epoch() and advance() out of the step"
                )

    def run(self, state: State, number: int) -> tuple[State, _Record]:
        """Take a step from a state: the state after it, and its record."""
        state.restore()
        record = _Record()
        before = random_states()
        with self._watching(record):
            self.step(number)
        record.random = before, random_states()
        record.scales = [scaler.get_scale() for scaler in self.scalers]
        record.leaks = {name: slot.isolation_violations for name, slot in self.growth.slots.items()}
        record.state = {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in self._compared().items()
        }
        return self.state(), record

    def repeats(self, state: State, last: int, record: _Record) -> bool:
        """Whether the steps up to this one, taken once more from ``state``, lead to the same record."""
        for number in range(last + 1):
            state, again = self.run(state, number)
        return not record.different(again)

    def _parameters(self) -> dict[str, Tensor]:
        """The host's, by name; those of optimizers that are in no module by their place."""
        found: dict[str, Tensor] = {}
        for prefix, module in self._modules():
            found |= {prefix + name: p for name, p in module.named_parameters() if id(p) not in self.own}
        known = {id(parameter) for parameter in found.values()} | self.own
        for optimizer in self.optimizers:
            loose = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
            found |= {f"{type(optimizer).__name__}[{index}]": p for index, p in enumerate(loose)}
            known |= {id(parameter) for parameter in loose}
        return found

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield "", self.growth.model
        for other in self.others:
            if isinstance(other, nn.Module) and other is not self.growth.model:
                yield f"{type(other).__name__}.", other

    def _compared(self) -> dict[str, Any]:
        """Everything of the host that a step may change, by what to call it; and buffers of seeds, while they exist."""
        parameters = self._parameters()
        found: dict[str, Any] = {f"parameter {name!r}": parameter for name, parameter in parameters.items()}
        for prefix, module in self._modules():
            found |= {f"buffer {prefix + name!r}": buffer for name, buffer in module.named_buffers()}
        for optimizer in self.optimizers:
            for name, parameter in parameters.items():
                for key, value in optimizer.state.get(parameter, {}).items():
                    found[f"{type(optimizer).__name__}'s {key} of parameter {name!r}"] = value
        for index, scaler in enumerate(self.scalers):
            found |= {f"GradScaler {index}'s {key}": value for key, value in scaler.state_dict().items()}
        return found

    @contextmanager
    def _watching(self, record: _Record) -> Iterator[None]:
        names = {parameter: name for name, parameter in self._parameters().items()}

        def note(gradients: dict[str, Tensor], parameter: Tensor) -> None:
            if parameter in names and parameter.grad is not None:
                gradients[names[parameter]] = parameter.grad.detach().clone()
            record.learned = record.learned or (id(parameter) in self.own and parameter.grad is not None)

        def before_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
            record.optimizer_steps += 1
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    note(record.stepped, parameter)

        watched = [*names, *(p for name in self.seeds for p in self.growth.slots[name].parameters())]
        handles: list[Any] = [
            p.register_post_accumulate_grad_hook(partial(note, record.backward)) for p in watched if p.requires_grad
        ]
        handles += [optimizer.register_step_pre_hook(before_step) for optimizer in self.optimizers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


# --- why ---

NOT_REPEATABLE = (
    "the step itself, which does not repeat without the seed either: it reads something that is no random generator "
    "and is reached from nothing that was given. Choose the batch by the step's number, and give what the step "
    "changes: assert_isolated(step, growth, scaler, ...)"
)


def _cause(grown: _Record, plain: _Record, different: list[str]) -> str:
    """What explains the first difference best, by what else differs in that step."""
    moved = [name for name in different if name.startswith("buffer")]
    buffer = f"a buffer that host and seed share: {moved[0] if moved else ''} is updated by the seed as well"
    if grown.scales != plain.scales:
        return (
            "a GradScaler skipped a step because of the seed alone, whose gradients were not finite (scale "
            f"{grown.scales[0]:g} with it, {plain.scales[0]:g} without): growth.measure(scaler) before "
            "scaler.unscale_(optimizer) prevents it"
        )
    if grown.optimizer_steps != plain.optimizer_steps:
        return f"{plain.optimizer_steps} optimizer steps without the seed, {grown.optimizer_steps} with it"
    if not same(grown.backward, plain.backward):
        return _in_backward(grown, plain) or (buffer if moved else UNSEEN_LEAK)
    if not same(grown.stepped, plain.stepped):
        return _between(grown, plain)
    return buffer if moved else IN_UPDATE


UNSEEN_LEAK = (
    "a leak: backward gives the host other gradients, from the same weights and random numbers. The seed reaches "
    "tensors of the host, or the host's forward pass reads something of the seed"
)
IN_UPDATE = (
    "the optimizer's own arithmetic, which got the same gradients: something in it mixes the parameters of several "
    "groups (a norm over all of them), or weights are written to beside it"
)


def _in_backward(grown: _Record, plain: _Record) -> str | None:
    """Why backward left other gradients to the host, if there is a trace of it."""
    leaking = [name for name, count in grown.leaks.items() if count > plain.leaks[name]]
    if leaking:
        return f"a leak: the seed in {leaking[0]!r} reaches tensors of the host, or writes into its input"
    drawn = _drawn(grown, plain)
    if drawn:
        return (
            f"shared random numbers: the seed draws from the host's generator ({drawn}), so that the host's Dropout "
            "and noise are others; let it draw from a torch.Generator of its own"
        )
    return None


def _between(grown: _Record, plain: _Record) -> str:
    """What happened to the host's gradients between backward, which left them equal, and the optimizer's step."""
    pairs = [(grown.stepped[name], gradient) for name, gradient in plain.stepped.items() if name in grown.stepped]
    if any(not bool(a.isfinite().all()) and bool(b.isfinite().all()) for a, b in pairs):
        return (
            "host and seed are clipped together, and the seed's gradients are not finite: the norm they share carried "
            f"that to the host. {CLIP_APART}, after growth.measure()"
        )
    norms = [(float(a.double().norm()), float(b.double().norm())) for a, b in pairs]
    factors = [a / b for a, b in norms if b > 0.0]
    low, high = min(factors, default=1.0), max(factors, default=1.0)
    if high - low <= 1e-2 * high:
        return (
            "host and seed are clipped together: between backward and the optimizer's step the host's gradients became "
            f"{low:.4g} times those without the seed. {CLIP_APART}"
        )
    return (
        "between backward and the optimizer's step something changed the host's gradients with an eye on the seed's, "
        f"and not by one factor ({low:.4g} to {high:.4g} times those without it)"
    )


CLIP_APART = "growth.clip_grad_norm_(max_norm) clips each by its own norm"


def _drawn(grown: _Record, plain: _Record) -> str:
    """The generators that stand elsewhere than without the seed, before the step or after it."""
    pairs = [*zip(grown.random, plain.random)]
    return ", ".join(name for name in plain.random[1] if any(not same(a.get(name), b.get(name)) for a, b in pairs))


def _difference(different: list[str], grown: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """The first difference, in words."""
    name, found, expected = different[0], grown.get(different[0]), plain[different[0]]
    more = f"; {len(different) - 1} more differ" if len(different) > 1 else ""
    if found is None:
        return f"{name} does not exist with the seed, and does without it{more}"
    if not (isinstance(found, Tensor) and isinstance(expected, Tensor) and found.shape == expected.shape):
        return f"{name} is {found} with the seed, {expected} without it{more}"
    if bool(expected.isfinite().all()) and not bool(found.isfinite().all()):
        return f"{name} is not finite with the seed, and finite without it{more}"
    elements = found != expected
    apart = (found.double() - expected.double()).abs().max() if found.numel() else 0.0
    count = f"{int(elements.sum())} of {found.numel()} elements, by up to {float(apart):.3g}"
    return f"{name} is not what it is without the seed ({count}{more})"
