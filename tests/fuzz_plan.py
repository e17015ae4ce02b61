"""Random training loops: a number is a loop, drawn once and for all, so that what fails is repeated by that number."""

import random
from dataclasses import dataclass, fields, replace

# Promises that a loop may rest on. One that is not kept yet is left out of every loop; PENDING says why.
PROMISES = {
    "replaces_row": "a second measure() before the step replaces the row",
    "every": "measure(every=k) measures each k-th step, and clears the slope and moves alpha in each",
    "slope_cleared": "what clears the gradients of a seed clears the slope in its blend factor",
    "slope_frozen": "so it is where all of a seed is frozen in between",
    "slope_replaced": "so it is where a parameter was replaced in between, and nobody said so",
    "slope_flat": "so it is of flat gradients that are zero at alpha = 0, by a factor of the script's own",
    "slope_kept": "what clears those of the host alone does not, nor has a seed to learn for its slopes to be added up",
    "attach_each": "attach() with several optimizers measures each before its own step",
    "collect_unfrozen": "collect_in_backward() finds what was unfrozen later",
    "collect_dropped": "collect_in_backward() forgets a batch that was dropped",
    "collect_unscaled": "collect_in_backward() knows the scale of what it summed after unscale_() and inside step()",
    "collect_lying": "collect_in_backward() measures what backward left alone where it lies, as without it",
    "fused_skips": "a step that a fused optimizer skipped is no step",
    "flat_finds": "FlatGradients zeroes and finds what was unfrozen, without refresh()",
    "quarantine_once": "a step with a seed in quarantine is one sample of the others, with a scaler and without",
    "clip_unscaled": "clipping after measure(scaler) and unscale_() is of gradients that unscale_() left as they were",
    "replaced_noticed": "read() notices parameters that were replaced, without refresh()",
    "replaced_measured": "measure() does, when the old one keeps a gradient",
    "changed_anew": "samples of parameters that were replaced, frozen or thawed are dropped when it is noticed",
}
PENDING = {
    "slope_frozen": "where nothing of a seed learns, no gradient of it can tell",
    "slope_flat": "views of one buffer count their writes together, and zeros look like cleared gradients",
    "clip_unscaled": "unscale_() raises no version counter: the norm is measure(scaler)'s, whatever is still scaled",
}

OPTIMIZERS = (
    "SGD", "SGD momentum", "Nesterov foreach", "Adam", "AdamW foreach", "AdamW fused", "RMSprop", "Adagrad", "Muon",
)  # fmt: skip
FUSED = "AdamW fused"  # unscales by itself
OVERWRITES = "Nesterov foreach"  # its step leaves something else in p.grad: drawn twice as often
MEASURING = (
    "once", "once", "micro", "twice", "attach", "attach", "collect", "collect attach", "in backward", "explicit",
)  # fmt: skip
FREEZABLE = ("first.bias", "last.weight", "spare.weight", "a.0.weight", "a.2.bias")
CLEARS = ("optimizer none", "optimizer zeros", "model none", "model zeros", "by hand")


