"""Random training loops beside a twin without a monitor; every number that the monitor writes against float64.

``python tests/fuzz_loops.py --loops 10000`` runs that many, ``--first 77 --loops 1`` repeats loop 77. After every step:
training is bit for bit the twin's (clipped: as torch clips, within 2e-6); the newest row of the ring is that of the
gradients which the step uses, taken from the twin in float64; the gain is -<g, s - h> for just these; one step made
one sample; the norm that clipping returned is theirs. What the monitor reads out is checked by the same rows.
"""

import argparse
import math
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field

import fuzz_plan
import torch
from fuzz_script import BLENDED_AT, SCHEDULE, Script
from torch.amp.grad_scaler import OptState

from seedtriton import Stage
from seedtriton.gradients.row import ELEMENTS, EXTRA, LIVE, SUMSQ, TENSORS, VANISHING

TOLERANCE = 1e-6  # of sums, norms and gains in float64
CLIPPED = 2e-6  # of gradients that torch has clipped
# What a sum of products keeps of its largest term, by the dtype in which autograd makes the products.
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 1e-2}
TOO_SMALL = 1e-18  # squares of what is below leave float32


class Fault(AssertionError):
    """Something is not as promised."""


@dataclass
class Row:
    """What one sample has to be: of each segment the sum of squares, how many tensors, elements, live and vanishing."""

    step: int
    numbers: list
    gains: dict  # by name: the gain, and how large the products are that cancel in it
    exact: bool = True  # nothing is so small that float32 loses it
    skipped: bool = False  # it was known that a step would be left out

    def usable(self, segment):
        return not self.skipped and all(math.isfinite(self.numbers[side][SUMSQ]) for side in (0, segment))


