"""Saved states as plain, versioned dicts: JSON-safe and loadable with ``torch.load(weights_only=True)``.

Reading is strict: another version, a missing or an unknown key is an error that names it. A key that a later release
added without a new version is read from older states too, as what its absence means.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from .errors import StateDictError

NOTHING: Mapping[str, Any] = MappingProxyType({})


def check_state(
    state: object, kind: str, version: int, keys: Iterable[str], later: Mapping[str, Any] = NOTHING
) -> dict[str, Any]:
    """Return ``state`` if it is a dict of this version with exactly these keys, else raise StateDictError.

    Args:
        state: what was saved.
        kind: of what, for the error.
        version: the one that is read.
        keys: those that every state of this version has.
        later: those that came later, with what a state without them means; they are filled in.
    """
    if not isinstance(state, dict):
        raise StateDictError(f"{kind}: a state must be a dict, got {type(state).__name__}")
    found = state.get("version")
    if type(found) is not int or found != version:
        raise StateDictError(
            f"{kind}: state has version {found!r}, this release reads version {version}; "
            "load it with the release that saved it"
        )
    wanted = {"version", *keys}
    missing = sorted(wanted - later.keys() - state.keys())
    unknown = sorted(map(str, state.keys() - wanted - later.keys()))
    if missing or unknown:
        parts = [f"missing {missing}"] if missing else []
        parts += [f"unknown {unknown}"] if unknown else []
        raise StateDictError(f"{kind}: state does not fit: {' and '.join(parts)}; expected {sorted(wanted)}")
    return {**later, **state} if later else state


class PlainState:
    """``state_dict`` and ``from_state_dict`` for a dataclass whose fields are plain values.

    ``LATER`` holds fields that came without a new version, with what a state without them means.
    """

    VERSION: ClassVar[int] = 1
    LATER: ClassVar[Mapping[str, Any]] = NOTHING

    def state_dict(self) -> dict[str, Any]:
        """Ints, floats, bools, strings, None, lists and dicts, with the version of the format."""
        values: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"version": self.VERSION, **plain}

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, as ``plain`` values: for tables and logs. A name is kept from release to release.

        No version is in it, and what JSON cannot say is lost: ``state_dict`` is what can be loaded again.
        """
        values: dict[str, Any] = plain(dataclasses.asdict(self))  # type: ignore[call-overload]
        return values

    @classmethod
    def from_state_dict(cls, state: object) -> Any:
        """The object saved by ``state_dict``.

        Raises:
            StateDictError: another version, a missing or an unknown key.
            ConfigurationError: a value that the constructor refuses.
        """
        fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        values = check_state(state, cls.__name__, cls.VERSION, fields, cls.LATER)
        return cls(**{name: values[name] for name in fields})


def plain(value: Any) -> Any:
    """The value as JSON has it: tuples are lists, NaN and infinities None, in dicts and lists too."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