@dataclass(frozen=True)
class Plan:
    """One training loop.

    ``events`` are (step, what, on what) and happen before the step, but for "stray forward" and "saliency", which come
    between its last backward pass and measuring, and "written" and "clip again", which come before and after clipping.
    """

    number: int
    kind: str = "bare"  # seeds and factors of the script's own; "slots": SeedSlot; "controller": GrowthController
    steps: int = 3
    seeds: int = 1
    factors: int = 1  # seeds with a blend factor
    alpha: float = 0.0
    dtype: str = "float32"
    autocast: bool = False
    norm: bool = False  # batch norm in the host
    dropout: float = 0.0
    listed: bool = False  # the host is given as parameters, not as a module
    optimizers: tuple = ("SGD",)  # one for all, or the host's and the seeds'
    seeds_first: bool = False  # in which order they step
    unheld: bool = False  # a parameter of the host is in no optimizer
    known: bool = True  # the monitor was given the optimizers
    scaler: str = "none"  # "before": measured before unscale_; "after"; "fused": nobody calls unscale_
    overflows: tuple = ()  # steps
    poisons: tuple = ()  # steps in which the first seed alone is not finite
    accumulate: int = 1
    measuring: str = "once"  # "micro", "twice", "attach", "collect", "collect attach", "in backward", "explicit"
    every: int = 1
    flat: str = "none"  # "own": zero_() clears; "kept": the optimizers do; "auto"
    flat_refreshed: bool = False  # refresh() after each change
    zero: str = "none"  # set_to_none, or "zeros"
    zero_by: str = "optimizer"  # "model"; "one by one": each behind its own step
    zero_first: bool = False
    clip: str = "none"  # "together", "apart": the monitor's; "torch"
    max_norm: float = 1.0
    window: int = 128
    lanes64: bool = False
    quarantine: bool = False
    anew: bool = True  # "changed_anew" is checked
    spare: tuple = ()  # steps in which a further layer takes part
    events: tuple = ()

    @property
    def attached(self):
        return "attach" in self.measuring

    @property
    def collected(self):
        return "collect" in self.measuring or self.measuring == "in backward"

    @property
    def kinds(self):
        return {what for _, what, _ in self.events}

    def on(self, step, *kinds):
        return [(what, on) for when, what, on in self.events if when == step and what in kinds]

    def without(self, *kinds):
        return replace(self, events=tuple(event for event in self.events if event[1] not in kinds))

    def needs(self):
        """The promises that this loop rests on."""
        dropped = self.kinds & {"skip", "measured skip"}
        skipping = self.overflows or self.poisons
        replaced = {on for _, what, on in self.events if what == "replace"}
        slopes = self.factors and self.measuring != "explicit"
        found = {
            "replaces_row": self.known and (self.measuring in ("micro", "twice") or "measured skip" in self.kinds),
            "every": self.every > 1,
            "slope_cleared": slopes and (dropped or (self.attached and skipping)),
            "slope_frozen": slopes and "freeze seed" in self.kinds and (dropped or (self.attached and skipping)),
            "slope_replaced": slopes and "nothing" in replaced and (dropped or (self.attached and skipping)),
            "slope_flat": slopes and self.kind == "bare" and not self.alpha and self.flat != "none" and (
                self.accumulate > 1 or self.measuring == "micro" or "measured skip" in self.kinds
            ),
            "clip_unscaled": self.unheld and self.scaler == "before" and self.clip in ("together", "apart"),
            "quarantine_once": self.quarantine and self.poisons and self.seeds == 2 and self.scaler == "none" and (
                self.known and self.measuring in ("micro", "twice")
            ),
            "slope_kept": slopes and (
                "host cleared" in self.kinds or (self.accumulate > 1 and "freeze seed" in self.kinds)
            ),
            "attach_each": self.attached and len(self.optimizers) > 1,
            "collect_unfrozen": self.collected and (
                "born frozen" in self.kinds or (replaced and self.kinds & {"freeze", "freeze seed"})
            ),
            "collect_dropped": self.collected and (dropped or (self.attached and skipping)),
            "collect_unscaled": self.collected and (
                self.scaler == "after" or (self.attached and self.scaler != "none")
            ),
            "collect_lying": self.collected and (
                self.attached or self.accumulate > 1 or self.zero == "zeros" or self.flat in ("own", "kept")
                or "host cleared" in self.kinds
            ),
            "fused_skips": FUSED in self.optimizers and skipping,
            "flat_finds": self.flat in ("own", "kept") and not self.flat_refreshed
            and self.kinds & {"freeze", "freeze seed", "born frozen"},
            "replaced_noticed": "read" in replaced,
            "replaced_measured": "nothing" in replaced,
            "changed_anew": self.anew and (replaced or self.kinds & {"freeze", "freeze seed", "born frozen"}),
        }  # fmt: skip
        return {name for name, needed in found.items() if needed}

    def __str__(self):
        plain = Plan(self.number)
        told = [f"{item.name}={getattr(self, item.name)!r}" for item in fields(self)
                if item.name == "number" or getattr(self, item.name) != getattr(plain, item.name)]  # fmt: skip
        return f"Plan({', '.join(told)})"


def draw(number, pending=PENDING):
    """The loop of this number, without what is pending."""
    plan = _possible(_drawn(number))
    for promise in pending:
        if promise in plan.needs():
            plan = _possible(_spared(plan, promise))
    assert not plan.needs() & set(pending), plan
    return plan