@dataclass
class Truth:
    """All that a monitor has to know of a training, from the twin alone."""

    plan: fuzz_plan.Plan
    twin: Script
    rows: list = field(default_factory=list)
    open: bool = False  # the newest row is of a step that has not been taken
    step: int = -1

    def __post_init__(self):
        self.slopes = {name: [] for name in self.twin.names}
        self.since = dict.fromkeys(self.twin.names, 0)
        self.loose = {}  # by seed: its window began anew, at this row or a later one, once that was noticed
        self.frozen = {name: self.frozen_for(name) for name in self.twin.names}  # at the last look: some are born so
        self.history = []  # steps taken, after each step
        self.taken, self.marks = Counter(), {name: Counter() for name in self.twin.names}
        self.advanced = {}  # by name, steps tried and taken when blending began
        self.tried = self.stepped = 0
        self.collected, self.part, self.aside = {}, {}, False
        self.gone = set()  # seeds that were in quarantine in this step
        self.twin.cleared, self.twin.heard = self.clear, self.hear
        self.watch_blends()

    # --- listening to the twin ---

    def watch_blends(self):
        if self.twin.model.bare:
            self.twin.model.blended = self.blended
            return
        for name in self.twin.names:
            slot, inner = getattr(self.twin.model, name), {}
            slot.seed.register_forward_hook(lambda m, given, out, inner=inner: inner.update(s=out))
            slot.register_forward_hook(
                lambda m, given, out, inner=inner, name=name: self.blended(name, given[0], inner.get("s"), out)
            )

    def blended(self, name, h, s, out):
        if s is None or not out.requires_grad:
            return
        h, s = h.detach(), s.detach().to(h.dtype)

        def slope(g):
            if not self.aside:
                terms = g.double() * (s - h).double() if h.dtype == torch.bfloat16 else g.double() * (s.double() - h)
                size = float((g.double().abs() * (s.double().abs() + h.double().abs())).sum())
                self.slopes[name].append((float(terms.sum()), size, h.dtype))

        out.register_hook(slope)

    def hear(self, what, p=None):
        if what == "step":
            self.collected[id(p)] = p.grad.clone()
            for index, optimizer in enumerate(self.twin.optimizers):
                self.taken[index] += optimizer.param_groups[0]["params"][0] is p
        elif what == "quarantined":  # its gradients are cleared, and so is their slope: the step uses neither
            self.slopes[p] = []
            self.gone.add(p)
        else:
            self.aside = what == "aside"

    def clear(self, optimizer=None):
        held = None if optimizer is None else set(map(id, held_by(optimizer)))
        for name in self.twin.names:
            if held is None or any(id(p) in held for p in self.twin.seed(name).parameters()):
                self.slopes[name] = []
        self.collected = {}

    # --- rows ---

    def gradient(self, p):
        return self.collected.get(id(p)) if self.plan.measuring == "in backward" else self.twin.gradient(p)

    def measure(self, optimizer=None):
        """The gradients as they are now, of all or of one optimizer."""
        twin = self.twin
        unscaled = any(state["stage"] is OptState.UNSCALED for state in twin.scaler_states().values())
        scale = twin.scaler.get_scale()
        of_gradients = 1.0 if unscaled else scale
        held = None if optimizer is None else set(map(id, held_by(optimizer)))
        numbers, exact = [], True
        for segment, parameters in enumerate(twin.segments()):
            found = [g.double() / of_gradients for p in parameters
                     if (held is None or id(p) in held) and (g := self.gradient(p)) is not None]  # fmt: skip
            sums = [float(g.pow(2).sum()) for g in found]
            sizes = [g.numel() for g in found]
            numbers.append([0.0] * 7)
            numbers[segment][SUMSQ] = sum(sums)
            numbers[segment][LIVE] = sum(s != 0.0 for s in sums)
            numbers[segment][VANISHING] = sum(0.0 < s < 1e-16 * n for s, n in zip(sums, sizes))
            numbers[segment][TENSORS], numbers[segment][ELEMENTS] = len(found), sum(sizes)
            largest = [float(g.abs().max()) * of_gradients for g in found]
            exact = exact and not any(0.0 < value < TOO_SMALL for value in largest)
        gains = {}
        for name in twin.names:
            inside = held is None or any(id(p) in held for p in twin.seed(name).parameters())
            if inside and twin.alpha(name) is not None:
                terms = self.slopes[name]
                size = sum(size * ROUNDING[dtype] for _, size, dtype in terms) / scale
                gains[name] = -sum(value for value, _, _ in terms) / scale, size
        return Row(self.step, numbers, gains, exact, unscaled and not all(map(self.finite, twin.optimizers)))

    def add(self, row):
        # Without a scaler nobody says whether a step was left out in between: what is not finite stays, but in a seed
        # in quarantine, which keeps nobody from a step.
        before = self.rows[-1] if self.open else row
        gone = {segment for segment, name in enumerate(self.twin.names, start=1)
                if name in self.gone and not math.isfinite(before.numbers[segment][SUMSQ])}  # fmt: skip
        usable = all(before.usable(segment) for segment in range(len(row.numbers)) if segment not in gone)
        if self.open and self.plan.known and (self.plan.scaler != "none" or usable):
            for segment in gone:  # it is so for all of the step
                row.numbers[segment][SUMSQ] = math.nan
            self.rows[-1] = row
        else:
            self.rows.append(row)
        self.open = True

    def before_step(self, optimizer):
        """Of an attached monitor, and how many steps each optimizer takes."""
        twin = self.twin
        found = self.finite(optimizer)
        if self.plan.attached and (found or getattr(optimizer, "_step_supports_amp_scaling", False)):
            row = self.measure(optimizer)
            # One that unscales by itself has its hooks called, and is told to skip: what is finite is not used either.
            row.skipped = row.skipped or not found
            if self.part:
                before = self.part["row"]
                row.numbers = [[a + b for a, b in zip(*pair)] for pair in zip(before.numbers, row.numbers)]
                row.gains, row.exact = before.gains | row.gains, before.exact and row.exact
                row.skipped = before.skipped or row.skipped
            self.part = {"row": row}
        self.taken[twin.optimizers.index(optimizer)] += found

    def finite(self, optimizer):
        state = self.twin.scaler_states().get(id(optimizer))
        if state and state["found_inf_per_device"]:
            return not any(float(found) for found in state["found_inf_per_device"].values())
        return self.twin.finite(optimizer)

    def finish_step(self):
        if self.part:
            self.add(self.part["row"])
            self.part = {}
        self.open, self.gone = False, set()
        self.tried += 1
        self.history.append(Counter(self.taken))

    # --- what a read has to say ---

    def begin(self, name):
        self.since[name] = len(self.rows)
        self.loose.pop(name, None)
        self.frozen[name] = self.frozen_for(name)
        self.marks[name] = Counter(self.taken)

    def frozen_for(self, name):
        """What is frozen of this seed and of the host: another seed's own is nothing to it."""
        return frozenset(path for path in self.twin.frozen if path[0] == name or path[0] not in self.twin.names)

    def change(self, path):
        """Something was replaced, frozen or thawed in a seed, or in the host of all."""
        for name in [path[0]] if path[0] in self.twin.names else self.twin.names:
            self.loose.setdefault(name, len(self.rows))

    def settle(self, name, count, steps):
        """Where a window that began anew has begun, as a read of so many samples says: False if it cannot be there."""
        earliest = self.loose.pop(name, None)
        if earliest is None:
            return True
        stayed = self.frozen[name] == self.frozen_for(name) or not self.plan.anew
        self.frozen[name] = self.frozen_for(name)
        before, begun = self.since[name], len(self.rows) - count
        whole = len(self.rows) - max(before, len(self.rows) - self.plan.window)
        if stayed and count == whole and self.steps_of(name) == steps:
            return True
        self.since[name] = begun
        for taken in [*reversed(self.history), Counter()]:
            self.marks[name] = taken
            if self.steps_of(name) == steps:
                return begun >= earliest
        return steps is None

    def window(self, name):
        segment = 1 + self.twin.names.index(name)
        first = max(self.since[name], len(self.rows) - self.plan.window)
        return segment, self.rows[first:]

    def steps_of(self, name):
        own = {id(p) for p in self.twin.seed(name).parameters()}
        taken = [self.taken[index] - self.marks[name][index] for index, optimizer in enumerate(self.twin.optimizers)
                 if any(id(p) in own for p in held_by(optimizer))]  # fmt: skip
        return min(taken, default=None)


