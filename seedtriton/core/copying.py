"""What can be deep-copied and not pickled, and says how it is saved instead."""

from __future__ import annotations

import copy
from typing import Any, NoReturn, TypeVar

from .errors import WiringError

_T = TypeVar("_T", bound="DeepCopied")


class DeepCopied:
    """Holds hooks and weak references: a copy of all that it is wired to has its own, and a file cannot have them."""

    def __deepcopy__(self: _T, memo: dict[int, Any]) -> _T:
        twin = memo[id(self)] = type(self).__new__(type(self))
        state = {name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()}
        restore = getattr(twin, "__setstate__", twin.__dict__.update)
        restore(state)
        return twin

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Whoever pickles it, or copies it without what is in it, is told what to do."""
        raise WiringError(
            f"a {type(self).__name__} has hooks in the model and the optimizer, and cannot be pickled: save its "
            "state_dict(), and load_state_dict() that into one which is built as this one was. copy.deepcopy of it "
            "together with its model and optimizer is a twin of all three"
        )