def _drawn(number):
    r = random.Random(number)
    steps, seeds = r.randint(3, 12), r.choice((1, 1, 2))

    def some(share):
        return tuple(step for step in range(steps) if r.random() < share)

    return Plan(
        number,
        kind=r.choice(("bare", "bare", "slots", "controller")),
        steps=steps,
        seeds=seeds,
        factors=r.choice((0, seeds, seeds)),
        alpha=r.choice((0.0, 0.3, 1.0)),
        dtype=r.choice(("float32",) * 6 + ("float64", "bfloat16")),
        autocast=r.random() < 0.1,
        norm=r.random() < 0.2,
        dropout=r.choice((0.0, 0.3)),
        listed=r.random() < 0.3,
        optimizers=tuple(r.choice((*OPTIMIZERS, OVERWRITES)) for _ in range(r.choice((1, 2)))),
        seeds_first=r.random() < 0.5,
        unheld=r.random() < 0.6,
        known=r.random() < 0.9,
        scaler=r.choice(("none", "none", "none", "before", "before", "after", "fused")),
        overflows=some(0.25) if r.random() < 0.6 else (),
        poisons=some(0.2) if r.random() < 0.3 else (),
        accumulate=r.choice((1, 1, 2, 3)),
        measuring=r.choice(MEASURING),
        every=r.choice((1, 1, 1, 2, 3)),
        flat=r.choice(("none", "none", "none", "own", "kept", "auto")),
        zero=r.choice(("none", "none", "zeros")),
        zero_by=r.choice(("optimizer", "optimizer", "model", "one by one")),
        zero_first=r.random() < 0.4,
        clip=r.choice(("none", "together", "apart", "torch")),
        max_norm=r.choice((0.01, 0.1, 1.0, 100.0)),
        window=r.choice((128, 4)),
        lanes64=r.random() < 0.15,
        quarantine=r.random() < 0.3,
        spare=some(0.5),
        events=_events(r, steps, seeds),
    )


def _events(r, steps, seeds):
    found = []
    freezing = r.choice(("none", "none", "freeze", "freeze seed", "born frozen"))
    replacing, dropping = r.random() < 0.25, r.random() < 0.35
    if freezing == "born frozen":
        found.append((0, "born frozen", r.choice(FREEZABLE)))
    for step in range(steps):
        if freezing != "none" and r.random() < 0.3:
            found.append((step, "freeze" if freezing == "born frozen" else freezing, r.choice(FREEZABLE)))
        if replacing and step and r.random() < 0.3:
            found.append((step, "replace", r.choice(("refresh", "refresh", "read", "nothing"))))
        if dropping and r.random() < 0.35:
            found.append((step, r.choice(("skip", "skip", "measured skip")), r.choice(CLEARS)))
        for kind, share in (("host cleared", 0.06), ("stray forward", 0.12), ("saliency", 0.12), ("read", 0.25)):
            if r.random() < share:
                found.append((step, kind, ""))
        if r.random() < 0.1:
            found.append((step, "clip again", r.choice((0.01, 0.3, 100.0))))
        if r.random() < 0.1:
            found.append((step, "written", ""))
        for kind, share in (("reset", 0.06), ("advance", 0.15)):
            if step and r.random() < share:
                found.append((step, kind, "ab"[r.randrange(seeds)]))
    return tuple(found)


def _spared(plan, promise):
    """The same loop without what rests on this promise."""
    gone = {
        "replaces_row": ("measured skip",),
        "slope_cleared": ("skip", "measured skip"),
        "slope_kept": ("host cleared", "freeze seed"),
        "slope_frozen": ("freeze seed",),
        "slope_replaced": ("skip", "measured skip"),
        "collect_unfrozen": ("born frozen", "freeze", "freeze seed"),
        "collect_dropped": ("skip", "measured skip"),
        "collect_lying": ("host cleared",),
    }
    plan = plan.without(*gone.get(promise, ()))
    if promise in ("slope_cleared", "slope_replaced", "collect_dropped") and plan.attached:
        plan = replace(plan, overflows=(), poisons=())
    if promise == "replaces_row" and plan.measuring in ("micro", "twice"):
        return replace(plan, measuring="once")
    if promise in ("replaced_noticed", "replaced_measured"):
        how = "read" if promise == "replaced_noticed" else "nothing"
        return replace(
            plan, events=tuple((s, w, "refresh" if (w, o) == ("replace", how) else o) for s, w, o in plan.events)
        )
    changed = {
        "every": {"every": 1},
        "attach_each": {"optimizers": plan.optimizers[:1]},
        "collect_unscaled": {"scaler": "none" if plan.attached else "before"},
        "collect_lying": {"measuring": "collect", "accumulate": 1, "zero": "none", "flat": "none"},
        "fused_skips": {"overflows": (), "poisons": ()},
        "clip_unscaled": {"unheld": False},
        "quarantine_once": {"poisons": ()},
        "slope_flat": {"flat": "none"},
        "flat_finds": {"flat_refreshed": True},
        "changed_anew": {"anew": False},
    }
    return replace(plan, **changed.get(promise, {}))


