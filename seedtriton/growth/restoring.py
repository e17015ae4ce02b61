"""A model that is tried where it stands, because it cannot be copied, and that is afterwards what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..parallel import sharding
from .slot import SeedSlot

# An FSDP2 module changes its parameters all the time, and the modules are what is kept one by one.
_NOT_KEPT = {"_parameters", "_modules", "_buffers"}


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Inside, run it and blend its slots; behind it, after an exception too, it is what it was, in every bit.

    Put back are every module's attributes (as objects; of what is in them only a slot's random numbers), its buffers
    and their contents, and whether parameters learn. Parameters and their gradients are not copied: whoever writes to
    them writes to the model, as on a twin. What is fully_sharded shows its sharded parameters. Call it on every rank.
    """
    sharding.settle(model)
    sharding.gather_once(model)  # made in inference mode, the parameters could never learn
    put_back = [_keeper(module) for module in model.modules()]
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        sharding.recover(model)
        sharding.settle(model)
        for each in put_back:
            each()
        for parameter, learns in learning:
            if parameter.requires_grad != learns:
                parameter.requires_grad_(learns)


def _keeper(module: nn.Module) -> Callable[[], None]:
    """What puts a module back."""
    attributes = {name: value for name, value in vars(module).items() if name not in _NOT_KEPT}
    buffers = dict(module._buffers)
    contents = [(local, local.clone()) for buffer in buffers.values() if buffer is not None for local in [_own(buffer)]]
    numbers = dict(vars(module.random)) if isinstance(module, SeedSlot) else {}

    def put_back() -> None:
        now = vars(module)
        for name in now.keys() - attributes.keys() - _NOT_KEPT:
            del now[name]
        now.update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)
        with torch.no_grad():
            for local, content in contents:
                if not torch.equal(local, content):  # to write is to be noticed, by autograd's version counter
                    local.copy_(content)
        if isinstance(module, SeedSlot):
            vars(module.random).update(numbers)

    return put_back


@torch.no_grad()
def _own(buffer: Tensor) -> Tensor:
    """A buffer, or of a DTensor what this rank has of it."""
    own: Tensor = buffer.to_local() if hasattr(buffer, "to_local") else buffer
    return own.detach()