class Pair:
    """Twin and watched script, and what is compared between them."""

    def __init__(self, plan):
        self.plan = plan
        self.twin, self.seen = Script(plan, watched=False), Script(plan, watched=True)
        self.truth = Truth(plan, self.twin)
        self.totals, self.random = None, None

    def run(self):
        for (tag, mine), (also, theirs) in zip(self.twin.checkpoints(), self.seen.checkpoints(), strict=True):
            assert tag == also
            getattr(self, tag)(mine, theirs)
        self.whole_ring()
        self.read()

    def check(self, right, what, *values):
        if not right:
            raise Fault(f"step {self.truth.step}: {what}" + (f": want {values[0]}, got {values[1]}" if values else ""))

    def close(self, what, want, got, tolerance=TOLERANCE, size=None):
        if want == got or (math.isnan(want) and math.isnan(got)):
            return
        self.check(abs(want - got) <= tolerance * (abs(want) if size is None else size), what, want, got)

    # --- checkpoints, by tag ---

    def start(self, *_):
        self.truth.step += 1

    def begun(self, *_):
        for name in self.twin.names if self.plan.kind == "controller" else ():
            self.follow_alpha(name)

    def follow_alpha(self, name, measured=0):
        """Alpha moves at the first measurement of each optimizer step; one that a scaler skipped may count or not."""
        alpha = getattr(self.seen.model, name).alpha_value
        tried, taken = self.truth.advanced.get(name, (self.truth.tried, self.truth.stepped))
        least, most = SCHEDULE(self.truth.stepped - taken), SCHEDULE(self.truth.tried - tried + measured)
        self.check(least <= alpha <= most, f"alpha of {name}", (least, most), alpha)
        if alpha != getattr(self.twin.model, name).alpha_value:
            getattr(self.twin.model, name).set_alpha(alpha)

    def backward(self, *_):
        self.same_gradients("after backward")

    def measuring(self, *_):
        row = self.truth.measure()
        self.candidate = row
        if self.plan.every == 1:
            self.truth.add(row)

    def measured(self, *_):
        self.same_gradients("after measure()")
        for name in self.twin.names if self.plan.kind == "controller" else ():
            self.follow_alpha(name, measured=1)

    def clipping(self, *_):
        self.same_gradients("before clipping")

    def clipped(self, want, got):
        self.close("norm returned by clipping", float(want), float(got), CLIPPED if self.plan.clip != "torch" else 0.0)
        for p, q in self.pairs():
            if p.grad is None or q.grad is None:
                self.check(p.grad is q.grad, "a gradient after clipping", p.grad, q.grad)
            elif not equal(p.grad, q.grad):
                off = float((p.grad - q.grad).abs().max())
                near = off <= CLIPPED * float(p.grad.abs().max())
                # A step that is lost; a seed in quarantine may have zeros all the same.
                alike = torch.equal(p.grad.isnan(), q.grad.isnan()) or (self.twin.quarantined and not q.grad.any())
                lost = not math.isfinite(want) and alike
                self.check(near or lost, f"a gradient of shape {tuple(p.shape)} clipped, off by {off}")
                p.grad.copy_(q.grad)

    def stepping(self, index, _):
        self.truth.before_step(self.twin.order()[index])

    def stepped(self, mine, theirs):
        truth, plan = self.truth, self.plan
        truth.finish_step()
        truth.stepped = max(truth.taken.values(), default=0)
        self.check(torch.equal(mine, theirs), "the random state differs from the twin's")
        self.same_training()
        count = int(self.seen.monitor.count)
        if plan.every > 1:
            if count == len(truth.rows) + 1:
                truth.rows.append(self.candidate)
            # A step that a scaler left out is none, so what comes next is measured in its place as well.
            lost = sum(step <= truth.step for step in {*plan.overflows, *plan.poisons})
            least, most = truth.tried // plan.every - lost, -(-truth.tried // plan.every) + lost
            self.check(least <= count <= most, f"samples of {truth.tried} steps", (least, most), count)
        self.check(count == len(truth.rows), "samples", len(truth.rows), count)
        if truth.rows:
            self.row(truth.rows[-1], (count - 1) % plan.window)

    def advance(self, name, _):
        """To BLENDING: by the gate where there is one."""
        twin, seen = getattr(self.twin.model, name), getattr(self.seen.model, name)
        if twin.stage is not Stage.TRAINING:
            return
        if self.seen.growth:
            self.read()
            segment, rows = self.truth.window(name)
            if not rows or not all(row.usable(segment) and row.numbers[segment][TENSORS] for row in rows):
                return
            verdict = self.seen.growth.advance(name)
            self.check(verdict.passed, f"advance({name}): {verdict}")
            self.truth.begin(name)
            self.truth.advanced[name] = self.truth.tried, self.truth.stepped
        else:
            seen.move(Stage.BLENDING)
            seen.set_alpha(BLENDED_AT)
        twin.move(Stage.BLENDING)
        twin.set_alpha(seen.alpha_value)

    def reset(self, name, _):
        self.seen.monitor.reset(name)
        self.truth.begin(name)

    def changed(self, path, _):
        self.truth.change(path)

    def read(self, *_):
        evidence = self.seen.monitor.read()
        self.check(self.seen.monitor.latest().evidence.keys() == evidence.keys(), "latest()")
        for name in self.twin.names:
            self.evidence(name, evidence[name])

    # --- what is compared ---

    def pairs(self):
        return zip(self.twin.model.parameters(), self.seen.model.parameters(), strict=True)

    def same_gradients(self, when):
        for (name, p), q in zip(self.twin.model.named_parameters(), self.seen.model.parameters()):
            want, got = self.twin.gradient(p), self.seen.gradient(q)
            self.check(equal(want, got), f"the gradient of {name} {when} differs from the twin's", want, got)

    def same_training(self):
        if self.plan.measuring != "explicit":
            self.same_gradients("after the step")
        ours, theirs = self.seen.model.state_dict(), self.twin.model.state_dict()
        for name, tensor in theirs.items():
            if torch.is_tensor(tensor) and not name.endswith(".alpha"):
                self.check(equal(tensor, ours[name]), f"{name} differs from the twin's after the step")
        for a, b in zip(self.twin.optimizers, self.seen.optimizers, strict=True):
            for p, q in zip(held_by(a), held_by(b), strict=True):
                left, right = a.state.get(p, {}), b.state.get(q, {})
                self.check(left.keys() == right.keys(), "the optimizer's state differs from the twin's", left, right)
                for key, value in left.items():
                    same = equal(value, right[key]) if torch.is_tensor(value) else value == right[key]
                    self.check(same, f"{key} of the optimizer's state differs from the twin's")
        self.check(self.twin.scaler.get_scale() == self.seen.scaler.get_scale(), "the loss scale")

    def row(self, row, place):
        got = self.seen.monitor.ring[place].tolist()
        for segment, want in enumerate(row.numbers):
            of = f"segment {segment} of the sample of step {row.step}"
            self.close(f"tensors of {of}", want[TENSORS], got[segment][TENSORS])
            self.close(f"elements of {of}", want[ELEMENTS], got[segment][ELEMENTS])
            if not math.isfinite(want[SUMSQ]):
                seen = got[segment][SUMSQ]
                self.check(not math.isfinite(seen), f"sum of squares of {of}", want[SUMSQ], seen)
                continue
            if row.exact or self.plan.lanes64:
                self.close(f"sum of squares of {of}", want[SUMSQ], got[segment][SUMSQ])
                self.close(f"live tensors of {of}", want[LIVE], got[segment][LIVE])
                self.close(f"vanishing tensors of {of}", want[VANISHING], got[segment][VANISHING])
        if all(row.usable(segment) for segment in range(len(row.numbers))):
            self.check(got[0][EXTRA] == 0.0, "a sample is marked as skipped")
            for segment, name in enumerate(self.twin.names, start=1):
                want, size = row.gains.get(name, (math.nan, 0.0))
                of = f"gain of {name} of the sample of step {row.step}"
                self.close(of, want, got[segment][EXTRA], 1.0, size + 1e-30)

    def whole_ring(self):
        first = max(0, len(self.truth.rows) - self.plan.window)
        for number in range(first, len(self.truth.rows)):
            self.row(self.truth.rows[number], number % self.plan.window)

    def evidence(self, name, got):
        truth = self.truth
        whole, steps = got.samples + got.dropped + got.empty, got.optimizer_steps
        self.check(truth.settle(name, whole, steps), f"{name} has {whole} samples, {steps} steps after a change")
        segment, rows = truth.window(name)
        empty = [row for row in rows if not row.numbers[0][TENSORS] and not row.numbers[segment][TENSORS]]
        used = [row for row in rows if row.usable(segment) and row not in empty]
        self.check(got.samples == len(used), f"samples of {name}", len(used), got.samples)
        dropped = len(rows) - len(used) - len(empty)
        self.check(got.dropped == dropped, f"dropped samples of {name}", dropped, got.dropped)
        if self.plan.known or self.plan.attached:
            steps = truth.steps_of(name)
            self.check(got.optimizer_steps == steps, f"optimizer steps of {name}", steps, got.optimizer_steps)
        if not used or not all(row.exact for row in used):
            return
        host, seed = (math.sqrt(sum(row.numbers[k][SUMSQ] for row in used) / len(used)) for k in (0, segment))
        self.close(f"norm of {name}", seed, got.seed_norm)
        self.close("norm of the host", host, got.host_norm)
        if got.ratio is not None:
            self.close(f"ratio of {name}", seed / (host + 1e-8), got.ratio)
        gains = [row.gains[name] for row in used if name in row.gains]
        if gains and not any(math.isnan(gain) for gain, _ in gains):
            want, size = sum(gain for gain, _ in gains) / len(gains), sum(size for _, size in gains) / len(gains)
            self.close(f"mean gain of {name}", want, got.blend_gain, 1.0, size + 1e-30)