def _possible(p):
    """The loop as somebody could write it: without what excludes each other, or is documented as not for each other."""
    p = _of_kind(p)
    if p.dtype != "float32":  # a GradScaler and autocast are for float32
        p = replace(p, scaler="none", autocast=False, lanes64=p.lanes64 and p.dtype == "float64")
    if p.dtype == "bfloat16":  # in which autograd itself sums the slope of the script's own factor, and torch clips
        p = replace(p, factors=0 if p.kind == "bare" else p.factors, clip="torch" if p.clip != "none" else "none")
    p = _measured(p)
    if not p.attached or p.zero_first:
        p = replace(p, zero_by="optimizer" if p.zero_by == "one by one" else p.zero_by)
    if p.flat == "own":
        p = replace(p, zero="zeros", zero_by="optimizer")
    if p.flat in ("own", "kept"):
        p = replace(p.without("host cleared"), unheld=False)
    if p.listed:
        p = p.without("replace")  # a list of tensors cannot be looked up again
    return _scaled(p)


def _of_kind(p):
    if p.kind == "bare":
        return p.without("advance")
    p = replace(p, factors=p.seeds, listed=False, unheld=False)
    if p.kind == "controller":
        one_by_one = p.attached or p.collected
        clip = "apart" if p.clip == "together" else p.clip
        # A controller gives no seed with vectors to what is called Muon.
        optimizers = tuple("SGD momentum" if name == "Muon" else name for name in p.optimizers[:1])
        p = replace(p, known=True, optimizers=optimizers, flat="none", clip=clip, quarantine=True,
                    autocast=False, measuring="once" if one_by_one else p.measuring)  # fmt: skip
    return p


def _measured(p):
    if p.measuring == "in backward":
        p = replace(p, scaler="none", clip="none", accumulate=1, flat="none", optimizers=p.optimizers[:1],
                    unheld=False, zero="none", zero_by="optimizer", quarantine=False)  # fmt: skip
        p = p.without("replace", "skip", "measured skip", "host cleared", "born frozen")
    if p.collected:  # too late for quarantine
        p = replace(p.without("measured skip"), quarantine=False)
        noticed = tuple((s, w, "refresh" if w == "replace" else o) for s, w, o in p.events)
        p = replace(p, events=noticed)
    if p.measuring == "explicit":
        p = replace(p.without("measured skip", "host cleared"), flat="none", quarantine=p.kind == "controller",
                    unheld=False)  # fmt: skip
        p = replace(p, scaler="before" if p.scaler == "after" else p.scaler)
        noticed = tuple((s, w, "refresh" if w == "replace" else o) for s, w, o in p.events)
        p = replace(p, events=noticed)
    if p.attached:
        p = replace(p.without("measured skip"), unheld=False)
    if p.measuring not in ("once", "micro") or not p.known or "measured skip" in p.kinds:
        p = replace(p, every=1)
    if p.measuring != "once" or "measured skip" in p.kinds:
        p = replace(p, known=True)
    return p


def _scaled(p):
    if p.scaler == "none":
        p = replace(p, overflows=())
    else:  # a scaler stops at an optimizer without a gradient
        p = replace(p if len(p.optimizers) == 1 else p.without("freeze seed"), known=True)
    if p.scaler == "fused":
        p = replace(p, optimizers=(FUSED,) * len(p.optimizers), clip="none")
        if p.attached:  # the scaler looks for infinities before the step's hooks run: they know, and cannot mend it
            p = replace(p, poisons=(), overflows=() if p.quarantine else p.overflows)
    if p.every > 1:  # quarantine is part of measuring
        p = replace(p, overflows=(), poisons=()) if p.kind == "controller" else replace(p, quarantine=False)
    if p.scaler == "none" and not (p.quarantine and "advance" not in p.kinds):  # it would end the training
        p = replace(p, poisons=())
    if len(p.optimizers) == 1:
        return p.without("host cleared")
    if p.attached:
        # A hook sees no optimizer that the scaler skips, so these skip together; and unscales by itself only if all do.
        mixed = p.scaler != "none" and len({name == FUSED for name in p.optimizers}) > 1
        p = replace(p, poisons=(), optimizers=("AdamW foreach",) * 2 if mixed else p.optimizers)
    return p
