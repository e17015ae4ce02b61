"""What a slot saves beyond its ``state_dict``: plain values, checked as a whole before any is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..core.errors import ConfigurationError, StateDictError
from ..core.lifecycle import RESTING, Lifecycle, Stage
from ..core.state import check_state
from .blending import BLENDS, GATE, GateNetwork, check_blend
from .isolation import NORM, Isolation, StraightThrough, TrustRegion
from .randomness import SeedRandom

VERSION = 1
_KEYS = (
    "lifecycle", "alpha", "rho", "blend", "channels", "dtype", "frozen", "isolation_violations", "checks_due",
    "preserves_shape", "copy_input",
)  # fmt: skip
# Only in a state where there is something to say: the first version knew none of them. Its rule was "norm".
_LATER: Mapping[str, Any] = MappingProxyType(
    {"gate_dims": None, "channel_dim": None, "isolate_blending": False, "random": {}, "rule": NORM, "handed_on": None}
    | {"least": TrustRegion.least}
)


@dataclass(frozen=True)
class SavedSlot:
    """A state of a slot that is whole; whether it fits another slot and a seed is another question."""

    lifecycle: Lifecycle
    alpha: float
    isolation: Isolation
    isolate_blending: bool
    isolation_violations: int
    checks_due: int
    random: SeedRandom
    blend: str
    gate: GateNetwork | None  # its shape and meaning are saved, not its weights
    dtype: torch.dtype | None
    frozen: tuple[str, ...] | None
    preserves_shape: bool | None
    copy_input: bool
    handed_on: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        later: dict[str, Any] = {}
        if self.random.key is not None:
            later["random"] = self.random.state()
        if self.isolate_blending:
            later["isolate_blending"] = True
        if isinstance(self.isolation, TrustRegion) and self.isolation.rule != NORM:
            later["rule"] = self.isolation.rule
            if self.isolation.least != TrustRegion.least:
                later["least"] = self.isolation.least
        if self.handed_on is not None:
            later["handed_on"] = self.handed_on
        if self.gate is not None and self.gate.dims is not None:
            later |= {"gate_dims": list(self.gate.dims), "channel_dim": self.gate.channel_dim}
        return {
            "version": VERSION,
            "lifecycle": self.lifecycle.state_dict(),
            "alpha": self.alpha,
            "rho": self.isolation.rho if isinstance(self.isolation, TrustRegion) else None,
            "blend": self.blend,
            "channels": None if self.gate is None else self.gate.channels,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "frozen": None if self.frozen is None else list(self.frozen),
            "isolation_violations": self.isolation_violations,
            "checks_due": self.checks_due,
            "preserves_shape": self.preserves_shape,
            "copy_input": self.copy_input,
            **later,
        }

    @classmethod
    def read(cls, state: object) -> SavedSlot:
        """The state that ``state_dict`` wrote; StateDictError when it is damaged."""
        values = check_state(state, "SeedSlot", VERSION, _KEYS, _LATER)
        lifecycle = Lifecycle()
        lifecycle.load_state_dict(values["lifecycle"])
        alpha, violations, due = values["alpha"], values["isolation_violations"], values["checks_due"]
        counts = all(type(count) is int and count >= 0 for count in (violations, due))
        if type(alpha) is not float or not 0.0 <= alpha <= 1.0 or not counts:
            raise StateDictError(
                f"SeedSlot: bad alpha {alpha!r}, isolation_violations {violations!r} or checks_due {due!r}"
            )
        apart, copy_input, keeps = values["isolate_blending"], values["copy_input"], values["preserves_shape"]
        if type(apart) is not bool or type(copy_input) is not bool or not (keeps is None or keeps is True):
            raise StateDictError(
                f"SeedSlot: bad isolate_blending {apart!r}, copy_input {copy_input!r} or preserves_shape {keeps!r}"
            )
        kept, dtype = values["handed_on"], getattr(torch, str(values["dtype"]), None)
        if type(kept) not in (float, type(None)):
            raise StateDictError(f"SeedSlot: bad handed_on {kept!r}")
        return cls(
            lifecycle=lifecycle,
            alpha=alpha,
            isolation=_isolation(values),
            isolate_blending=apart,
            isolation_violations=violations,
            checks_due=due,
            random=SeedRandom.from_state(values["random"]),
            blend=values["blend"],
            gate=_gate(values),
            dtype=dtype if isinstance(dtype, torch.dtype) else None,
            frozen=None if values["frozen"] is None else _names(values["frozen"]),
            preserves_shape=keeps,
            copy_input=copy_input,
            handed_on=kept,
        )

    def check_occupation(self, holds: bool, given: bool) -> None:
        """StateDictError unless a slot that ``holds`` a seed or is ``given`` one has one just if the state has."""
        stage = self.lifecycle.stage
        occupied = stage not in (Stage.DORMANT, *RESTING)
        if holds and (given or not occupied):
            raise StateDictError(f"SeedSlot: the saved stage is {stage}, but the slot is occupied: use a fresh model")
        if occupied and not holds and not given:
            raise StateDictError(
                f"SeedSlot: the saved stage is {stage}, but the slot is empty: germinate the same seed first"
            )

    def check_frozen(self, seed: nn.Module | None, gate: nn.Module | None) -> None:
        """StateDictError unless all that was frozen are parameters of this seed and its gate."""
        parts = {"seed": seed, "gate": gate}
        names = {f"{part}.{name}" for part, m in parts.items() if m is not None for name, _ in m.named_parameters()}
        if self.frozen is not None and not names.issuperset(self.frozen):
            raise StateDictError(f"SeedSlot: frozen parameters {list(self.frozen)} that the seed does not have")


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or any(type(name) is not str for name in value):
        raise StateDictError(f"SeedSlot: frozen must be a list of names or None, got {value!r}")
    return tuple(value)


def _isolation(values: Mapping[str, Any]) -> Isolation:
    rho, rule, least = values["rho"], values["rule"], values["least"]
    try:
        return StraightThrough() if rho is None else TrustRegion(rho, rule, least)
    except ConfigurationError as error:
        raise StateDictError(f"SeedSlot: {error}") from error


def _gate(values: Mapping[str, Any]) -> GateNetwork | None:
    blend, channels = values["blend"], values["channels"]
    gated = type(channels) is int and channels > 0
    if blend not in BLENDS or gated != (blend == GATE):
        raise StateDictError(f"SeedSlot: blend {blend!r} does not go with channels {channels!r} of a gate")
    dims, channel_dim = values["gate_dims"], values["channel_dim"]
    try:
        check_blend(blend, dims, channel_dim)
    except ConfigurationError as error:
        raise StateDictError(f"SeedSlot: {error}") from error
    return GateNetwork(channels, None if dims is None else tuple(dims), channel_dim) if gated else None
