"""What stands behind each answer of a gate that asks for a hand, and what to do: one table, by the name of the check.

``growth.why(slot)`` and the page on troubleshooting are made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Advice(NamedTuple):
    """Why a gate says so, and the way out.

    Attributes:
        cause: what is usually behind it, in plain words.
        cure: what to do about it.
    """

    cause: str
    cure: str


_WAIT = "Train on; the gate asks again at the end of the next epoch."
_MEASURE = "Call growth.measure() in every step, after backward() and before clipping and optimizer.step()."
_LOSSES = "Look at the loss and the learning rate; growth.monitor.tensors() names the tensors."

ADVICE: Mapping[str, Advice] = MappingProxyType(
    {
        # the slot and the seed
        "slot_occupied": Advice(
            "The slot has a seed, or rests after one was pruned.",
            "Use another slot, or prune the seed and wait until the slot is DORMANT.",
        ),
        "no_parameters": Advice(
            "The seed has no parameter that requires a gradient: it could never learn.",
            "Give it one, or set requires_grad_(True) on those that it has.",
        ),
        "shape_changed": Advice(
            "What the seed returns has another shape or dtype than the features that it gets.",
            "Change the seed: it replaces the features, return x + f(x).",
        ),
        "not_germinated": Advice(
            "The seed is past the stage before this gate, or not there yet.", "Ask the gate that guards its next stage."
        ),
        "not_in_training": Advice(
            "The seed is past TRAINING, or not there yet.", "Ask the gate that guards its next stage."
        ),
        "not_in_blending": Advice(
            "The seed is past BLENDING, or not there yet.", "Ask the gate that guards its next stage."
        ),
        "not_in_holding": Advice(
            "The seed is past HOLDING, or not there yet.", "Ask the gate that guards its next stage."
        ),
        # the measurement
        "gradient_never_measured": Advice(
            "Nothing was measured since the seed came into its stage: measure() was not called, or for another loss.",
            f"{_MEASURE} With a tag=, with that very tag.",
        ),
        "seed_gradient_missing": Advice(
            "No parameter of the seed had a gradient: it is not in the forward pass, or measured after zero_grad().",
            f"{_MEASURE} See that the model calls the slot, x = self.slot(x), and no torch.no_grad() is around it.",
        ),
        "gradient_not_finite": Advice(
            "Every measurement was dropped: a gradient was NaN or infinite, or the step was skipped.", _LOSSES
        ),
        "gradients_not_finite": Advice(
            "Too many measurements were dropped: gradients of the seed or the host were NaN or infinite, or a "
            "GradScaler skipped the step.",
            f"{_LOSSES} With a GradScaler write growth.measure(scaler); a smaller learning rate of the seed, "
            "germinate(..., lr=...), often ends it.",
        ),
        "seed_not_finite": Advice(
            "Gradients of the seed were NaN or infinite where the host's were finite. Behind the host they cost it "
            "nothing; blended in, they would be its own.",
            f"{_LOSSES} Find the operation in the seed; after a window without one it is asked again. Where a "
            "GradScaler skips such steps anyway, GateThresholds(max_seed_not_finite=None).",
        ),
        "host_gradient_undefined": Advice(
            "The host has next to no gradient (frozen, or it has converged), so the ratio has nothing to divide by.",
            "Let the blend gain decide: keep min_blend_gain_t, or switch the ratio off, min_gradient_ratio=None.",
        ),
        "gradient_ratio_undefined": Advice(
            "The ratio that the thresholds name has no value: a side of it has no elements.",
            'Use the other one, GateThresholds(ratio="norm") or "rms".',
        ),
        "clipped_before_measuring": Advice(
            "The norms all sit at one largest value: gradients were clipped before they were measured.",
            "Move growth.measure() before clipping, or clip by growth.clip_grad_norm_(max_norm).",
        ),
        "samples_insufficient": Advice(
            "There are fewer measurements since the seed came into its stage than the gate wants.",
            "Train on; with long steps and short epochs lower min_samples.",
        ),
        "samples_stale": Advice(
            "The optimizer has stepped many times without a measurement.",
            f"{_MEASURE} With measure(every=n) raise max_sample_age above n.",
        ),
        "samples_age_unknown": Advice(
            "Nobody knows which optimizer steps, so nobody knows how old the measurements are.",
            "Give the monitor its optimizers: GradientMonitor(..., optimizers=...), or monitor.watch(optimizer).",
        ),
        # does it learn?
        "seed_frozen": Advice(
            "No parameter of the seed requires a gradient.", "Call seed.requires_grad_(True), or prune the seed."
        ),
        "optimizer_never_measured": Advice(
            "The monitor knows no optimizer, so nobody can say whether the seed is in one.",
            "GradientMonitor(..., optimizers=...), or monitor.watch(optimizer).",
        ),
        "seed_in_no_optimizer": Advice(
            "Parameters of the seed are in no optimizer that is known: they get gradients and never move.",
            "Leave add_to_optimizer=True in germinate, or tell of the seed's own optimizer: "
            "growth.monitor.watch(optimizer).",
        ),
        "optimizer_never_stepped": Advice(
            "The optimizer that holds the seed has not stepped since its window began.",
            "Call step() of that optimizer; with a GradScaler see whether it skips every step.",
        ),
        "optimizer_stopped": Advice(
            "The optimizer that holds the seed steps no more; probably another one has taken its place.",
            "Put the seed's parameters into the one that steps, and tell of it: growth.monitor.watch(optimizer).",
        ),
        "weights_not_moved": Advice(
            "The seed's weights are where they were: a learning rate of 0, a warm-up from 0, or skipped steps.",
            "Look at the learning rate of the seed's group, growth.optimizer.param_groups[-1]; tell of schedulers: "
            "GrowthController(..., schedulers=[...]).",
        ),
        "displacement_never_measured": Advice(
            "How far the weights have moved is not known: their values at the beginning could not be kept.",
            "evidence.reason says why; min_displacement=None does not ask.",
        ),
        "weights_ran_away": Advice(
            "The seed's weights have grown beyond all measure.",
            "Prune it and germinate it again with a smaller lr; keep the default isolation, TrustRegion().",
        ),
        "runaway_never_measured": Advice(
            "How far the weights have moved is not known: their values at the beginning could not be kept.",
            "evidence.reason says why; max_displacement=None does not ask.",
        ),
        "gradients_dead": Advice(
            "Most of the seed's tensors have a gradient that is all zero: dead ReLUs, layers that start at zero, or "
            "parts that the forward pass leaves out.",
            "Start the seed otherwise (only its last layer at zero), or take out what is not used.",
        ),
        "live_share_never_measured": Advice("No measurement says which of its tensors get a gradient.", _MEASURE),
        "gradients_vanishing": Advice(
            "Gradients of the seed are next to nothing.",
            "Look at what is between them and the loss; vanishing_rms is absolute, so scale it to your loss.",
        ),
        "vanishing_never_measured": Advice(
            "Vanishing tensors are not counted.", "GradientMonitor(..., vanishing_rms=...), or switch the question off."
        ),
        "gradients_exploding": Advice(
            "Gradients of the seed are very large.",
            "A smaller lr for the seed, or clipping; exploding_rms is absolute, and a loss that is a sum has larger "
            "gradients.",
        ),
        "exploding_tensors_never_measured": Advice(
            "Exploding tensors are not counted.", "GradientMonitor(..., exploding_rms=...), or switch the question off."
        ),
        "gradients_unhealthy": Advice(
            "Too many of the seed's tensors are silent, vanishing or exploding.",
            "growth.monitor.tensors() shows each one's state.",
        ),
        "health_never_measured": Advice(
            "Vanishing or exploding tensors are not counted, so there is no health.",
            "Give the monitor both limits, vanishing_rms and exploding_rms, or set min_health=None.",
        ),
        "seed_gradient_low": Advice(
            "The seed's gradients are small beside the host's: little of the loss reaches it.",
            'For a seed much smaller than the host GateThresholds(ratio="rms"); else look whether its output is used.',
        ),
        "seed_gradient_exploding": Advice(
            "The seed's gradients are beyond all measure beside the host's.",
            "A smaller lr for the seed, and TrustRegion() rather than StraightThrough().",
        ),
        "progress_unknown": Advice(
            "The threshold depends on how far the training is, and nobody said how long it will be.",
            "GrowthController(..., total_epochs=...) or total_steps=....",
        ),
        "seed_not_ready": Advice("It has not been in TRAINING for as many epochs as the gate wants.", _WAIT),
        "global_improvement_insufficient": Advice(
            "The model's accuracy has not risen since TRAINING began; a seed behind the host cannot make it.",
            "Leave min_training_improvement=None, its default.",
        ),
        "improvement_never_measured": Advice(
            "No accuracy was told since TRAINING began.", "Tell it, end_epoch(accuracy=...), or do not ask for it."
        ),
        "isolation_violated": Advice(
            "The seed reached into the host: it writes into its input, or hands on features with their graph.",
            "No operation in place on the features; use no tensor of the host in the seed but its features.",
        ),
        "seed_replaces_host": Advice(
            "The seed returns f(x) instead of x + f(x): as far as it is blended in, the host's features are gone.",
            "Return x + f(x), unless that is meant. It is told, and decides nothing.",
        ),
        # does blending help?
        "blend_gain_insignificant": Advice(
            "By the gradients, blending the seed in would not lower the loss, or not by more than chance.",
            "Train on; if it stays so for many epochs there is nothing to gain at this place, or its lr is too small.",
        ),
        "blend_gain_never_measured": Advice(
            "No slope of the loss along the blend was measured: the seed ran without a gradient, or in a graph that "
            "does not reach its alpha.",
            f"{_MEASURE} The model has to call the slot in that very step.",
        ),
        "blend_gain_against": Advice(
            "Every step says that less of the seed would be better.",
            "Prune it, or train it on at a smaller alpha: growth.set_alpha_target(slot, 0.5).",
        ),
        "blend_lowers_no_loss": Advice(
            "Tried on the validation data, blending lowers the loss at no alpha by more than noise.",
            "Train on. If evaluate returns an accuracy let it return the loss; more samples have less noise.",
        ),
        "blend_would_harm": Advice(
            "Tried on the validation data, blending raises the loss at some alpha.",
            "Train on: the trust region becomes smaller by itself. If evaluate returns an accuracy let it return the "
            "loss.",
        ),
        "probe_not_due": Advice(
            "The probe has refused this seed before, and asks again in a few epochs.",
            "Wait, or growth.advance(slot) asks at once.",
        ),
        "training_and_evaluation_disagree": Advice(
            "Gradients, in training mode, say the opposite of the probe, in evaluation mode.",
            "Look at batch norms and Dropout, at another loss in evaluate, or at one that returns an accuracy.",
        ),
        # is it good to have?
        "alpha_not_at_target": Advice(
            "Alpha is still on its way.", "Train on; AlphaSchedule(steps=...) says how many steps it takes."
        ),
        "blending_incomplete": Advice("It has not been in BLENDING for as many epochs as the gate wants.", _WAIT),
        "not_held_long_enough": Advice("It has not been in HOLDING for as many epochs as the gate wants.", _WAIT),
        "accuracy_never_measured": Advice(
            "Nothing says how the model does.",
            "end_epoch(accuracy=...) or end_epoch(loss=...) in every epoch, or GrowthController(..., evaluate=...).",
        ),
        "accuracy_lost": Advice(
            "The model's accuracy has fallen since the seed began to blend.",
            "Prune the seed, or blend more slowly: AlphaSchedule(steps=...).",
        ),
        "loss_risen": Advice(
            "The loss has risen since the seed began to blend: the told one by more than is usual from epoch to epoch, "
            "or that of the probe beyond its noise.",
            "Prune the seed, or blend more slowly: AlphaSchedule(steps=...).",
        ),
        "seed_harms": Advice(
            "The model does worse with the seed than without it, or the seed's weights have run away: its reason says "
            "which.",
            'If it lasts the seed is faded out by itself (on_harm="fade"); growth.prune(slot) takes it out now. Was '
            "its learning rate raised on purpose: GateThresholds(max_pace=None).",
        ),
        "seed_contributes_nothing": Advice(
            "Without the seed the model would do as well, on the validation data.",
            "Hold it longer, or prune it: growth.prune(slot, steps=...).",
        ),
    }
)
