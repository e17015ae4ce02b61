"""Where a monitor finds parameters and blend factors, and how it notices that they were replaced."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..core.errors import ConfigurationError

Parameters = nn.Module | Tensor | Iterable[Tensor] | Iterable[nn.Module]


class ParameterSource:
    """Where parameters come from: looked up again on every call, each once."""

    def __init__(self, source: Parameters) -> None:
        self._single = isinstance(source, (nn.Module, Tensor))
        items: tuple[object, ...] = (source,) if isinstance(source, (nn.Module, Tensor)) else tuple(source)
        self._items: list[nn.Module | Tensor] = []
        for item in items:
            if not isinstance(item, (nn.Module, Tensor)):
                raise ConfigurationError(
                    f"host and seeds are modules or iterables of parameters, got {type(item).__name__} inside"
                )
            self._items.append(item)

    def parameters(self) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for item in self._items:
            tensors: Iterable[Tensor] = (item,) if isinstance(item, Tensor) else item.parameters()
            for tensor in tensors:
                found.setdefault(id(tensor), tensor)
        return list(found.values())

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """What to call each parameter in an error: by its path in its module, or by its place among bare tensors."""
        for index, item in enumerate(self._items):
            if isinstance(item, nn.Module):
                for name, parameter in item.named_parameters(prefix="" if self._single else str(index)):
                    yield f"parameter {name!r}", parameter
            else:
                yield f"parameter {index}", item

    def modules(self) -> list[nn.Module]:
        return [module for item in self._items if isinstance(item, nn.Module) for module in item.modules()]


class Alpha:
    """A blend factor, looked up again each time: ``.to()`` replaces the tensor of a slot."""

    def __init__(self, holder: Any) -> None:
        self.holder = holder

    @classmethod
    def of(cls, alpha: Any) -> Alpha:
        if isinstance(alpha, Tensor):
            alpha = _Holder(alpha)
        if not hasattr(alpha, "alpha"):
            raise ConfigurationError(
                f"an alpha is a 0-dim tensor or an object with one as attribute `alpha`, got {type(alpha).__name__}"
            )
        return cls(alpha)

    def gradient(self) -> Tensor | None:
        tensor: Tensor | None = self.holder.alpha
        return None if tensor is None else tensor.grad


class _Holder:
    def __init__(self, alpha: Tensor) -> None:
        self.alpha = alpha


class CallOnLoad:
    """A load hook: after ``load_state_dict(assign=True)`` the parameters are other objects.

    Calls a bound method, without keeping its object alive.
    """

    def __init__(self, method: Callable[[], None] | None) -> None:
        self._method = weakref.WeakMethod(method) if method is not None else None

    def __call__(self, module: nn.Module, incompatible_keys: object) -> None:
        method = self._method() if self._method is not None else None
        if method is not None:
            method()

    def __reduce__(self) -> tuple[type[CallOnLoad], tuple[None]]:
        # The hook lives in the user's modules, which must stay copyable and picklable.
        return CallOnLoad, (None,)
