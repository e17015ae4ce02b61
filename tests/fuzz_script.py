"""The training script of a plan, run twice side by side: with a monitor and without one."""

import math

import torch
from muon import Muon
from torch import nn

from seedtriton import AlphaSchedule, FlatGradients, GateThresholds, GradientMonitor, GrowthController, SeedSlot, Stage

FACTORIES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, foreach=False),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Nesterov foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Muon": lambda p: Muon(p),
}
# Gates that ask for next to nothing: the loop says when a seed is to be blended.
ASKING_LITTLE = GateThresholds().without(
    "min_training_epochs", "max_dropped_share", "max_gradient_ratio", "min_samples"
)
SCHEDULE = AlphaSchedule(steps=4, curve="linear")
BLENDED_AT = 0.3  # by a script that moves its slots itself
BATCH, INPUTS, WIDTH = 4, 4, 5


class Net(nn.Module):
    """Two layers with a seed behind each, and one that takes part in some steps only."""

    def __init__(self, plan):
        super().__init__()
        self.bare = plan.kind == "bare"
        self.first, self.second = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.spare = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 3)
        self.norm = nn.BatchNorm1d(WIDTH) if plan.norm else nn.Identity()
        self.dropout = nn.Dropout(plan.dropout)
        for name in "ab"[: plan.seeds]:
            setattr(self, name, new_seed() if self.bare else SeedSlot())
        self.factors, self.blended, self.sparing = {}, None, False

    def forward(self, x):
        x = self.blend("a", self.dropout(torch.tanh(self.first(x))))
        if self.sparing:
            x = x + self.spare(x)
        x = self.norm(torch.tanh(self.second(x)))
        return self.last(self.blend("b", x) if hasattr(self, "b") else x)

    def blend(self, name, h):
        """``h + alpha (s - h)``; ``blended`` is told of h, s and the result."""
        if not self.bare:
            return getattr(self, name)(h)
        s = getattr(self, name)(h)
        out = h + self.factors.get(name, 0.5) * (s - h)
        if self.blended:
            self.blended(name, h, s, out)
        return out


def new_seed():
    return nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, WIDTH))


def model_has(model, path):
    return any(name == path for name, _ in model.named_parameters())


reseed = torch.default_generator.manual_seed  # torch.manual_seed looks for its caller's line, 2 ms each time


