"""What happens, as flat dicts of plain values; sinks.py says where they go."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..core.evidence import SeedEvidence
from ..core.lifecycle import Stage
from ..core.state import plain
from ..core.tensors import TensorReading
from ..core.verdict import Verdict

Event = dict[str, Any]

# What every event has: its name, and where training and slot are.
COORDINATES = ("event", "seed", "epoch", "step", "stage")


def gate_fields(verdict: Verdict) -> Event:
    """The fields of a verdict in a "gate" event: names and numbers apart."""
    return {
        "gate": str(verdict.gate),
        "target": str(verdict.target),
        "passed": verdict.passed,
        "checks": [dataclasses.asdict(check) for check in verdict.checks],
    }


def evidence_fields(evidence: SeedEvidence | None) -> Event:
    """The numbers of a seed's evidence in a "gate" or "epoch" event; None where nothing is known."""
    names = (
        "ratio", "rms_ratio", "host_norm", "seed_norm", "blend_gain", "blend_gain_t", "samples", "dropped",
        "seed_not_finite", "displacement", "live_share", "vanishing_share", "exploding_share", "health",
        "plateau_share",
    )  # fmt: skip
    return {name: getattr(evidence, name, None) for name in names}


def tensor_fields(reading: TensorReading) -> list[Any]:
    """One entry of ``tensors`` in the "epoch" event of no seed: name, shape, norm, RMS and state of a gradient.

    A norm that is not finite is None, and the state says so.
    """
    found: list[Any] = plain([reading.name, reading.shape, reading.norm, reading.rms, reading.state])
    return found


def numbers(event: Event) -> dict[str, float]:
    """Every number of an event by a name under which loggers draw one curve: ``growth/<slot>/<name>``.

    Of an event of no slot: ``growth/<name>``. Names are those of ``local_numbers``.
    """
    seed = event.get("seed")
    head = "growth/" if seed is None else f"growth/{seed}/"
    return {head + name: value for name, value in local_numbers(event).items()}


def local_numbers(event: Event) -> dict[str, float]:
    """The same by their names within a slot: "ratio", "alpha", "G2/blend_gain", "narrowed/rho".

    What "epoch" and "gate" events say goes by the name of the field, and "stage" is the value of the ``Stage``. A
    gate's answers are ``<gate>/passed`` and ``<gate>/<question>``, what was measured for it. What other events say goes
    by ``<event>/<field>``. True and False are 1 and 0; NaN and infinities stay; what is unknown is left out.
    """
    kind, gate = event.get("event"), event.get("gate")
    stage = Stage.__members__.get(str(event.get("stage")))
    found: Event = {"stage": None if stage is None else int(stage)}
    for field, value in event.items():
        if field not in COORDINATES:
            found[field if kind in ("epoch", "gate") else f"{kind}/{field}"] = value
    if kind == "gate":
        found[f"{gate}/passed"] = found.pop("passed", None)
        found.update({f"{gate}/{check['question']}": check["value"] for check in event.get("checks") or ()})
    return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}


def step_of(event: Event) -> int:
    """The optimizer step that an event belongs to; 0 where it says none."""
    return int(event.get("step") or 0)