def held_by(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def equal(a, b):
    """Bit for bit, the sign of zero and NaN included."""
    if a is None or b is None:
        return a is b
    if a.is_floating_point():
        whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
        a, b = a.detach().contiguous().view(whole), b.detach().contiguous().view(whole)
    return torch.equal(a, b)


def run(plan):
    """Run one loop; Fault, with its number, when something is not as promised."""
    try:
        Pair(plan).run()
    except Fault as fault:
        raise Fault(f"loop {plan.number}, {fault}\n{plan}") from None
    except Exception as error:
        raise Fault(f"loop {plan.number}: {type(error).__name__}: {error}\n{plan}") from error


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loops", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="promises that are pending too")
    parser.add_argument("--only", help="loops that rest on this promise and on no other", choices=fuzz_plan.PROMISES)
    parser.add_argument("--trace", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pending = {} if options.all else fuzz_plan.PENDING
    if options.only:
        pending = {name: "" for name in fuzz_plan.PROMISES if name != options.only}
    begun, faults, steps, kinds = time.perf_counter(), 0, 0, Counter()
    for number in range(options.first, options.first + options.loops):
        plan = fuzz_plan.draw(number, pending)
        if options.only and options.only not in plan.needs():
            continue
        steps += plan.steps
        try:
            run(plan)
        except Fault as fault:
            faults += 1
            kinds[str(fault).splitlines()[0].split(": ", 2)[-1].split(" want ")[0][:60]] += 1
            if faults <= 20:
                print(fault, flush=True)
                if options.trace:
                    traceback.print_exc()
    seconds = time.perf_counter() - begun
    print(f"{options.loops} loops from {options.first}, {steps} steps: {faults} with a fault, {seconds:.0f} s")
    for what, times in kinds.most_common(20):
        print(f"  {times} x {what}")
    return int(faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
