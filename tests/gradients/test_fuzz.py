"""Random training loops beside a twin without a monitor: see ``fuzz_loops``, which also runs as a program."""

import fuzz_loops
import fuzz_plan
import pytest
import torch

from seedtriton.gradients import clipping, ops, progress, reference
from seedtriton.gradients.monitor import GradientMonitor
from seedtriton.gradients.row import EXTRA, Listed

LOOPS, PART = 300, 25


def run(numbers):
    for number in numbers:
        fuzz_loops.run(fuzz_plan.draw(number))


@pytest.mark.parametrize("first", range(0, LOOPS, PART))
def test_random_loops_keep_every_promise(first):
    run(range(first, first + PART))


# --- what is drawn ---


def test_a_number_is_a_loop():
    assert [fuzz_plan.draw(n) for n in range(50)] == [fuzz_plan.draw(n) for n in range(50)]
    assert len({str(fuzz_plan.draw(n)).partition(",")[2] for n in range(50)}) == 50


def test_300_loops_have_everything_in_them():
    plans = [fuzz_plan.draw(n, {}) for n in range(LOOPS)]
    assert {p.kind for p in plans} == {"bare", "slots", "controller"}
    assert {name for p in plans for name in p.optimizers} == set(fuzz_plan.OPTIMIZERS)
    assert {p.measuring for p in plans} == {"once", "micro", "twice", "attach", "collect", "collect attach",
                                         "in backward", "explicit"}  # fmt: skip
    assert {p.scaler for p in plans} == {"none", "before", "after", "fused"}
    assert {p.clip for p in plans} == {"none", "together", "apart", "torch"}
    assert {p.flat for p in plans} == {"none", "own", "kept", "auto"}
    assert {p.seeds for p in plans} == {1, 2}
    assert {p.every for p in plans} == {1, 2, 3}
    assert {what for p in plans for what in p.kinds} == {
        "freeze", "freeze seed", "born frozen", "replace", "skip", "measured skip", "host cleared", "stray forward",
        "saliency", "read", "reset", "advance", "written", "clip again",
    }  # fmt: skip
    assert {promise for p in plans for promise in p.needs()} == set(fuzz_plan.PROMISES)


@pytest.mark.parametrize("promise", fuzz_plan.PROMISES)
def test_a_promise_that_is_pending_is_in_no_loop(promise):
    plans = [fuzz_plan.draw(n, {promise: "not yet"}) for n in range(LOOPS)]
    assert not any(promise in plan.needs() for plan in plans)
    assert any(plan != fuzz_plan.draw(plan.number, {}) for plan in plans)


def test_what_is_pending_is_a_promise_and_has_a_reason():
    assert fuzz_plan.PENDING.keys() <= fuzz_plan.PROMISES.keys()
    assert all(fuzz_plan.PENDING.values())


# --- it can fail ---


def patched(owner, name, change):
    """``owner.name`` with its result, or what it did, changed by ``change(result, *arguments)``."""

    def put(monkeypatch):
        original = getattr(owner, name)

        def broken(*arguments, **options):
            return change(original(*arguments, **options), *arguments)

        monkeypatch.setattr(owner, name, broken)

    return put


def columns(change):
    def broken(found, *_):
        change(found)
        return found

    return patched(reference, "columns_of_sums", broken)


def gain_of_wrong_sign(monkeypatch):
    def broken(sums, gains, window, rules, scale, original=reference.finish_):
        original(sums, gains, window, rules, scale)
        place = int(window.written - 1) % window.ring.shape[0]
        window.ring[place, 1:, EXTRA] *= -1.0

    monkeypatch.setattr(reference, "finish_", broken)


def slope_not_taken(monkeypatch):
    def broken(sums, gains, window, rules, scale, original=reference.finish_):
        kept = Listed([slope.clone() for slope in gains.tensors], gains.segments)
        original(sums, kept, window, rules, scale)

    monkeypatch.setattr(reference, "finish_", broken)


def clipped_by_a_hair_too_much(found, *_):
    coefficients = ops.coefficients_of(found)
    coefficients.mul_(torch.where(coefficients < 1.0, 1.00001, 1.0))
    return found


BROKEN = {
    "a factor in the sums": (columns(lambda found: found[:, 0].mul_(1.0 + 3e-6)), "sum of squares"),
    "a live tensor too many": (columns(lambda found: found[1:, 1].add_(1.0)), "live tensors"),
    "elements of the wrong segment": (
        patched(reference, "count_by_segment", lambda counts, *_: ((counts[0][0], counts[0][1] + 1), *counts[1:])),
        "elements",
    ),
    "gains of the wrong sign": (gain_of_wrong_sign, "gain"),
    "a slope that is not taken": (slope_not_taken, "gain"),
    "a clip coefficient": (patched(reference, "summarize", clipped_by_a_hair_too_much), "clipped"),
    "the norm of clipping": (patched(ops, "clip_", lambda total, *_: total * 1.00001), "norm returned"),
    "clipping of gradients that have changed": (
        patched(
            clipping.MeasuredGradients, "are",
            lambda same, measured, gradients: same or len(gradients) == len(measured._witnesses) > 0,
        ),
        "norm returned|clipped",
    ),
    "a sample too many": (
        patched(GradientMonitor, "measure", lambda done, monitor, *_: monitor.count.add_(1)), "samples",
    ),
    "a step that is not counted": (
        patched(progress.StepCounter, "since", lambda steps, *_: max(0, (steps or 0) - 1)), "optimizer steps",
    ),
    "a gradient that is touched": (
        patched(ops, "record_", lambda done, gradients, *_: [g.mul_(1.0 + 2e-7) for g in gradients.tensors]),
        "differs from the twin's",
    ),
    "a random number that is drawn": (patched(ops, "record_", lambda *_: torch.rand(1)), "random state"),
    "a state of an optimizer that is touched": (
        patched(
            progress.StepCounter, "hold",
            lambda held, steps, *_: [s.get("exp_avg", torch.zeros(1)).neg_() for o in steps.optimizers()
                                     for s in o.state.values()] != held,
        ),
        "differs from the twin's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("broken, what", BROKEN.values(), ids=BROKEN)
def test_it_sees_what_is_broken(monkeypatch, broken, what):
    broken(monkeypatch)
    with pytest.raises(fuzz_loops.Fault, match=what):
        run(range(40))
