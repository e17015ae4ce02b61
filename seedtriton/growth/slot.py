"""SeedSlot: the place in a network where a seed lives. Empty, it is the identity.

It holds the seed, alpha and the position in the life cycle, and knows how each stage computes. It
decides nothing: who may move, and when, is the gates' and the controller's business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigurationError, StateDictError, WiringError
from ..core.lifecycle import Lifecycle, Stage
from ..parallel import sharding
from . import blending, freezing, slot_state
from .isolation import (
    Isolation,
    StraightThrough,
    TrustRegion,
    as_number,
    behind,
    given_to,
    handed_on,
    leaks,
    uses_group_norm,
)
from .randomness import Learned, SeedRandom
from .slot_state import SavedSlot
from .trying import (
    check_features,
    check_output,
    is_unfinished,
    may_write,
    normal_tensors,
    own_tensors,
    prepare,
    raise_named,
    seed_module,
    slot_named,
)

logger = logging.getLogger("seedtriton")

# Forward passes that are looked at for leaks after entering TRAINING and after each epoch: more than a gate
# forgives, and few enough to cost nothing (a walk over the seed's graph each).
ISOLATION_CHECKS = 8
BEHIND = "behind"  # the seed trains, the output is the host's
BLENDED = "blended"  # the output is the blend
_FORWARD = {
    Stage.TRAINING: BEHIND,
    Stage.BLENDING: BLENDED,
    Stage.HOLDING: BLENDED,
    Stage.FOSSILIZED: BLENDED,
}


class SeedSlot(nn.Module):
    """A place for one seed, called with the host's features and returning features of the same shape.

    Put it where a seed may grow: ``x = self.slot(x)``, or ``nn.Sequential(layer, SeedSlot())``. A seed is any
    module that maps features to features of the same shape and dtype; it replaces them, so a residual
    seed returns ``x + f(x)``. An empty slot adds no key to the ``state_dict``.

    Attributes:
        seed: the module in the slot, or None.
        alpha: 0-dim float32 blend factor, a leaf that requires a gradient and no parameter (an optimizer
            would train it); None while the slot is empty.
        lifecycle: where the seed is in its life.
        isolation: how it trains behind the host.
        blend: how its output and the host's features become one: "add", "multiply" or "gate".
        gate: the gate network of a seed with blend "gate", else None.
        frozen: names of the parameters that ``freeze()`` stopped; None while the seed may learn.
        isolate_blending: whether the host is without a gradient through the seed in BLENDING too.
        isolation_violations: checked forward passes in which the seed reached into the host.
        random: where the seed's random numbers come from behind the host.
        name: the slot's path in the model, for errors; a ``GrowthController`` fills it in.
    """

    VERSION = slot_state.VERSION
    alpha: Tensor | None

    def __init__(self) -> None:
        """Begin empty."""
        super().__init__()
        self.seed: nn.Module | None = None
        self.gate: blending.GateNetwork | None = None
        self.blend = blending.ADD
        self.register_buffer("alpha", None)
        self.lifecycle = Lifecycle()
        self.isolation: Isolation = TrustRegion()
        self.isolate_blending = False
        self.isolation_violations = 0
        self.random = SeedRandom()
        self.name: str | None = None
        self.frozen: tuple[str, ...] | None = None
        self.preserves_shape: bool | None = None
        self._handed_on: Tensor | float | None = None
        self._alpha_value = 0.0
        self._mode: str | None = None
        self._copy_input, self._group_norm = False, True
        self._checks_due = 0
        self.register_load_state_dict_pre_hook(_before_load)
        self.register_load_state_dict_post_hook(_after_load)

    @property
    def stage(self) -> Stage:
        """The seed's stage; DORMANT when the slot is empty."""
        return self.lifecycle.stage

    @property
    def alpha_value(self) -> float:
        """Alpha as a number, kept on the host: reading it never waits for the device."""
        return self._alpha_value

    @property
    def behind(self) -> bool:
        """Whether the seed learns behind the host, which does not feel it."""
        return self._mode == BEHIND

    @property
    def handed_on(self) -> float | None:
        """``isolation.handed_on`` at the first look, None if unknown; waits for the device, once."""
        self._handed_on = found = as_number(self._handed_on)
        return found

    def agree(self, violations: int, preserves_shape: bool | None, handed_on: float | None) -> None:
        """Take over ``violations``, ``preserves_shape`` and ``handed_on`` as all ranks together have seen them."""
        self.isolation_violations, self.preserves_shape, self._handed_on = violations, preserves_shape, handed_on

    def modules_of_seed(self) -> list[nn.Module]:
        """Everything that trains, is measured and goes as the seed: it, and its gate network if it has one."""
        return [module for module in (self.seed, self.gate) if module is not None]

    def forward(self, features: Tensor) -> Tensor:
        """Host features in, features of the same shape and dtype out, as the stage says.

        An empty slot, and one whose seed waits or only looks on, hands on the very tensor, as ``nn.Identity`` does;
        with a seed that trains or is blended what comes out has memory of its own.

        Raises:
            WiringError: features that no seed can take, a seed that does not keep shape and dtype, or one that fails;
                then what it raised is the cause.
        """
        mode = self._mode
        if mode is None or (mode == BEHIND and not torch.is_grad_enabled()):
            return features  # behind the host without a gradient there is nothing to learn
        seed, alpha = self.seed, self.alpha  # looked up once: a module's attributes cost 0.7 us each
        if seed is None or alpha is None:
            return features
        check_features(features, self.name)
        apart = mode == BEHIND or (self.isolate_blending and self.stage is Stage.BLENDING)
        inner = features.detach() if apart else features
        if not apart and alpha.requires_grad:  # a fossil's alpha is never 0, so its host needs no shield
            inner = blending.shield(features, alpha)
        compiling = torch.compiler.is_compiling()
        looking = self._checks_due > 0 and not compiling and not blending.transforming()
        wall = looking or self._group_norm
        given = given_to(inner, chain((alpha,), seed.parameters()), copy=self._copy_input, wall=wall)
        if mode == BLENDED:
            output = seed(given) if compiling else _run(self, seed, given)[0]
            return blending.blend(features, self._candidate(features, inner, output), alpha)
        version = given._version if looking else 0
        output, learned = (seed(given), None) if compiling else _run(self, seed, given, looking)
        full = self._candidate(features, inner, output)
        if looking:
            if self._handed_on is None:
                self._handed_on = handed_on(inner, output)
            self._look(full, wrote=given._version != version, shared=given is inner)
        return behind(features, full, alpha, self.isolation, learned)

    def germinate(
        self,
        seed: nn.Module | Callable[[], nn.Module],
        *,
        probe: Tensor | None = None,
        isolation: Isolation | None = None,
        blend: str = blending.ADD,
        gate_dims: Sequence[int] | None = None,
        channel_dim: int | None = None,
        isolate_blending: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Put a seed into the slot: stage GERMINATED, not yet part of the forward pass.

        Args:
            seed: a module, or a factory that makes one.
            probe: features as the slot will see them, any batch size. The seed is run on them once, in eval
                mode, without a change of random state. Without it the first forward pass checks.
            isolation: how it will train; ``TrustRegion()`` unless told.
            blend: "add", "multiply" or "gate", see ``blending.candidate``; a gate network learns with the seed.
            gate_dims: dimensions over which a gate is one value, see ``blending.GateNetwork``; none unless told.
            channel_dim: where a gate finds the channels, see there.
            isolate_blending: send the host no gradient through the seed in BLENDING: it gets its own, times 1 - alpha.
            device: moved there; the probe's device unless told.
            dtype: floating parameters are converted to it; unless told the probe's, and under autocast, which gives
                features another dtype than the model, they stay as they are.

        Raises:
            WiringError: the slot is occupied, the seed has no trainable parameter, it changes the shape or dtype of the
                probe, or it or its gate waits for features that nobody gave; the slot is as it was.
            ConfigurationError: ``seed`` is neither a module nor a factory of one, or an unknown blend.
        """
        if self.stage is not Stage.DORMANT:
            where = f"{slot_named(self.name)} is occupied or resting (stage {self.stage})"
            raise WiringError(f"{where}; prune its seed and wait for DORMANT")
        blending.check_blend(blend, gate_dims, channel_dim)
        if isolation is not None and not isinstance(isolation, (StraightThrough, TrustRegion)):
            raise ConfigurationError(f"isolation must be TrustRegion or StraightThrough, got {isolation!r}")
        if blend == blending.GATE and probe is None:
            raise WiringError("blend 'gate' needs probe=features: the gate network is made for their channels")
        if probe is not None:
            check_features(probe, self.name)
        with normal_tensors():
            module = seed_module(seed)
            tried = prepare(module, probe, device, dtype, self.name)
            first = next(p for p in module.parameters() if p.requires_grad)
            gate = None
            if blend == blending.GATE and probe is not None:
                gate = blending.gate_for(probe, tuple(gate_dims or ()), channel_dim).to(first.device, first.dtype)
            self._place(module, gate, blend, first.device)
        self._group_norm, self._copy_input, self._handed_on = tried.group_norm, tried.writes, as_number(tried.handed_on)
        self.preserves_shape = True if tried.ran else None
        self.isolation, self.isolate_blending = isolation or TrustRegion(), bool(isolate_blending)
        self.random.begin(self.name or "")
        # A compiled forward pass is not looked at, but its graph is the one of the probe: a leak there is a leak
        # in every pass.
        self.isolation_violations = ISOLATION_CHECKS if tried.leaky else 0
        self.move(Stage.GERMINATED)

    def move(self, target: Stage, reason: str = "", initiator: str = "script") -> None:
        """Move to ``target``, for a ``reason`` and by an ``initiator``, and compute as it does from the next pass on.

        Raises:
            TransitionError: the table does not allow it; nothing has changed.
        """
        self.lifecycle.move(target, reason, initiator)
        self._mode = _FORWARD.get(target)
        self._checks_due = ISOLATION_CHECKS if target is Stage.TRAINING else 0
        if target is Stage.PRUNED:
            self._clear()
        elif target is Stage.FOSSILIZED and self.alpha is not None:
            self.alpha.requires_grad_(False)
            self.alpha.grad = None

    def set_alpha(self, value: float) -> None:
        """Set the blend factor to ``value``, in place and without waiting for the device.

        Raises:
            ConfigurationError: outside [0, 1] or NaN.
            WiringError: the slot is empty.
        """
        if not 0.0 <= value <= 1.0:
            raise ConfigurationError(f"alpha must lie in [0, 1], got {value}")
        if self.alpha is None:
            raise WiringError("an empty slot has no alpha: germinate a seed first")
        with torch.no_grad():
            self.alpha.fill_(value)
        self._alpha_value = float(value)

    def blend_at(self, alpha: float) -> None:
        """Compute the blend at ``alpha`` whatever the stage, with an alpha of its own: for a twin of a model.

        Raises:
            ConfigurationError: outside [0, 1] or NaN.
            WiringError: the slot is empty.
        """
        if self.alpha is not None:
            self.alpha = self.alpha.detach().clone()
        self.set_alpha(alpha)
        self._mode = BLENDED

    def freeze(self) -> None:
        """Stop the seed's learning: no parameter of it requires or holds a gradient, so no optimizer moves it.

        The way through it stays: the host still gets the gradient that reaches it through the seed. ``thaw()``
        undoes it for exactly the parameters that learned before.
        """
        self.frozen = freezing.freeze(self, self.frozen)

    def thaw(self) -> None:
        """Let the seed learn again after ``freeze()``."""
        freezing.thaw(self, self.frozen or ())
        self.frozen = None

    def check_isolation_again(self) -> None:
        """Look for leaks in the next eager forward passes in TRAINING, as in the first ones."""
        self._checks_due = ISOLATION_CHECKS if self._mode == BEHIND else 0

    def lifecycle_state(self) -> dict[str, Any]:
        """Plain values that the module's ``state_dict`` does not hold; for ``load_lifecycle_state``."""
        floating = [p.dtype for p in self.parameters() if p.is_floating_point()]
        return SavedSlot(
            self.lifecycle, self._alpha_value, self.isolation, self.isolate_blending, self.isolation_violations,
            self._checks_due, self.random, self.blend, self.gate, floating[0] if floating else None, self.frozen,
            self.preserves_shape, self._copy_input, self.handed_on,
        ).state_dict()  # fmt: skip

    def load_lifecycle_state(
        self, state: object, seed: nn.Module | None = None, *, device: torch.device | None = None
    ) -> None:
        """Take over ``lifecycle_state``; if the state has a seed, it is in the slot already or given.

        Args:
            state: what ``lifecycle_state`` returned.
            seed: put into the empty slot, with a new gate network if its blend has one. Weights are not in this
                state; ``load_state_dict`` fills them.
            device: moved there.

        Raises:
            StateDictError: it does not fit; nothing has changed.
        """
        saved = SavedSlot.read(state)
        saved.check_occupation(self.seed is not None, seed is not None)
        if seed is not None and (saved.dtype is None or is_unfinished(seed)):
            raise StateDictError(
                "SeedSlot: the state names no dtype, or the seed waits for its first features: run it on some before"
            )
        if self.seed is not None and saved.blend != self.blend:
            raise StateDictError(
                f"SeedSlot: the saved blend is {saved.blend!r}, the seed in the slot has {self.blend!r}"
            )
        saved.check_frozen(seed or self.seed, self.gate if seed is None else saved.gate)
        if seed is not None:
            with normal_tensors():
                seed.to(device=device, dtype=saved.dtype)
                gate = None if saved.gate is None else saved.gate.to(device=device, dtype=saved.dtype)
                self._place(seed, gate, saved.blend, device or next(seed.parameters()).device)
        elif self.gate is not None and saved.gate is not None:
            self.gate.dims, self.gate.channel_dim = saved.gate.dims, saved.gate.channel_dim
        self.lifecycle, self.random = saved.lifecycle, saved.random
        self.isolation, self.isolate_blending = saved.isolation, saved.isolate_blending
        self.isolation_violations, self._checks_due = saved.isolation_violations, saved.checks_due
        self.preserves_shape, self._copy_input = saved.preserves_shape, saved.copy_input
        self._handed_on = saved.handed_on
        self._mode = _FORWARD.get(self.stage)
        self.thaw()
        if saved.frozen is not None:
            self.frozen = saved.frozen
            self.freeze()
        if self.alpha is not None:
            self.set_alpha(saved.alpha)
            self.alpha.requires_grad_(self.stage is not Stage.FOSSILIZED)

    def vacate(self) -> None:
        """Empty the slot and forget the life in it, whatever the stage: as it was built."""
        self._clear()
        self.lifecycle, self.isolation, self.isolation_violations = Lifecycle(), TrustRegion(), 0
        self._mode, self._checks_due, self._copy_input = None, 0, False

    def extra_repr(self) -> str:
        """Stage and alpha, for ``print(model)``."""
        return str(self.stage) if self.seed is None else f"{self.stage}, alpha={self._alpha_value:.3g}"

    def _candidate(self, features: Tensor, inner: Tensor, output: Tensor) -> Tensor:
        check_output(features, output, self.name)
        return blending.candidate(self.blend, inner, output.to(features.dtype), self.gate)

    def _place(self, seed: nn.Module, gate: blending.GateNetwork | None, blend: str, device: torch.device) -> None:
        self.seed = seed.train(self.training)
        self.gate = None if gate is None else gate.train(self.training)
        self.blend = blend
        self.alpha = torch.zeros((), dtype=torch.float32, device=device).requires_grad_()
        self._alpha_value = 0.0

    def _clear(self) -> None:
        self.thaw()  # the module goes back to whoever made it
        self.seed = None
        self.gate = None
        self.blend = blending.ADD
        self.alpha = None
        self._alpha_value = 0.0
        self.preserves_shape = self._handed_on = None
        self.isolate_blending = False
        self._group_norm = True  # until somebody looked
        self.random = SeedRandom()

    def _look(self, full: Tensor, wrote: bool, shared: bool) -> None:
        """Count leaks, and learn what the seed's input has to be: a copy, behind a wall, or neither."""
        self._checks_due -= 1
        self.preserves_shape = True
        assert self.seed is not None
        assert self.alpha is not None  # it anchors the wall before some seeds, and gets no gradient from there
        modules = self.modules_of_seed()
        own = [self.alpha, *chain.from_iterable(map(own_tensors, modules)), *sharding.own_unsharded(modules)]
        self.isolation_violations += int((wrote and shared) or leaks(full, own) > 0)
        self._copy_input = wrote or may_write(self.seed)
        self._group_norm = uses_group_norm(full)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SeedSlot:
        super()._apply(fn, recurse)
        self._keep_alpha_a_leaf()
        return self

    def _keep_alpha_a_leaf(self) -> None:
        """After ``.to()`` or an assigning load, alpha must again be a float32 leaf that gets a gradient.

        Converting a buffer that requires a gradient makes a non-leaf, silently: its ``.grad`` stays None.
        """
        alpha = self.alpha
        wanted = self.stage is not Stage.FOSSILIZED
        if alpha is None or (alpha.is_leaf and alpha.dtype == torch.float32 and alpha.requires_grad == wanted):
            return
        # From the number on the host: a trip through half precision would have rounded the tensor.
        fresh = torch.full((), self._alpha_value, dtype=torch.float32, device=alpha.device)
        self.alpha = fresh.requires_grad_(wanted)


def _run(
    slot: SeedSlot, seed: nn.Module, given: Tensor, looking: bool | None = None
) -> tuple[Tensor, Learned | None]:
    """The seed's output, behind the host on its own random numbers; ``looking`` None: it is blended."""
    try:
        return (seed(given), None) if looking is None else slot.random.run(seed, given, looking)
    except Exception as error:
        raise_named(error, seed, given, slot.name)


def _before_load(
    slot: nn.Module, state_dict: Mapping[str, Any], prefix: str, metadata: object, strict: object,
    missing: object, unexpected: object, errors: list[str],
) -> None:  # fmt: skip
    """Say what to do about a seed without a place, strict or not: its weights must not get lost silently."""
    assert isinstance(slot, SeedSlot)
    if slot.seed is None and any(key.startswith(f"{prefix}seed.") for key in state_dict):
        errors.append(
            f"slot {prefix.rstrip('.')!r} is empty and the state has a seed for it: load the controller's state first, "
            "growth.load_state_dict(state, seeds=...); or, to use the model alone, load_grown(model, state, seeds)"
        )
    alpha = state_dict.get(f"{prefix}alpha")
    if slot.seed is None or not isinstance(alpha, Tensor) or alpha.is_meta:
        return
    felt, permanent = float(alpha) > 0.0, slot.stage in (Stage.HOLDING, Stage.FOSSILIZED)
    # In BLENDING any alpha is one of its way: the model is then as it was when the state was saved.
    if felt != (slot._mode == BLENDED) and (felt or permanent):
        errors.append(
            f"slot {prefix.rstrip('.')!r} is in {slot.stage} and the state has its seed at alpha {float(alpha):.3g}: "
            "they are of different times in its life. Load the growth state of that time first, into a fresh model "
            "(README, Stop and resume), or the slot's: slot.load_lifecycle_state(saved.lifecycle_state())"
        )


def _after_load(slot: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(slot, SeedSlot)
    if slot.alpha is not None:
        loaded = slot.alpha.detach()
        # The tensor is the number rounded to float32; the number decides whether alpha is at its target.
        if float(torch.tensor(slot._alpha_value, dtype=torch.float32, device="cpu")) != float(loaded):
            slot._alpha_value = float(loaded)
        slot._keep_alpha_a_leaf()
