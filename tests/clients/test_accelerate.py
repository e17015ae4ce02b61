"""prepare_growth in real loops with an Accelerator on a CPU: what is measured, left alone, saved and refused."""

import copy
import re
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from clients.truth import GROWTH, Adapter, Bad, Net, Truth, data, differences, documented, host_of
from torch import nn

from seedtriton import SeedtritonError, Stage, WiringError
from seedtriton.integrations.accelerate import prepare_growth

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def accelerator(precision="no", accumulated=1, scale=None):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    made = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulated)
    if scale is not None:  # as on a GPU, for accelerate itself makes none on a CPU
        made.scaler, made.native_amp = torch.amp.GradScaler("cpu", init_scale=scale), True
        made.state._mixed_precision = "fp16"
    return made


class Run:
    """A training of two epochs of nine batches, as a script with an Accelerator has it."""

    def __init__(self, seed=Adapter, optimizer="AdamW", clip=None, precision="no", accumulated=1, scale=None, **growth):
        self.accelerator = accelerator(precision, accumulated, scale)
        torch.manual_seed(0)
        model = Net()
        optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
        loader = torch.utils.data.DataLoader(data(), 8)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        self.net = model
        self.clip, self.growth, self.truth, self.hosts, self.batch = clip, None, Truth(), [], 0
        if seed is not None:
            self.growth = prepare_growth(
                self.accelerator, self.model, self.optimizer, [self.scheduler], {"slot": seed}, **{**GROWTH, **growth}
            )

    def clip_(self):
        if self.clip == "ours":
            self.growth.clip_grad_norm_(0.05)
        elif self.clip == "theirs" and self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.model.parameters(), 0.05)

    def note(self):
        if self.accelerator.sync_gradients:
            scaler, own = self.accelerator.scaler, [p for p in self.model.parameters() if p.grad is not None]
            scaled = [p.grad for p in own]
            for p in own if scaler is not None else []:
                p.grad = p.grad.float() / scaler.get_scale()
            self.truth.note(self.net.slot, own)
            for p, grad in zip(own, scaled):
                p.grad = grad

    def one(self, batch):
        with self.accelerator.accumulate(self.model):
            loss = nn.functional.cross_entropy(self.model(batch[0]).float(), batch[1])
            self.accelerator.backward(loss)
            if self.growth is not None:
                self.note()
                self.growth.measure()
            self.clip_()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        self.hosts.append(host_of(self.net))

    def train(self, epochs=2, save=None, begin=0):
        for _ in range(epochs):
            for batch in self.loader:
                if save is not None or begin:
                    torch.manual_seed(self.batch)  # an iterator of a loader draws when it begins
                if self.batch >= begin:
                    self.one(batch)
                self.batch += 1
                if save is not None and self.batch == save[1]:
                    self.accelerator.save_state(save[0])
            if self.growth is not None and self.batch > begin:
                self.growth.end_epoch(accuracy=0.5)
        return self

    def whole(self):
        parts = {"growth": self.growth, "model": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}


# --- the shortest use ---


def test_the_lines_of_the_docs_are_enough():
    made, model = accelerator(accumulated=3), Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    loader = torch.utils.data.DataLoader(data(), 8)
    model, optimizer, loader, scheduler = made.prepare(model, optimizer, loader, scheduler)
    names = {
        "accelerator": made, "model": model, "optimizer": optimizer, "loader": loader, "scheduler": scheduler,
        "Adapter": Adapter, "validate": lambda: 0.5,
        "loss_of": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
    }  # fmt: skip
    lines = documented("accelerate")[0]
    assert len(re.findall(r"\bgrowth\b", re.sub(r"#.*", "", lines).replace("import prepare_growth", ""))) == 3
    exec(lines, names)
    assert [verdict.seed for verdict in names["verdicts"]] == ["slot"]
    assert names["growth"].evidence()["slot"].samples == names["growth"].step == 3


