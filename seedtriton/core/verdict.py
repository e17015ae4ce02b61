"""What a gate is asked and what it answers: SeedStatus in, Verdict out, one Check per question.

Refusing is data: every question stands there with its value, its limit and a reason. Each has a stable name; the
numbers stand beside it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from .errors import StateDictError
from .evidence import SeedEvidence, collect_evidence
from .harm import Watch
from .lifecycle import Stage, stage_named
from .probe import BlendProbe
from .state import PlainState, check_state, plain
from .tensors import TensorReading

STRICT = "strict"
PERMISSIVE = "permissive"

SEED_REPLACES_HOST = "seed_replaces_host"
MODES_DISAGREE = "training_and_evaluation_disagree"
# Answers on which no verdict hangs, and which whoever reads it should see.
WARNINGS = frozenset({SEED_REPLACES_HOST, MODES_DISAGREE})


class Gate(enum.IntEnum):
    """The gates; 4 is reserved."""

    G0 = 0
    G1 = 1
    G2 = 2
    G3 = 3
    G5 = 5

    def __str__(self) -> str:
        """The name alone."""
        return self.name


@dataclass(frozen=True)
class Check(PlainState):
    """One question of a gate and its answer.

    Attributes:
        question: stable name of the question, the same whatever the answer.
        name: stable name of the answer, such as "seed_gradient_active" or "seed_gradient_low".
        passed: True, False, or None when the question was not asked.
        value: what was measured; None when nothing was.
        limit: the limit it was held against.
        reason: the answer in words.
    """

    question: str
    name: str
    passed: bool | None
    value: float | int | bool | str | None = None
    limit: float | int | bool | str | None = None
    reason: str = ""

    @property
    def label(self) -> str:
        """Name and number together, as the original gates wrote it: ``seed_gradient_low_0.01``."""
        if isinstance(self.value, float):
            return f"{self.name}_{self.value:.2f}"
        return self.name


@dataclass(frozen=True)
class Verdict:
    """What a gate says of one seed: passed or refused, with every question it asked; true where it passed.

    Attributes:
        gate: which one was asked.
        target: the stage that it guards.
        seed: the name of the seed, its slot's path in the model.
        passed: whether nothing was answered with no.
        checks: every question, causes before symptoms.
        mode: "strict" or "permissive".
    """

    gate: Gate
    target: Stage
    seed: str
    passed: bool
    checks: tuple[Check, ...]
    mode: str = STRICT

    VERSION = 1

    @property
    def failed(self) -> tuple[Check, ...]:
        """The questions that were answered with no."""
        return tuple(check for check in self.checks if check.passed is False)

    @property
    def warnings(self) -> tuple[Check, ...]:
        """Answers that decide nothing and should be seen."""
        return tuple(check for check in self.checks if check.name in WARNINGS)

    def __bool__(self) -> bool:
        """Whether it passed: ``if growth.advance(slot):``."""
        return self.passed

    def __repr__(self) -> str:
        """The answer and the names of what was refused; ``str`` has the reasons, ``checks`` everything."""
        refused = ", ".join(check.label for check in self.failed)
        answer = "passed" if self.passed else "refused"
        return f"Verdict({self.gate} {answer} {self.seed!r} for {self.target}{': ' if refused else ''}{refused})"

    def __str__(self) -> str:
        """One line that a person can read in a log."""
        head = f"{self.gate} {'passed' if self.passed else 'refused'} {self.seed!r} for {self.target}"
        parts = [", ".join(check.label for check in self.checks if check.passed)] if self.passed else []
        # What was never measured fails several questions, in the same words.
        parts += dict.fromkeys(f"{check.label} ({check.reason})" for check in (*self.failed, *self.warnings))
        return f"{head}: " + "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Gate and target by name, seed, passed, checks (each as ``Check.as_dict``) and mode, for tables and logs.

        Keys are kept from release to release; see ``PlainState.as_dict``.
        """
        values: dict[str, Any] = plain({key: value for key, value in self.state_dict().items() if key != "version"})
        return values | {"checks": [check.as_dict() for check in self.checks]}

    def state_dict(self) -> dict[str, Any]:
        """Plain, JSON-safe values."""
        return {
            "version": self.VERSION,
            "gate": str(self.gate),
            "target": str(self.target),
            "seed": self.seed,
            "passed": self.passed,
            "checks": [check.state_dict() for check in self.checks],
            "mode": self.mode,
        }

    @classmethod
    def from_state_dict(cls, state: object) -> Verdict:
        """The verdict saved by ``state_dict``; StateDictError when it does not fit."""
        keys = ("gate", "target", "seed", "passed", "checks", "mode")
        values = check_state(state, "Verdict", cls.VERSION, keys)
        gate, checks, passed, mode = (values[name] for name in ("gate", "checks", "passed", "mode"))
        if not isinstance(gate, str) or gate not in Gate.__members__ or not isinstance(checks, list):
            raise StateDictError(f"Verdict: unknown gate {gate!r} or checks that are no list")
        if type(passed) is not bool or mode not in (STRICT, PERMISSIVE):
            raise StateDictError(f"Verdict: passed is {passed!r} and mode {mode!r}")
        return cls(
            gate=Gate[gate],
            target=stage_named(values["target"]),
            seed=values["seed"],
            passed=passed,
            checks=tuple(Check.from_state_dict(check) for check in checks),
            mode=mode,
        )


@dataclass(frozen=True, kw_only=True)
class SeedStatus:
    """Everything a gate may ask about one seed at the moment of the verdict.

    Attributes:
        seed: its name.
        stage: where it is now.
        epochs_in_stage: epochs counted there.
        parameters: elements of its parameters that require a gradient.
        preserves_shape: output and input agreed in shape and dtype when tried; None: not yet tried.
        evidence: what was measured; None is the same as never measured.
        improvement: rise of the accuracy since TRAINING began, in percentage points; None: unknown.
        accuracy_change: change of the accuracy since BLENDING began, in percentage points; None: unknown.
        loss_rise: rise of the told loss since then, in changes that were usual from epoch to epoch; None: unknown.
        isolation_violations: forward passes in which the seed reached into the host.
        handed_on: how much of the host's features the seed handed on when it was first looked at, about 1 for one that
            returns ``x + f(x)`` and 0 for ``f(x)``; None: unknown.
        alpha: blend factor now.
        alpha_target: where it is going.
        alpha_holds: it has stopped there.
        progress: share of the whole training that is done, for thresholds that depend on it.
        probe: validation loss at alpha 0 and above, if it was tried; at G3 and G5 at the present alpha only.
        probe_due: epoch in which the loss is probed again after the probe refused the seed; None: nothing to wait for.
        watch: what the looks at a seed that is felt have found; None: nobody looked.
        tensors: single gradients of the host and the seed, largest first, for refusals to name; None: not read.
    """

    seed: str
    stage: Stage
    epochs_in_stage: int = 0
    parameters: int = 0
    preserves_shape: bool | None = None
    evidence: SeedEvidence | None = None
    improvement: float | None = None
    accuracy_change: float | None = None
    loss_rise: float | None = None
    isolation_violations: int = 0
    handed_on: float | None = None
    alpha: float = 0.0
    alpha_target: float = 1.0
    alpha_holds: bool = True
    progress: float | None = None
    probe: BlendProbe | None = None
    probe_due: int | None = None
    watch: Watch | None = None
    tensors: tuple[TensorReading, ...] | None = None

    @property
    def known(self) -> SeedEvidence:
        """The evidence, or an empty one that says "never measured"."""
        return self.evidence or collect_evidence(self.seed, (), parameters=0)
