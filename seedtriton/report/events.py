"""What happens, as flat dicts of plain values; sinks.py says where they go."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..core.evidence import SeedEvidence
from ..core.verdict import Verdict

Event = dict[str, Any]


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
