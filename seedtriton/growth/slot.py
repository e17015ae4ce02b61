"""SeedSlot: the place in a network where a seed lives. Empty, it is the identity.

It holds the seed, alpha and the position in the life cycle, and knows how each stage computes. It
decides nothing: who may move, and when, is the gates' and the controller's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # what torch.func hands in does not outlive its call

from ..core.errors import ConfigurationError, StateDictError, WiringError
from ..core.lifecycle import RESTING, Lifecycle, Stage
from ..core.state import check_state
from . import blending
from .isolation import NORM, Isolation, StraightThrough, TrustRegion, behind, handed_on, leaks

# Forward passes that are looked at for leaks after entering TRAINING and after each epoch: more than a gate
# forgives, and few enough to cost nothing (a walk over the seed's graph each).
ISOLATION_CHECKS = 8
# Keys of ``lifecycle_state``; then those that 0.1 did not have, with what a state without them means: its rule, and
# nothing known.
_KEYS = (
    "lifecycle", "alpha", "rho", "blend", "channels", "dtype", "frozen", "isolation_violations", "checks_due",
    "preserves_shape", "copy_input",
)  # fmt: skip
_LATER: Mapping[str, Any] = MappingProxyType({"rule": NORM, "handed_on": None})
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
        isolation_violations: checked forward passes in which the seed reached into the host.
    """

    VERSION = 1
    alpha: Tensor | None

    def __init__(self) -> None:
        """Begin empty."""
        super().__init__()
        self.seed: nn.Module | None = None
        self.gate: nn.Module | None = None
        self.blend = blending.ADD
        self.register_buffer("alpha", None)
        self.lifecycle = Lifecycle()
        self.isolation: Isolation = TrustRegion()
        self.isolation_violations = 0
        self.frozen: tuple[str, ...] | None = None
        self.preserves_shape: bool | None = None
        self._handed_on: Tensor | float | None = None
        self._alpha_value = 0.0
        self._mode: str | None = None
        self._copy_input = False
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
    def handed_on(self) -> float | None:
        """``isolation.handed_on`` at the first look, None if unknown; waits for the device, once."""
        self._handed_on = _finite(self._handed_on)
        return self._handed_on

    def modules_of_seed(self) -> list[nn.Module]:
        """Everything that trains, is measured and goes as the seed: the seed, and its gate network if it has one."""
        return [module for module in (self.seed, self.gate) if module is not None]

    def forward(self, features: Tensor) -> Tensor:
        """Host features in, features of the same shape and dtype out, as the stage says."""
        if self._mode is None or self.seed is None or self.alpha is None:
            return features
        if self._mode == BEHIND and not torch.is_grad_enabled():
            return features  # nothing to learn from, and the output would be the host's anyway
        if self._mode == BEHIND:
            inner = features.detach()
        else:  # a fossil's alpha is never 0, so its host needs no shield
            inner = blending.shield(features, self.alpha) if self.alpha.requires_grad else features
        given = inner.clone() if self._copy_input else inner
        looking = not torch.compiler.is_compiling() and self._checks_due > 0
        version = given._version if looking else 0
        output = self.seed(given)
        if output.shape != features.shape or (
            output.dtype != features.dtype and not torch.is_autocast_enabled(features.device.type)
        ):
            raise WiringError(_shape_complaint(features, output))
        full = blending.candidate(self.blend, inner, output.to(features.dtype), self.gate)
        if self._mode == BLENDED:
            return blending.blend(features, full, self.alpha)
        if looking:
            self._look(inner, output, full, wrote=given._version != version)
        return behind(features, full, self.alpha, self.isolation)

    def germinate(
        self,
        seed: nn.Module | Callable[[], nn.Module],
        *,
        probe: Tensor | None = None,
        isolation: Isolation | None = None,
        blend: str = blending.ADD,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Put a seed into the slot: stage GERMINATED, not yet part of the forward pass.

        Args:
            seed: a module, or a factory that makes one.
            probe: features as the slot will see them, any batch size. The seed is run on them once, in eval
                mode, without a change of random state. Without it the first forward pass checks.
            isolation: how it will train; ``TrustRegion()`` unless told.
            blend: "add", "multiply" or "gate", see ``blending.candidate``. A gate network belongs to the seed: it
                learns with it, and is made for the channels of the probe.
            device: moved there; the probe's device unless told.
            dtype: floating parameters are converted to it; the probe's dtype unless told.

        Raises:
            WiringError: the slot is occupied, the seed has no trainable parameter, it changes the shape or
                dtype of the probe, or a gate has no features to be made for; the slot is as it was.
            ConfigurationError: ``seed`` is neither a module nor a factory of one, or an unknown blend.
        """
        if self.stage is not Stage.DORMANT:
            raise WiringError(
                f"the slot is occupied or resting (stage {self.stage}); prune its seed and wait for DORMANT"
            )
        module = seed_module(seed)
        if not sum(p.numel() for p in module.parameters() if p.requires_grad):
            raise WiringError("the seed has no trainable parameter: it could never learn")
        if isolation is not None and not isinstance(isolation, (StraightThrough, TrustRegion)):
            raise ConfigurationError(f"isolation must be TrustRegion or StraightThrough, got {isolation!r}")
        blending.check_blend(blend)
        if blend == blending.GATE and probe is None:
            raise WiringError("blend 'gate' needs probe=features: the gate network is made for their channels")
        if probe is not None:
            device, dtype = device or probe.device, dtype or probe.dtype
        module.to(device=device, dtype=dtype)
        # Without a probe nobody knows whether the seed writes into its input: it gets a copy until it was seen.
        writes, leaky, kept = (True, False, None) if probe is None else _try_seed(module, probe)
        place = device or next(module.parameters()).device
        gate = None
        if blend == blending.GATE and probe is not None:
            gate = blending.GateNetwork(blending.channels_of(probe)).to(device=place, dtype=dtype)
        self._copy_input = writes
        self.preserves_shape = True if probe is not None else None
        self._place(module, gate, blend, place)
        self.isolation, self._handed_on = isolation or TrustRegion(), kept
        # A compiled forward pass is not looked at, but its graph is the one of the probe: a leak there is a leak
        # in every pass.
        self.isolation_violations = ISOLATION_CHECKS if leaky else 0
        self.move(Stage.GERMINATED)

    def move(self, target: Stage, reason: str = "", initiator: str = "script") -> None:
        """Move to ``target`` by the table, and compute as that stage does from the next forward pass on.

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
        """Set the blend factor, in place and without waiting for the device.

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
        if self.frozen is None:
            self.frozen = tuple(name for name, p in self.named_parameters() if p.requires_grad)
        for name, parameter in self.named_parameters():
            if name in self.frozen:
                parameter.requires_grad_(False)
                parameter.grad = None

    def thaw(self) -> None:
        """Let the seed learn again after ``freeze()``."""
        for name, parameter in self.named_parameters():
            if name in (self.frozen or ()):
                parameter.requires_grad_(True)
        self.frozen = None

    def check_isolation_again(self) -> None:
        """Look for leaks in the next eager forward passes in TRAINING, as in the first ones."""
        self._checks_due = ISOLATION_CHECKS if self._mode == BEHIND else 0

    def lifecycle_state(self) -> dict[str, Any]:
        """Plain values that the module's ``state_dict`` does not hold; for ``load_lifecycle_state``."""
        floating = [p.dtype for p in self.parameters() if p.is_floating_point()]
        return {
            "version": self.VERSION,
            "lifecycle": self.lifecycle.state_dict(),
            "alpha": self._alpha_value,
            "rho": self.isolation.rho if isinstance(self.isolation, TrustRegion) else None,
            "blend": self.blend,
            "channels": self.gate.channels if isinstance(self.gate, blending.GateNetwork) else None,
            "dtype": str(floating[0]).removeprefix("torch.") if floating else None,
            "frozen": None if self.frozen is None else list(self.frozen),
            "isolation_violations": self.isolation_violations,
            "checks_due": self._checks_due,
            "preserves_shape": self.preserves_shape,
            "copy_input": self._copy_input,
            **_later(self),
        }

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
        values = check_state(state, "SeedSlot", self.VERSION, _KEYS, _LATER)
        restored = Lifecycle()
        restored.load_state_dict(values["lifecycle"])
        occupied = restored.stage not in (Stage.DORMANT, *RESTING)
        if self.seed is not None and (seed is not None or not occupied):
            raise StateDictError(
                f"SeedSlot: the saved stage is {restored.stage}, but the slot is occupied: use a fresh model"
            )
        if occupied and self.seed is None and seed is None:
            raise StateDictError(
                f"SeedSlot: the saved stage is {restored.stage}, but the slot is empty: germinate the same seed first"
            )
        violations, due, kept = values["isolation_violations"], values["checks_due"], values["handed_on"]
        alpha = values["alpha"]
        kinds = type(alpha), type(violations), type(due), type(kept)
        if kinds not in ((float, int, int, float), (float, int, int, NoneType)) or not 0.0 <= alpha <= 1.0:
            raise StateDictError(
                f"SeedSlot: bad alpha {alpha!r}, isolation_violations {violations!r}, checks_due {due!r} or "
                f"handed_on {kept!r}"
            )
        isolation = StraightThrough() if values["rho"] is None else TrustRegion(values["rho"], values["rule"])
        blend, channels, gate = values["blend"], values["channels"], self.gate
        gated = type(channels) is int and channels > 0
        if blend not in blending.BLENDS or gated != (blend == blending.GATE):
            raise StateDictError(f"SeedSlot: blend {blend!r} does not go with channels {channels!r} of a gate")
        dtype = getattr(torch, str(values["dtype"]), None)
        if seed is not None and not isinstance(dtype, torch.dtype):
            raise StateDictError(f"SeedSlot: unknown dtype {values['dtype']!r}")
        if seed is not None and gated:
            gate = blending.GateNetwork(channels)
        elif self.seed is not None and blend != self.blend:
            raise StateDictError(f"SeedSlot: the saved blend is {blend!r}, the seed in the slot has {self.blend!r}")
        parts = {"seed": seed or self.seed, "gate": gate}
        names = {f"{part}.{name}" for part, m in parts.items() if m is not None for name, _ in m.named_parameters()}
        frozen = values["frozen"]
        if frozen is not None and not (isinstance(frozen, list) and names.issuperset(frozen)):
            raise StateDictError(f"SeedSlot: frozen parameters {frozen!r} that the seed does not have")
        if seed is not None:
            seed.to(device=device, dtype=dtype)
            gate = None if gate is None else gate.to(device=device, dtype=dtype)
            self._place(seed, gate, blend, device or next(seed.parameters()).device)
        self.lifecycle, self.isolation, self.isolation_violations = restored, isolation, violations
        self.preserves_shape, self._copy_input, self._handed_on = values["preserves_shape"], values["copy_input"], kept
        self._mode = _FORWARD.get(restored.stage)
        self._checks_due = due
        self.thaw()
        if frozen is not None:
            self.frozen = tuple(frozen)
            self.freeze()
        if self.alpha is not None:
            self.set_alpha(alpha)
            self.alpha.requires_grad_(restored.stage is not Stage.FOSSILIZED)

    def vacate(self) -> None:
        """Empty the slot and forget the life in it, whatever the stage: as it was built."""
        self._clear()
        self.lifecycle, self.isolation, self.isolation_violations = Lifecycle(), TrustRegion(), 0
        self._mode, self._checks_due, self._copy_input = None, 0, False

    def extra_repr(self) -> str:
        """Stage and alpha, for ``print(model)``."""
        return str(self.stage) if self.seed is None else f"{self.stage}, alpha={self._alpha_value:.3g}"

    def _place(self, seed: nn.Module, gate: nn.Module | None, blend: str, device: torch.device) -> None:
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

    def _look(self, inner: Tensor, output: Tensor, full: Tensor, wrote: bool) -> None:
        """Count leaks, and learn whether the seed writes into its input: only then it gets a copy."""
        self._checks_due -= 1
        if self._handed_on is None and not is_functorch_wrapped_tensor(output):
            self._handed_on = handed_on(inner, output)
        self.preserves_shape = True
        assert self.seed is not None
        wrote_into_host = wrote and not self._copy_input
        own = [tensor for module in self.modules_of_seed() for tensor in _own(module)]
        self.isolation_violations += int(wrote_into_host or leaks(full, own) > 0)
        self._copy_input = wrote or _may_write(self.seed)

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


def _before_load(
    slot: nn.Module, state_dict: Mapping[str, Any], prefix: str, metadata: object, strict: object,
    missing: object, unexpected: object, errors: list[str],
) -> None:  # fmt: skip
    """Say what to do about a seed without a place, strict or not: its weights must not get lost silently."""
    assert isinstance(slot, SeedSlot)
    if slot.seed is None and any(key.startswith(f"{prefix}seed.") for key in state_dict):
        errors.append(
            f"slot {prefix.rstrip('.')!r} is empty and the state has a seed for it: "
            "load the controller's state first, growth.load_state_dict(state, seeds=...)"
        )


def _after_load(slot: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(slot, SeedSlot)
    if slot.alpha is not None:
        loaded = slot.alpha.detach()
        # The tensor is the number rounded to float32; the number decides whether alpha is at its target.
        if float(torch.tensor(slot._alpha_value, dtype=torch.float32, device="cpu")) != float(loaded):
            slot._alpha_value = float(loaded)
        slot._keep_alpha_a_leaf()


def seed_module(seed: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """The seed itself, or what its factory makes; ConfigurationError when that is no module."""
    module = seed if isinstance(seed, nn.Module) else seed() if callable(seed) else seed
    if not isinstance(module, nn.Module):
        raise ConfigurationError(f"a seed is a module or a factory of one, got {type(module).__name__}")
    return module


def _later(slot: SeedSlot) -> dict[str, Any]:
    """What goes into the state beyond the keys of 0.1: only what their absence would not say."""
    rule = slot.isolation.rule if isinstance(slot.isolation, TrustRegion) else NORM
    return {key: value for key, value in (("rule", rule), ("handed_on", slot.handed_on)) if value != _LATER[key]}


def _finite(number: Tensor | float | None) -> float | None:
    if number is None or (isinstance(number, Tensor) and number.is_meta) or not math.isfinite(number):
        return None
    return float(number)


def _own(seed: nn.Module) -> list[Tensor]:
    return [*seed.parameters(), *seed.buffers()]


def _may_write(seed: nn.Module) -> bool:
    """Whether a layer says so itself: Dropout(inplace=True) writes in training and not in eval mode."""
    return any(getattr(module, "inplace", False) is True for module in seed.modules())


def _try_seed(seed: nn.Module, probe: Tensor) -> tuple[bool, bool, Tensor]:
    """Run the seed on the probe once: whether it writes into its input, and reaches outside itself; ``handed_on``.

    WiringError if it changes the shape or the dtype.
    """
    with _undisturbed(seed, probe.device), torch.enable_grad():
        features = probe.detach().clone()
        version = features._version
        output = seed(features)
    if not isinstance(output, Tensor):
        raise WiringError(f"a seed returns one tensor, this one returned {type(output).__name__}")
    if output.shape != probe.shape or output.dtype != probe.dtype:
        raise WiringError(_shape_complaint(probe, output))
    return features._version != version or _may_write(seed), leaks(output, _own(seed)) > 0, handed_on(probe, output)


@contextmanager
def _undisturbed(seed: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode inside; afterwards training flags and random state are as they were."""
    flags = [(module, module.training) for module in seed.modules()]
    devices = [device] if device.type not in ("cpu", "meta") else []
    kind = device.type if devices else "cuda"
    try:
        with torch.random.fork_rng(devices=devices, device_type=kind):
            seed.eval()
            yield
    finally:
        for module, training in flags:
            module.training = training


def _shape_complaint(features: Tensor, output: Tensor) -> str:
    return (
        f"a seed must keep shape and dtype: features {tuple(features.shape)} {features.dtype}, "
        f"seed's output {tuple(output.shape)} {output.dtype}; change the seed, or prune it"
    )