class Script:
    """One of the two. ``checkpoints()`` trains, and stops where the two are compared.

    The twin (``watched`` False) does by hand what is documented to happen to the training with a monitor: quarantine,
    ``FlatGradients.zero_``, alpha. What it is told by ``heard`` (a batch is over, gradients are cleared) it hands on.
    """

    def __init__(self, plan, watched):
        self.plan, self.watched = plan, watched
        reseed(plan.number)
        self.dtype = getattr(torch, plan.dtype)
        self.model = Net(plan).to(self.dtype)
        self.names = "ab"[: plan.seeds]
        self.frozen, self.replaced, self.poisoned, self.batch = set(), [], False, 0
        self.heard = self.cleared = lambda *_: None
        self.given = None  # explicit gradients, by id of their parameter
        self.quarantined = set()  # seeds, in this step
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=1024.0, growth_interval=3, enabled=plan.scaler != "none"
        )  # fmt: skip
        self.growth = self.monitor = self.flat = None
        if plan.kind == "bare":
            self.model.factors = {
                name: torch.tensor(plan.alpha, requires_grad=True) for name in self.names[: plan.factors]
            }
        self.build_optimizers()
        for _, path in plan.on(0, "born frozen"):
            if model_has(self.model, path):
                self.freeze("freeze", path)
        self.germinate() if plan.kind != "bare" else self.watch()
        if plan.kind != "controller" and watched:
            self.connect()
        self.poison()
        if plan.flat in ("own", "kept") and not watched:  # construction puts zeros where there is no gradient
            self.zero_flat()

    # --- how it is built ---

    def build_optimizers(self):
        plan, model = self.plan, self.model
        held = [p for name, p in model.named_parameters() if not (plan.unheld and name == "last.bias")]
        if plan.measuring == "in backward":
            self.optimizers = [FACTORIES[plan.optimizers[0]]([p]) for p in held]
        elif len(plan.optimizers) == 1:
            self.optimizers = [FACTORIES[plan.optimizers[0]](held)]
        else:
            seeds = {id(p) for name in self.names for p in getattr(model, name).parameters()}
            host = FACTORIES[plan.optimizers[0]]([p for p in held if id(p) not in seeds])
            self.optimizers = [host]
            if seeds:
                self.optimizers.append(FACTORIES[plan.optimizers[1]]([p for p in held if id(p) in seeds]))

    def germinate(self):
        plan, model = self.plan, self.model
        seeds = {}
        for name in self.names:
            reseed(plan.number + 1)
            seeds[name] = new_seed().to(self.dtype)
        for _, path in plan.on(0, "born frozen"):
            if not model_has(self.model, path):
                seeds[path[0]].get_parameter(path[2:]).requires_grad_(False)
                self.frozen |= {path}
        if plan.kind == "controller" and self.watched:
            self.growth = GrowthController(
                model, self.optimizers[0], thresholds=ASKING_LITTLE, mode="permissive", schedule=SCHEDULE,
                window=plan.window, sinks=(),
            )  # fmt: skip
            self.monitor = self.growth.monitor
            self.monitor.lanes = self.lanes
        for name, seed in seeds.items():
            slot = getattr(model, name)
            reseed(plan.number + 2)
            if self.growth:
                verdict = self.growth.germinate(name, seed)
                assert verdict.passed, verdict
                continue
            slot.name = name
            slot.germinate(seed)
            slot.move(Stage.TRAINING)
            self.hold(slot.parameters())
        if plan.kind == "slots":
            self.watch()

    def hold(self, parameters):
        """A group of the seeds' optimizer."""
        plan, parameters = self.plan, list(parameters)
        if plan.measuring == "in backward":
            self.optimizers += [FACTORIES[plan.optimizers[0]]([p]) for p in parameters]
        elif len(plan.optimizers) == 2 and len(self.optimizers) == 1:
            self.optimizers.append(FACTORIES[plan.optimizers[1]](parameters))
        else:
            self.optimizers[-1].add_param_group({"params": parameters})

    @property
    def lanes(self):
        return torch.float64 if self.plan.lanes64 else torch.float32

    def watch(self):
        """The monitor of a script without a controller."""
        plan, model = self.plan, self.model
        if not self.watched:
            return
        seeds = {name: getattr(model, name) if model.bare else getattr(model, name).seed for name in self.names}
        inside = {id(p) for seed in seeds.values() for p in seed.parameters()}
        alphas = model.factors if model.bare else {name: getattr(model, name) for name in self.names}
        self.flat = FlatGradients(model) if plan.flat in ("own", "kept") else None
        self.monitor = GradientMonitor(
            [p for p in model.parameters() if id(p) not in inside] if plan.listed else model,
            seeds, window=plan.window, alphas=alphas, optimizers=self.optimizers if plan.known else (),
            lanes=self.lanes, quarantine=plan.quarantine, flat="auto" if plan.flat == "auto" else self.flat,
        )  # fmt: skip

    def connect(self):
        plan = self.plan
        if plan.attached:
            self.monitor.attach(*self.order(), scaler=self.scaler if plan.scaler != "none" else None)
        if plan.collected:
            self.monitor.collect_in_backward()

    def order(self):
        return self.optimizers[::-1] if self.plan.seeds_first else self.optimizers

    # --- what it knows ---

    def seed(self, name):
        found = getattr(self.model, name)
        return found if self.model.bare else found.seed

    def parameter(self, path):
        owner, name = path.rsplit(".", 1)
        inside = owner[0] in "ab"
        return self.seed(owner[0])[int(owner[2:])] if inside else getattr(self.model, owner), name

    def segments(self):
        """The parameters of the host and of each seed."""
        seeds = [list(self.seed(name).parameters()) for name in self.names]
        inside = {id(p) for seed in seeds for p in seed}
        return [[p for p in self.model.parameters() if id(p) not in inside], *seeds]

    def gradient(self, p):
        return p.grad if self.given is None else self.given.get(id(p))

    def scaler_states(self):
        """What the scaler has done since its last update, by optimizer."""
        return self.scaler._per_optimizer_states if self.scaler.is_enabled() else {}

    def behind(self, name):
        """Whether the host does not feel this seed: it is clipped apart and may be quarantined."""
        return self.model.bare or getattr(self.model, name).behind

    def alpha(self, name):
        return self.model.factors.get(name) if self.model.bare else getattr(self.model, name).alpha

    # --- what it does ---

    def poison(self):
        def hook(gradient):
            return gradient * math.inf if self.poisoned else None

        owner, name = self.parameter("a.0.weight")
        parameter = getattr(owner, name)
        before = parameter.requires_grad
        parameter.requires_grad_(True)
        parameter.register_hook(hook)
        parameter.requires_grad_(before)

    def freeze(self, what, path):
        """Freeze, or let learn again."""
        names = [path] if what != "freeze seed" else ["a.0.weight", "a.0.bias", "a.2.weight", "a.2.bias"]
        for name in names:
            owner, attribute = self.parameter(name)
            p = getattr(owner, attribute)
            p.requires_grad_(name in self.frozen)
            if not p.requires_grad:
                p.grad = None
            self.frozen ^= {name}
        if self.flat and self.plan.flat_refreshed:
            self.flat.refresh()

    def replace(self, step, how):
        """Another parameter in place of one; the old one keeps a gradient."""
        path = "a.0.weight" if step % 2 else "second.weight"
        owner, name = self.parameter(path)
        old = getattr(owner, name)
        new = nn.Parameter(old.detach() * 0.5, requires_grad=old.requires_grad)
        setattr(owner, name, new)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            optimizer.state.pop(old, None)
        if old.requires_grad:
            old.grad = torch.full_like(old, 3.0)
        self.replaced.append(old)
        if path == "a.0.weight":
            self.poison()
        if self.flat:
            self.flat.refresh()
        if self.watched and how == "refresh":
            self.monitor.refresh()
        elif self.watched and how == "read":
            self.monitor.read()

    def loss(self, place, x=None):
        reseed(self.plan.number * 1_000_003 + place)
        x = torch.randn(BATCH, INPUTS, dtype=self.dtype) if x is None else x
        with torch.autocast("cpu", torch.bfloat16, enabled=self.plan.autocast):
            out = self.model(x)
        return (out.float() if self.plan.autocast else out).sub(1.0).pow(2).mean()

    def backward(self, place, overflow=False):
        loss = self.scaler.scale(self.loss(place)) / self.plan.accumulate
        loss = loss * math.inf if overflow else loss
        if self.plan.measuring != "explicit":
            loss.backward()
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        factors = [alpha for name in self.names if (alpha := self.alpha(name)) is not None]
        found = torch.autograd.grad(loss, parameters + factors, allow_unused=True)
        self.given = self.given or {}
        self.pairs = list(zip(parameters + factors, found))
        for p, gradient in self.pairs:
            if gradient is not None:
                self.given[id(p)] = gradient if id(p) not in self.given else self.given[id(p)] + gradient

    def clear(self, how):
        """Gradients of all, in one of several ways."""
        by, _, kind = how.partition(" ")
        self.given = None
        if self.plan.flat == "own":
            self.flat.zero_() if self.watched else self.zero_flat()
        elif by == "optimizer":
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=kind == "none")
        elif by == "model":
            self.model.zero_grad(set_to_none=kind == "none")
        else:
            for p in self.model.parameters():
                p.grad = None
        self.cleared()

    def zero_flat(self):
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None

    def zero(self):
        by = "optimizer" if self.plan.zero_by == "one by one" else self.plan.zero_by
        self.clear(f"{by} {self.plan.zero}")

    def measure(self):
        """The line in the script; the twin does what is documented of quarantine."""
        plan = self.plan
        if not self.watched:
            self.quarantine()
            return
        options = {"every": plan.every} if plan.every > 1 else {}
        if plan.measuring == "explicit":
            by_id = {id(p): p for p in self.model.parameters()}
            by_id |= {id(self.alpha(name)): self.alpha(name) for name in self.names}
            options["gradients"] = {by_id[key]: gradient for key, gradient in self.given.items()}
        measure = (self.growth or self.monitor).measure
        measure(self.scaler if plan.scaler != "none" else None, **options)

    def quarantine(self):
        """Zeros over the gradients of a seed behind the host that are not finite."""
        for name, parameters in zip(self.names, self.segments()[1:]) if self.plan.quarantine else ():
            gradients = [g for p in parameters if (g := self.gradient(p)) is not None]
            if self.behind(name) and not all(bool(g.isfinite().all()) for g in gradients):
                self.quarantined |= {name}
                self.heard("quarantined", name)
                for gradient in gradients:
                    gradient.zero_()

    def clip(self, max_norm):
        """The norm that the monitor returns, and the same of the twin in float64, where torch clips group by group."""
        plan = self.plan
        if plan.clip == "torch":
            return torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        if self.watched:
            if self.growth:
                return self.growth.clip_grad_norm_(max_norm)
            return self.monitor.clip_grad_norm_(max_norm, apart=plan.clip == "apart")
        self.quarantine()
        host, *seeds = self.segments()
        groups = [host]
        for name, parameters in zip(self.names, seeds):
            if plan.clip == "apart" and self.behind(name):
                groups.append(parameters)
            else:
                groups[0] = groups[0] + parameters
        gradients = [p.grad.double() for p in groups[0] if p.grad is not None]
        total = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients)) if gradients else 0.0
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group, max_norm)
        return total

    # --- the loop ---

    def checkpoints(self):
        plan = self.plan
        if plan.measuring == "in backward":
            self.step_in_backward()
        for step in range(plan.steps):
            yield "start", None
            yield from self.before(step)
            self.model.sparing = step in plan.spare
            for part in range(plan.accumulate):
                self.poisoned, self.quarantined = step in plan.poisons and part == 0, set()
                self.backward(step * 16 + part, overflow=step in plan.overflows and part == plan.accumulate - 1)
                self.poisoned = False
                yield "backward", None
                if plan.measuring == "micro" and part < plan.accumulate - 1:
                    yield "measuring", None
                    self.measure()
                    yield "measured", None
            self.look_about(step)
            yield from self.update(step)
            yield "stepped", torch.get_rng_state()
            if not plan.zero_first:
                self.zero()

    def before(self, step):
        plan = self.plan
        for what, on in plan.on(step, "freeze", "freeze seed"):
            self.freeze(what, on)
            yield "changed", "a." if what == "freeze seed" else on
        for what, path in plan.on(0, "born frozen") if step == 2 else ():
            if path in self.frozen:
                self.freeze(what, path)
                yield "changed", path
        for _, how in plan.on(step, "replace"):
            self.replace(step, how)
            yield "changed", "a." if step % 2 else "second."
        for kind in ("advance", "reset"):
            for _, name in plan.on(step, kind):
                yield kind, name
        for _ in plan.on(step, "read"):
            yield "read", None
        yield "begun", None
        if plan.zero_first:
            self.zero()
        for number, (what, how) in enumerate(plan.on(step, "skip", "measured skip", "host cleared")):
            self.backward(step * 16 + 8 + number)
            if what == "measured skip":
                yield "measuring", None
                self.measure()
                yield "measured", None
            if what == "host cleared":
                self.optimizers[0].zero_grad()
            else:
                self.clear(how)

    def look_about(self, step):
        """Forward and backward passes that are none of the training's."""
        for _ in self.plan.on(step, "stray forward"):
            self.loss(step * 16 + 14)
        for _ in self.plan.on(step, "saliency"):
            self.heard("aside")
            reseed(step)
            x = torch.randn(BATCH, INPUTS, dtype=self.dtype, requires_grad=True)
            torch.autograd.grad(self.loss(step * 16 + 15, x), x)
            self.heard("back")

    def update(self, step):
        """From the last backward pass to the next."""
        plan, scaler = self.plan, self.scaler
        if plan.measuring == "in backward":
            yield "measuring", None
            self.measure()
            return
        if plan.scaler == "after":
            for optimizer in self.optimizers:
                scaler.unscale_(optimizer)
        if not plan.attached:
            for _ in range(2 if plan.measuring == "twice" else 1):
                yield "measuring", None
                self.measure()
                yield "measured", None
        if plan.measuring == "explicit":
            for p in self.model.parameters():
                p.grad = self.given.get(id(p))
            self.given = None
        if plan.clip != "none":
            if plan.scaler == "before":
                for optimizer in self.optimizers:
                    scaler.unscale_(optimizer)
            yield "clipping", None
            for _, max_norm in [("", plan.max_norm), *plan.on(step, "clip again")]:
                if plan.on(step, "written"):
                    for p in self.model.parameters():
                        if p.grad is not None:
                            p.grad.mul_(0.5)
                yield "clipped", self.clip(max_norm)
        for index, optimizer in enumerate(self.order()):
            yield "stepping", index
            if plan.attached and not self.watched and self.steps(optimizer):
                self.quarantine()
            scaler.step(optimizer)
            if plan.zero_by == "one by one":
                optimizer.zero_grad(set_to_none=plan.zero == "none")
                self.cleared(optimizer)
        scaler.update()

    def steps(self, optimizer):
        """Whether a hook in its step runs: not where a scaler leaves the step out."""
        return self.finite(optimizer) or getattr(optimizer, "_step_supports_amp_scaling", False)

    def finite(self, optimizer):
        held = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        return not self.scaler.is_enabled() or all(bool(g.isfinite().all()) for g in held)

    def step_in_backward(self):
        """An optimizer per parameter, which steps as soon as its gradient is there and frees it."""

        def hook(optimizer):
            def step(parameter):
                self.heard("step", parameter)
                optimizer.step()
                optimizer.zero_grad()

            return step

        for optimizer in self.optimizers:
            for p in optimizer.param_groups[0]["params"]:
                before = p.requires_grad
                p.requires_grad_(True).register_post_accumulate_grad_hook(hook(optimizer))
                p.requires_grad_(before)
