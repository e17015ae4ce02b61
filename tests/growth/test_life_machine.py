"""Random sequences of calls to a controller with two slots: what must hold whatever a script does.

A call that is refused must leave everything as it was; a pass needs evidence.
"""

import copy
import io
import itertools

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from networks import Residual
from torch import nn

from seedtriton import AlphaSchedule, Gate, GateThresholds, GrowthController, SeedSlot, SeedtritonError, Stage
from seedtriton.core.lifecycle import TRANSITIONS

SLOTS = ("one", "two")
WIDTH = 5
# Low enough that random sequences reach every stage, and nothing but the numbers is switched off.
LENIENT = GateThresholds(
    min_training_improvement=None, min_training_epochs=1, min_gradient_ratio=1e-6, max_gradient_ratio=1e9,
    min_samples=2, min_displacement=1e-9, min_live_share=0.1, min_blend_gain_t=None, max_accuracy_drop=None,
    max_dropped_share=0.6,
)  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.one = nn.Linear(3, WIDTH), SeedSlot()
        self.second, self.two = nn.Linear(WIDTH, WIDTH), SeedSlot()
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.last(self.two(torch.tanh(self.second(self.one(torch.tanh(self.first(x)))))))


class Life(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.begin()
        self.x = torch.randn(8, 3)
        self.verdicts = []

    def begin(self):
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.host = {id(p) for p in self.model.parameters()}
        self.growth = GrowthController(
            self.model, self.optimizer, thresholds=LENIENT, schedule=AlphaSchedule(steps=3), window=16, sinks=()
        )

    def attempt(self, call):
        """Call; a refusal must have changed nothing."""
        before = self.snapshot()
        try:
            return call()
        except SeedtritonError:
            assert self.snapshot() == before
            return None

    def snapshot(self):
        slots = [
            (slot.lifecycle.state_dict(), slot.alpha_value, id(slot.seed), id(slot.gate), slot.frozen)
            for slot in self.growth.slots.values()
        ]
        groups = [[id(p) for p in group["params"]] for group in self.optimizer.param_groups]
        return slots, groups, self.growth.monitor.seeds, self.growth.epoch, int(self.growth.monitor.count)

    def grow(self, slot, seed, **options):
        self.attempt(lambda: self.growth.germinate(slot, seed, probe=torch.zeros(2, WIDTH), **options))

    @rule(slot=st.sampled_from(SLOTS), how=st.sampled_from(("add", "multiply", "gate", "add", "in no optimizer")))
    def germinate(self, slot, how):
        options = {"add_to_optimizer": False} if how == "in no optimizer" else {"blend": how}
        self.grow(slot, Residual(WIDTH, 4), **options)

    @rule(wrong=st.sampled_from(("slot", "shape", "parameters", "host", "blend", "group")))
    def germinate_badly(self, wrong):
        seeds = {"shape": nn.Linear(WIDTH, 2), "parameters": nn.Tanh(), "host": self.model.second}
        options = {"blend": {"blend": "stir"}, "group": {"speed": 1.0}}.get(wrong, {})
        self.grow("nowhere" if wrong == "slot" else "one", seeds.get(wrong, Residual(WIDTH, 4)), **options)

    @rule(epochs=st.integers(1, 4))
    def live(self, epochs):
        """Some epochs as a script has them."""
        for _ in range(epochs):
            for _ in range(3):
                self.step(1.0)
            self.end_epoch(0.5)

    @rule(count=st.integers(1, 4))
    def train(self, count):
        for _ in range(count):
            self.step(1.0)

    @rule()
    def burst(self):
        """A batch whose loss is NaN; the script skips its step."""
        self.backward(float("nan"))
        self.growth.measure()
        self.optimizer.zero_grad()

    @rule()
    def measure_too_late(self):
        self.backward(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.growth.measure()

    def backward(self, factor):
        (self.model(self.x).square().mean() * factor).backward()

    def step(self, factor):
        self.backward(factor)
        self.growth.measure()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @rule(accuracy=st.sampled_from((None, 0.9, 93.0)))
    def end_epoch(self, accuracy):
        evidence = self.growth.evidence()
        found = self.attempt(lambda: self.growth.end_epoch(accuracy=accuracy))
        self.verdicts += [(verdict, evidence[verdict.seed]) for verdict in found or ()]

    @rule(slot=st.sampled_from(SLOTS))
    def advance(self, slot):
        evidence = self.growth.evidence()
        verdict = self.attempt(lambda: self.growth.advance(slot))
        if verdict is not None:
            self.verdicts.append((verdict, evidence[slot]))

    @rule(slot=st.sampled_from(SLOTS), steps=st.sampled_from((-1, 0, 0, 2)))
    def prune(self, slot, steps):
        self.attempt(lambda: self.growth.prune(slot, "because", steps=steps))

    @rule(slot=st.sampled_from(SLOTS), goal=st.sampled_from((-0.5, 0.0, 0.4, 1.0, float("nan"))))
    def retarget(self, slot, goal):
        self.attempt(lambda: self.growth.set_alpha_target(slot, goal, steps=2))

    @rule()
    def stop_and_resume(self):
        """As a script does: everything into a file, and into freshly built objects again."""
        file = io.BytesIO()
        parts = {"growth": self.growth, "model": self.model, "optimizer": self.optimizer}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        old = self.growth, self.model
        self.begin()
        self.growth.load_state_dict(saved["growth"], seeds={slot: lambda: Residual(WIDTH, 4) for slot in SLOTS})
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        assert self.growth.evidence() == old[0].evidence()
        assert (self.growth.epoch, self.growth.step) == (old[0].epoch, old[0].step)
        for name, slot in self.growth.slots.items():
            assert slot.lifecycle_state() == old[0].slots[name].lifecycle_state()
        assert torch.equal(self.model(self.x), old[1](self.x))

    @invariant()
    def every_move_is_in_the_table(self):
        for slot in self.growth.slots.values():
            history = slot.lifecycle.history
            for entry in history:
                assert Stage[entry["target"]] in TRANSITIONS[Stage[entry["source"]]]
            assert all(a["target"] == b["source"] for a, b in itertools.pairwise(history))
            assert slot.stage is (Stage[history[-1]["target"]] if history else Stage.DORMANT)

    @invariant()
    def alpha_is_a_share_and_its_tensor_agrees(self):
        for slot in self.growth.slots.values():
            assert 0.0 <= slot.alpha_value <= 1.0
            assert (slot.alpha is None) == (slot.seed is None)
            if slot.alpha is not None:
                assert slot.alpha.is_leaf
                assert torch.equal(slot.alpha.detach(), torch.tensor(slot.alpha_value, dtype=torch.float32))
            if slot.stage in (Stage.GERMINATED, Stage.TRAINING):
                assert slot.alpha_value == 0.0

    @invariant()
    def the_optimizer_holds_the_host_and_living_seeds_and_no_other(self):
        held = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held))
        present = {id(p) for p in self.model.parameters()}
        assert self.host <= set(held) <= present
        assert {id(p) for p in self.optimizer.state} <= set(held)

    @invariant()
    def the_monitor_watches_the_living_and_counts_everything_once(self):
        occupied = [n for n, s in self.growth.slots.items() if s.seed is not None and s.stage is not Stage.FOSSILIZED]
        assert sorted(self.growth.monitor.seeds) == sorted(occupied)
        assert len(self.growth.monitor._watched.tracked) == len(list(self.model.parameters()))
        assert self.growth.monitor.ring.shape[1] == 1 + len(occupied)

    @invariant()
    def no_pass_without_evidence(self):
        for verdict, evidence in self.verdicts:
            if verdict.passed and verdict.gate in (Gate.G2, Gate.G3, Gate.G5):
                assert evidence.samples >= 1
                assert verdict.gate is not Gate.G2 or (evidence.samples >= 2 and evidence.in_optimizer)
        self.verdicts.clear()

    @invariant()
    def behind_the_host_nothing_is_felt(self):
        if any(slot.alpha_value > 0.0 for slot in self.growth.slots.values()):
            return
        plain = copy.deepcopy(self.model)
        for slot in (plain.one, plain.two):
            slot.seed = slot.gate = None
        assert torch.equal(self.model(self.x), plain(self.x))


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
