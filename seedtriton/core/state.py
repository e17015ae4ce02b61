"""Saved states as plain, versioned dicts: JSON-safe and loadable with ``torch.load(weights_only=True)``.

Reading is strict: another version, a missing or an unknown key is an error that names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

from .errors import StateDictError


def check_state(state: object, kind: str, version: int, keys: Iterable[str]) -> dict[str, Any]:
    """Return ``state`` if it is a dict of this version with exactly these keys, else raise StateDictError."""
    if not isinstance(state, dict):
        raise StateDictError(f"{kind}: a state must be a dict, got {type(state).__name__}")
    found = state.get("version")
    if found != version or isinstance(found, bool):
        raise StateDictError(
            f"{kind}: state has version {found!r}, this release reads version {version}; "
            "load it with the release that saved it"
        )
    wanted = {"version", *keys}
    missing = sorted(wanted - state.keys())
    unknown = sorted(map(str, state.keys() - wanted))
    if missing or unknown:
        parts = [f"missing {missing}"] if missing else []
        parts += [f"unknown {unknown}"] if unknown else []
        raise StateDictError(f"{kind}: state does not fit: {' and '.join(parts)}; expected {sorted(wanted)}")
    return state


class PlainState:
    """``state_dict`` and ``from_state_dict`` for a dataclass whose fields are plain values."""

    VERSION: ClassVar[int] = 1

    def state_dict(self) -> dict[str, Any]:
        """Ints, floats, bools, strings, None, lists and dicts, with the version of the format."""
        return {"version": self.VERSION, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_state_dict(cls, state: object) -> Any:
        """The object saved by ``state_dict``.

        Raises:
            StateDictError: another version, a missing or an unknown key.
            ConfigurationError: a value that the constructor refuses.
        """
        fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        values = check_state(state, cls.__name__, cls.VERSION, fields)
        return cls(**{name: values[name] for name in fields})
