"""The state of a training script, and back to it: what a step may change, put back into the same objects."""

from __future__ import annotations

import operator
import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class State:
    """Everything reachable from some objects, as it is now; ``restore()`` puts it back, into the same objects.

    Looks into containers, tensors, modules, optimizers, schedulers, scalers, objects of this library and the
    objects given; not into functions and strangers, and not into tensors that belong to a graph.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self._random = random_states()
        self._undo: list[Callable[[], object]] = []
        self._roots = {id(root) for root in roots}
        seen: dict[int, Any] = {}  # holds what it has seen: an id is an object's while that lives
        waiting = list(roots)
        while waiting:
            item = waiting.pop()
            if id(item) not in seen:
                seen[id(item)] = item
                waiting += self._note(item)
        self._seen = seen

    def restore(self) -> None:
        with torch.no_grad():
            for undo in self._undo:
                undo()
        _set_random(self._random)

    def _note(self, item: Any) -> Iterable[Any]:
        """Remember how to put one object back; what is inside it."""
        if isinstance(item, Tensor):
            return self._note_tensor(item) if item.is_leaf and not item.is_meta else ()
        if isinstance(item, torch.Generator):
            self._undo.append(partial(item.set_state, item.get_state()))
        elif isinstance(item, dict):
            entries = dict(item)
            self._undo.append(partial(_refill, item, entries))
            return (*entries, *entries.values())
        elif isinstance(item, (list, set, deque)):
            members = list(item)
            self._undo.append(partial(_refill, item, members))
            return members
        elif isinstance(item, (tuple, frozenset)):
            return item
        elif hasattr(item, "__dict__") and (id(item) in self._roots or _is_known(item)):
            return (vars(item),)
        return ()

    def _note_tensor(self, tensor: Tensor) -> Iterable[Any]:
        value, gradient, learns = tensor.detach().clone(), tensor.grad, tensor.requires_grad

        def undo() -> None:
            if not same(tensor, value):
                tensor.detach().copy_(value)
            if tensor.requires_grad != learns:
                tensor.requires_grad_(learns)
            tensor.grad = gradient

        self._undo.append(undo)
        # Whoever prunes takes his hooks back: what averages gradients over ranks has some, and no module holds those.
        hooks = tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)
        return [each for each in (gradient, *hooks) if each is not None]


_KNOWN = (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)


def _is_known(item: Any) -> bool:
    ours = type(item).__module__.partition(".")[0] == __package__
    return not isinstance(item, type) and (ours or isinstance(item, _KNOWN))


def _refill(container: Any, content: Any) -> None:
    """Put the old content back, if it is another: what compiled code has looked at is better left alone."""
    now, then = _flat(container), _flat(content)
    if len(now) == len(then) and all(map(operator.is_, now, then)):
        return
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(content)


def _flat(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def random_states() -> dict[str, Any]:
    """Of Python, of numpy if it is loaded, of torch on the CPU and on CUDA if it is in use."""
    states: dict[str, Any] = {"Python's random": random.getstate(), "torch's on the CPU": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["numpy's"] = numpy.random.get_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["torch's on CUDA"] = torch.cuda.get_rng_state_all()
    return states


def _set_random(states: Mapping[str, Any]) -> None:
    random.setstate(states["Python's random"])
    torch.set_rng_state(states["torch's on the CPU"])
    if "numpy's" in states:
        sys.modules["numpy"].random.set_state(states["numpy's"])
    if "torch's on CUDA" in states:
        torch.cuda.set_rng_state_all(states["torch's on CUDA"])


def same(left: Any, right: Any) -> bool:
    """Equal in every bit: NaN is itself, and 0 is not -0."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        alike = left.shape == right.shape and left.dtype == right.dtype and left.device == right.device
        return alike and torch.equal(_bits(left), _bits(right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and pickle.dumps(left) == pickle.dumps(right)


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = getattr(tensor, "to_local", lambda: tensor)()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return tensor.contiguous().view(-1).view(torch.uint8)
