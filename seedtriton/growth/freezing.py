"""A module that learns no more, and learns again: exactly the parameters that did before."""

from __future__ import annotations

from torch import nn

from ..parallel import sharding


def freeze(module: nn.Module, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """No parameter of these names requires or holds a gradient, so no optimizer moves it; of those that learn now
    where ``names`` is None.

    Returns:
        The names, for ``thaw``.
    """
    # FSDP2 takes over for its next forward pass what the sharded parameters say, and forgets what was told to others.
    sharding.settle(module)
    if names is None:
        names = tuple(name for name, parameter in module.named_parameters() if parameter.requires_grad)
    for name, parameter in module.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
            parameter.grad = None
    sharding.forget_unreduced(module)
    return names


def thaw(module: nn.Module, names: tuple[str, ...]) -> None:
    """Undo ``freeze``."""
    if not names:
        return
    sharding.settle(module)
    for name, parameter in module.named_parameters():
        if name in names:
            parameter.requires_grad_(True)
    sharding.learn_again(module)