def test_nothing_of_accelerate_is_imported():
    code = (
        "import sys, seedtriton.integrations.accelerate\n"
        "assert 'accelerate' not in sys.modules and 'huggingface_hub' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- what is measured ---


@pytest.mark.parametrize("clip", [None, "ours", "theirs"])
@pytest.mark.parametrize(
    "settings, steps",
    [
        ({}, 18),
        ({"accumulated": 4}, 6),
        ({"precision": "bf16"}, 18),
        ({"scale": 1024.0}, 18),
        ({"scale": 1024.0, "accumulated": 4}, 6),
    ],
    ids=str,
)
def test_the_ratio_is_that_of_the_gradients_before_clipping(settings, steps, clip):
    run = Run(clip=clip, thresholds=None, **settings).train()
    evidence = run.growth.evidence()["slot"]
    run.truth.check(evidence, steps)
    assert run.growth.step == steps
    host = torch.tensor([sample[0] for sample in run.truth.samples], dtype=torch.float64).mean().sqrt()
    assert evidence.host_norm == pytest.approx(float(host), rel=1e-6)


def test_what_is_not_whole_is_not_looked_at():
    run = Run(accumulated=4)
    seen, inner = [], run.growth.monitor.measure
    run.growth.monitor.measure = lambda *given, **named: (seen.append(run.batch), inner(*given, **named))
    run.train(1)
    assert seen == [3, 7, 8]


# --- isolation ---


@pytest.mark.parametrize("clip", [None, "theirs"])
@pytest.mark.parametrize("settings", [{}, {"accumulated": 2, "precision": "bf16"}, {"scale": 64.0}], ids=str)
@pytest.mark.parametrize("seed", [Adapter, Bad])
def test_the_host_is_bit_for_bit_that_of_the_loop_without_us(seed, settings, clip):
    def run(seed):
        return Run(seed, "SGD", clip, **settings, **({} if seed is None else {"thresholds": None})).train()

    alone, grown = run(None), run(seed)
    assert differences(alone.hosts, grown.hosts) == []
    assert grown.growth.slots["slot"].stage is Stage.TRAINING
    assert (grown.growth.evidence()["slot"].seed_not_finite > 0) == (seed is Bad)


@pytest.mark.parametrize("scale", [None, 64.0])
@pytest.mark.parametrize("clip", ["ours", "theirs"])
def test_host_and_seed_are_clipped_by_their_own_norms(clip, scale):
    run = Run(clip=clip, thresholds=None, accumulated=2, scale=scale)
    norms, step = [], run.optimizer.step

    def noting(*_):
        if run.accelerator.sync_gradients:
            own = {id(p) for p in run.model.slot.parameters()}
            parts = ([p.grad for p in run.model.parameters() if (id(p) in own) == seed] for seed in (False, True))
            norms.append([float(nn.utils.get_total_norm(part)) for part in parts])
        step()

    run.optimizer.step = noting
    run.train()
    assert torch.tensor(norms) == pytest.approx(torch.full((10, 2), 0.05), rel=1e-4)


def test_one_tensor_and_what_is_no_seeds_are_clipped_as_ever():
    run = Run()
    parameter = run.model.last.weight
    parameter.grad = torch.full_like(parameter, 3.0)
    norm = run.accelerator.clip_grad_norm_(parameter, 1.0)
    assert float(norm) == pytest.approx(3.0 * parameter.numel() ** 0.5)
    assert float(parameter.grad.norm()) == pytest.approx(1.0, rel=1e-4)


def test_a_probe_sees_the_twin_and_not_the_prepared_model():
    x, y = data(32, 1).tensors

    def losses(model):
        return nn.functional.cross_entropy(model(x).float(), y, reduction="none")

    run = Run(Bad, precision="bf16", evaluate=losses)
    run.one((x, y))
    assert max(abs(change) for change in run.growth.probe("slot").changes) > 0.01


# --- stop and resume ---


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("at, stage", [(6, Stage.TRAINING), (24, Stage.BLENDING)])
def test_a_training_goes_on_bit_for_bit(tmp_path, at, stage, accumulated):
    full = Run(accumulated=accumulated, clip="theirs").train(8, save=(tmp_path, at))
    again = Run(accumulated=accumulated, clip="theirs")
    again.accelerator.load_state(tmp_path)
    assert again.growth.slots["slot"].stage is stage
    again.train(8, begin=at)
    assert len(again.hosts) == 72 - at
    assert differences(full.hosts[-len(again.hosts) :], again.hosts) == []
    assert differences(full.whole(), again.whole()) == []


@pytest.mark.parametrize("safe", [True, False])
def test_a_run_can_go_back_to_what_it_was(tmp_path, safe):
    run = Run().train(1)
    x = data(32, 1).tensors[0]

    def outputs():
        with torch.no_grad():
            return run.model.eval()(x)

    run.accelerator.save_state(tmp_path, safe_serialization=safe)
    wanted, before = run.whole(), outputs()
    run.model.train()
    run.train(3)
    assert run.growth.slots["slot"].stage is Stage.BLENDING
    assert not torch.equal(outputs(), before)
    run.accelerator.load_state(tmp_path)
    assert differences(run.whole(), wanted) == []
    assert torch.equal(outputs(), before)
    run.model.train()
    run.train(3)
    assert run.growth.evidence()["slot"].in_optimizer


def test_a_pruned_seed_comes_back_with_the_state_that_had_it(tmp_path):
    run = Run().train(1)
    run.accelerator.save_state(tmp_path)
    wanted = run.whole()
    run.growth.prune("slot")
    assert len(run.optimizer.param_groups) == 1
    run.train(1)
    run.accelerator.load_state(tmp_path)
    assert differences(run.whole(), wanted) == []


def test_a_state_without_seeds_is_loaded_before(tmp_path):
    alone = Run(None).train(1)
    alone.accelerator.save_state(tmp_path)
    run = Run()
    with pytest.raises(WiringError, match="a state without seeds is loaded before prepare_growth"):
        run.accelerator.load_state(tmp_path)
    run = Run(None)
    run.accelerator.load_state(tmp_path)
    run.growth = prepare_growth(run.accelerator, run.model, run.optimizer, [run.scheduler], {"slot": Adapter})
    run.train(1)
    run.truth.check(run.growth.evidence()["slot"], 9)


def test_a_state_with_seeds_is_refused_where_nobody_grows(tmp_path):
    Run().train(1).accelerator.save_state(tmp_path)
    with pytest.raises(RuntimeError, match="is empty and the state has a seed for it"):
        Run(None).accelerator.load_state(tmp_path)


def test_a_damaged_state_changes_nothing(tmp_path):
    run = Run().train(1)
    run.accelerator.save_state(tmp_path)
    wanted = run.whole()
    state = torch.load(tmp_path / "growth.pt", weights_only=True)
    torch.save({**state, "epoch": -1}, tmp_path / "growth.pt")
    with pytest.raises(SeedtritonError, match="damaged epoch"):
        run.accelerator.load_state(tmp_path)
    assert differences(run.whole(), wanted) == []


def test_a_seed_that_nobody_can_make_again_is_named(tmp_path):
    run = Run().train(1)
    run.accelerator.save_state(tmp_path)
    run.growth.seeds.clear()
    with pytest.raises(SeedtritonError, match=r"needed for slots \['slot'\]"):
        run.accelerator.load_state(tmp_path)


# --- refused ---


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_what_shards_the_model_is_refused(kind):
    run = Run(None)
    run.accelerator.state.distributed_type = kind
    with pytest.raises(WiringError, match=f"accelerate's {kind} keeps weights"):
        prepare_growth(run.accelerator, run.model, run.optimizer, seeds={"slot": Adapter})


def test_a_scheduler_that_nobody_told_is_refused():
    run = Run(None)
    with pytest.raises(WiringError, match="CosineAnnealingLR"):
        prepare_growth(run.accelerator, run.model, run.optimizer, seeds={"slot": Adapter})
