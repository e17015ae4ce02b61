"""GrowthCallback in real Trainers on a CPU: what it measures, what it leaves alone, what it saves and refuses."""

import subprocess
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from clients.truth import GROWTH, Adapter, Bad, Net, Truth, data, differences, documented, host_of
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from seedtriton import ConfigurationError, Stage, WiringError
from seedtriton.integrations.lightning import GrowthCallback, restore_slots

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Lit(pl.LightningModule):
    def __init__(self, optimizer="AdamW", schedule=True):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.kind, self.schedule = Net(), optimizer, schedule

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])

    def training_step(self, batch, _):
        return self.loss(batch)

    def validation_step(self, batch, _):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = getattr(torch.optim, self.kind)(self.parameters(), lr=1e-2)
        if not self.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Watcher(Callback):
    """Notes the gradients of every step before they are clipped; a step draws the same numbers, resumed or not."""

    def __init__(self):
        self.truth, self.hosts, self.stages = Truth(), [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(1000 * trainer.current_epoch + batch_idx)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.truth.note(pl_module.net.slot, pl_module.parameters())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.hosts.append(host_of(pl_module))
        self.stages.append(pl_module.net.slot.stage)


def loaders(validation=True, size=8):
    train = torch.utils.data.DataLoader(data(), size)
    return (train, torch.utils.data.DataLoader(data(32, 1), 16)) if validation else (train,)


def trainer(*callbacks, epochs=2, checkpoints=False, folder=None, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu", callbacks=list(callbacks), max_epochs=epochs, enable_checkpointing=checkpoints,
        default_root_dir=folder, **{**quiet, **settings},
    )  # fmt: skip


def fit(model, *callbacks, validation=True, **settings):
    made = trainer(*callbacks, **settings)
    made.fit(model, *loaders(validation))
    return made


def grower(seed=Adapter, **changes):
    return GrowthCallback({"net.slot": seed}, **{**GROWTH, **changes})


# --- the shortest use ---


def test_the_three_lines_of_the_docs_are_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet = {"accelerator": "cpu", "max_epochs": 2, "logger": False}
    names = {"Adapter": Adapter, "L": SimpleNamespace(Trainer=lambda **given: pl.Trainer(**quiet, **given))}
    lines = documented("Lightning")[0]
    assert len([line for line in lines.splitlines() if line.strip()]) == 3
    exec(lines, names)
    names["trainer"].fit(Lit(), *loaders())
    growth = names["growth"]
    assert growth.growth.slots["net.slot"].stage is Stage.TRAINING
    assert [verdict.seed for verdict in growth.verdicts] == ["net.slot"]
    assert growth.growth.evidence()["net.slot"].samples == 18


def test_nobody_imports_lightning_but_who_asks_for_the_callback():
    code = (
        "import sys, seedtriton, seedtriton.integrations.lightning as room\n"
        "assert not any(name.startswith(('lightning', 'pytorch_lightning')) for name in sys.modules)\n"
        "try: room.Other\nexcept AttributeError as error: print(error)\n"
        "kind = room.GrowthCallback\n"
        "from lightning.pytorch import Callback\n"
        "assert issubclass(kind, Callback) and kind is room.GrowthCallback"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no attribute 'Other'" in done.stdout


# --- what is measured ---


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({}, 18),
        ({"gradient_clip_val": 0.05}, 18),
        ({"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"}, 18),
        ({"accumulate_grad_batches": 4}, 6),
        ({"accumulate_grad_batches": 4, "precision": "bf16-mixed", "gradient_clip_val": 0.05}, 6),
        ({"precision": "bf16-true"}, 18),
        ({"scaler": True}, 18),
        ({"scaler": True, "accumulate_grad_batches": 4, "gradient_clip_val": 0.05}, 6),
    ],
    ids=str,
)
def test_the_ratio_is_that_of_the_gradients_before_clipping(settings, steps):
    if settings.pop("scaler", False):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        settings = {**settings, "plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    watcher, growth = Watcher(), grower(thresholds=None)
    fit(Lit(), growth, watcher, **settings)
    watcher.truth.check(growth.growth.evidence()["net.slot"], steps)
    assert growth.growth.step == steps


def test_what_a_scaler_steps_is_left_scaled_by_a_fused_optimizer():
    class Fused(Lit):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)

    class Unscaled(Watcher):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            scale = trainer.precision_plugin.scaler.get_scale()
            for parameter in pl_module.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad / scale
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            for parameter in pl_module.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad * scale

    watcher, growth = Unscaled(), grower(thresholds=None)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    fit(Fused(), growth, watcher, plugins=[plugin])
    evidence = growth.growth.evidence()["net.slot"]
    watcher.truth.check(evidence, 18)
    host = torch.tensor([sample[0] for sample in watcher.truth.samples], dtype=torch.float64).mean().sqrt()
    assert evidence.host_norm == pytest.approx(float(host), rel=1e-6)


# --- isolation ---


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2, "precision": "bf16-mixed"},
        {"gradient_clip_val": 0.05, "scaler": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [Adapter, Bad])
def test_the_host_is_bit_for_bit_that_of_a_trainer_without_the_callback(settings, seed):
    def run(*callbacks):
        torch.manual_seed(5)
        watcher, more = Watcher(), dict(settings)
        watcher.on_train_batch_start = lambda *_: None  # one stream of random numbers through the whole training
        if more.pop("scaler", False):
            more["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]
        fit(Lit("SGD"), watcher, *callbacks, **more)
        return watcher.hosts

    growth = grower(seed, thresholds=None)
    assert differences(run(), run(growth)) == []
    evidence = growth.growth.evidence()["net.slot"]
    assert growth.growth.slots["net.slot"].stage is Stage.TRAINING
    assert (evidence.seed_not_finite > 0) == (seed is Bad)


def test_a_clipping_of_the_modules_own_is_apart_as_well():
    class Own(Lit):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")

    def run(*callbacks):
        watcher = Watcher()
        fit(Own("SGD"), watcher, *callbacks)
        return watcher.hosts

    assert differences(run(), run(grower(Bad, thresholds=None))) == []


def test_every_seed_behind_the_host_is_clipped_by_its_own_norm():
    class After(Callback):
        def __init__(self):
            self.norms = []

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            own = [p.grad for p in pl_module.net.slot.parameters() if p.grad is not None]
            host = [p.grad for n, p in pl_module.named_parameters() if ".slot." not in n and p.grad is not None]
            if own:
                self.norms.append([float(torch.nn.utils.get_total_norm(g)) for g in (host, own)])

    after = After()
    fit(Lit(), grower(thresholds=None), after, gradient_clip_val=0.01)
    assert len(after.norms) == 16
    assert torch.tensor(after.norms).max() <= 0.01 * (1 + 1e-5)
    assert torch.tensor(after.norms).min() > 0.005


def test_the_module_is_left_as_it_was():
    model = Lit()
    before, growth = set(vars(model)), grower()
    fit(model, growth)
    assert {"clip_gradients", "on_load_checkpoint", "on_save_checkpoint"}.isdisjoint(vars(model))
    assert set(vars(model)) >= before

    class Boom(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fit(model, growth, Boom())
    assert "clip_gradients" not in vars(model)


# --- several optimizers, by hand ---


class ByHand(Lit):
    """Two optimizers, of which the first has the network with the slot."""

    def __init__(self, clip=True):
        super().__init__(schedule=False)
        self.automatic_optimization, self.other, self.clip = False, nn.Linear(4, 4), clip

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=1e-2) for part in (self.net, self.other)]

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.clip:
            self.clip_gradients(optimizer, 0.05, "norm")
        optimizer.step()


class Adversaries(ByHand):
    def training_step(self, batch, _):
        first, second = self.optimizers()
        self.step(first, self.loss(batch) + self.other(self.net(batch[0])).square().mean())
        self.step(second, 7 * self.other(self.net(batch[0])).square().mean())  # reaches into the first one's network


class Halves(ByHand):
    def training_step(self, batch, _):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.other(self.net(batch[0])), batch[1]))
        for optimizer in reversed(self.optimizers()):
            if self.clip:
                self.clip_gradients(optimizer, 0.05, "norm")
            optimizer.step()


class ByHandWatcher(Watcher):
    def __init__(self, noted):
        super().__init__()
        self.noted = noted

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pass

    def on_after_backward(self, trainer, pl_module):
        self.passes = getattr(self, "passes", 0) + 1
        if self.passes % self.noted == 0:
            self.truth.note(pl_module.net.slot, pl_module.parameters())


@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("kind", [Adversaries, Halves])
def test_one_sample_per_step_of_the_optimizer_that_trains_the_seeds(kind, clip):
    watcher, growth = ByHandWatcher(1), grower(thresholds=None)
    if kind is Adversaries:
        watcher.on_after_backward = lambda trainer, module: None
        step = ByHand.step

        def noting(self, optimizer, loss):
            optimizer.zero_grad()
            self.manual_backward(loss)
            if optimizer is self.optimizers()[0]:
                watcher.truth.note(self.net.slot, self.parameters())
            if self.clip:
                self.clip_gradients(optimizer, 0.05, "norm")
            optimizer.step()

        ByHand.step = noting
    try:
        fit(kind(clip), growth, watcher)
    finally:
        if kind is Adversaries:
            ByHand.step = step
    watcher.truth.check(growth.growth.evidence()["net.slot"], 18)
    assert growth.growth.step == 18


@pytest.mark.parametrize("kind", [Adversaries, Halves])
def test_by_hand_the_host_is_that_of_a_trainer_without_the_callback(kind):
    def run(*callbacks):
        watcher, model = ByHandWatcher(100), kind()
        fit(model, watcher, *callbacks)
        # In quarantine before it is clipped: a step with gradients that are not finite would have spoilt the seed.
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        return watcher.hosts

    assert differences(run(), run(grower(Bad, thresholds=None))) == []


def test_an_optimizer_that_is_not_there_is_named():
    with pytest.raises(ConfigurationError, match="optimizer_idx=1, and the module has 1"):
        fit(Lit(), grower(optimizer_idx=1))


def test_schedulers_of_other_optimizers_are_none_of_the_seeds():
    class Both(Adversaries):
        def configure_optimizers(self):
            both = super().configure_optimizers()
            return both, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in both]

    growth = grower(thresholds=None)
    made = fit(Both(), growth)
    assert [len(c.scheduler.base_lrs) for c in made.lr_scheduler_configs] == [2, 1]


# --- epochs and numbers ---


class Told:
    def __init__(self):
        self.events = []

    def __call__(self, event):
        if event["event"] == "epoch" and event["seed"] is None:
            self.events.append((event["accuracy"], event["loss"]))


@pytest.mark.parametrize(
    "monitor, validation, settings, epochs",
    [
        ("val_acc", True, {}, 2),
        ("val_loss", True, {}, 2),
        (None, True, {}, 2),
        (None, False, {}, 2),
        ("train_loss", False, {}, 2),
        ("val_acc", True, {"check_val_every_n_epoch": 2}, 1),
        ("val_acc", True, {"val_check_interval": 3}, 6),
        ("val_acc", True, {"num_sanity_val_steps": 2}, 2),
    ],
)
def test_an_epoch_ends_with_its_validation(monitor, validation, settings, epochs):
    class Logging(Lit):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

    class Metrics(Callback):
        def __init__(self):
            self.told = []

        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                self.told.append(float(trainer.callback_metrics[monitor or "val_acc"]))

    told, metrics = Told(), Metrics()
    growth = grower(monitor=monitor, sinks=[told], thresholds=None)
    fit(Logging(), metrics, growth, validation=validation, **settings)
    assert growth.growth._position.epoch == epochs == len(told.events)
    accuracies, losses = zip(*told.events)
    given = losses if "loss" in (monitor or "") else accuracies
    assert (accuracies if given is losses else losses) == (None,) * epochs
    if validation:
        assert list(given) == (metrics.told if monitor else [None] * epochs)
    else:
        assert all((value is not None) == (monitor is not None) for value in given)


def test_a_metric_that_nobody_logs_is_named_with_those_that_are_there():
    with pytest.raises(WiringError, match=r"no metric 'acc' .*'val_acc', 'val_loss'"):
        fit(Lit(), grower(monitor="acc"))


def test_numbers_are_logged_for_every_seed_and_early_stopping_sees_them():
    class Seen(Callback):
        def on_train_end(self, trainer, pl_module):
            self.metrics = dict(trainer.callback_metrics)

    seen, growth = Seen(), grower(thresholds=None)
    stop = EarlyStopping("growth/net.slot/samples", mode="max", stopping_threshold=17.0, check_on_train_epoch_end=True)
    fit(Lit(), seen, growth, stop, epochs=9)
    found = {name: float(value) for name, value in seen.metrics.items() if name.startswith("growth/")}
    evidence = growth.growth.evidence()["net.slot"]
    assert found["growth/net.slot/samples"] == 18.0 == evidence.samples
    assert found["growth/net.slot/ratio"] == pytest.approx(evidence.ratio, rel=1e-6)
    assert found["growth/net.slot/alpha"] == 0.0
    assert {"blend_gain_t", "displacement", "seed_norm"} <= {name.rpartition("/")[2] for name in found}


def test_a_learning_rate_monitor_takes_the_new_group(tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)
    growth = grower(thresholds=None, germination={"lr": 1e-3})
    made = fit(Lit(), LearningRateMonitor("step"), growth, logger=logger, log_every_n_steps=1)
    assert [group["initial_lr"] for group in made.optimizers[0].param_groups] == [1e-2, 1e-3]


def test_a_probe_sees_the_twin_and_not_the_module_that_trains():
    x, y = data(32, 1).tensors

    def losses(module):
        return nn.functional.cross_entropy(module.net(x), y, reduction="none")

    growth = grower(lambda: Bad(), thresholds=None, evaluate=losses)
    fit(Lit(), growth, epochs=1)
    assert max(abs(change) for change in growth.growth.probe("net.slot").changes) > 0.01


# --- stop and resume ---


class Stopping(Watcher):
    """Saves behind a step, as every_n_train_steps does, and in it if it is told to."""

    def __init__(self, path=None, at=None):
        super().__init__()
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer, pl_module, *_):
        super().on_train_batch_end(trainer, pl_module)
        if self.at is not None and trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)
            self.at = None  # behind the step, and not in the middle of the micro-batches of the next


class Steady(Lit):
    """Lightning resumes in the middle of an epoch with the first batch of its loader; here the batch's number tells."""

    def training_step(self, batch, index):
        return self.loss(data()[8 * index : 8 * index + 8])


def whole(made, growth):
    optimizer, config = made.optimizers[0], made.lr_scheduler_configs[0]
    return {
        "growth": growth.growth.state_dict(), "model": made.lightning_module.state_dict(),
        "optimizer": optimizer.state_dict(), "scheduler": config.scheduler.state_dict(),
    }  # fmt: skip


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("at, stage", [(5, Stage.TRAINING), (22, Stage.BLENDING)])
def test_a_training_goes_on_bit_for_bit(tmp_path, at, stage, accumulated):
    settings = {"epochs": 4 * accumulated, "gradient_clip_val": 0.05, "accumulate_grad_batches": accumulated}
    path, watcher, growth = tmp_path / "at.ckpt", Stopping(tmp_path / "at.ckpt", at), grower()
    wanted = whole(fit(Steady(), growth, watcher, **settings), growth)
    again, resumed = Stopping(), grower()
    made = trainer(again, resumed, **settings)
    made.fit(Steady(), *loaders(), ckpt_path=path)
    assert again.stages[0] is stage
    assert resumed.growth.slots["net.slot"].stage is Stage.BLENDING
    assert differences(wanted, whole(made, resumed)) == []
    assert differences(watcher.hosts[-len(again.hosts) :], again.hosts) == []


@pytest.mark.parametrize("when", [{}, {"save_on_train_epoch_end": True}])
def test_a_checkpoint_at_the_end_of_an_epoch_has_that_epoch_once(tmp_path, when):
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **when)
    watcher, growth = Watcher(), grower()
    wanted = whole(fit(Lit(), growth, watcher, save, epochs=4, checkpoints=True), growth)
    again, resumed = Watcher(), grower()
    made = trainer(again, resumed, epochs=4)
    made.fit(Lit(), *loaders(), ckpt_path=tmp_path / "step=18.ckpt")
    assert differences(wanted, whole(made, resumed)) == []


def test_an_epoch_whose_validation_lightning_skips_has_not_ended(tmp_path):
    # Saved behind the last batch of an epoch and before its validation: Lightning goes on with the next epoch.
    growth = grower()
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=9)
    fit(Lit(), growth, save, epochs=2, checkpoints=True)
    resumed, told = grower(), []
    resumed._arguments["sinks"] = [lambda event: told.append(event["event"]) if event["seed"] is None else None]
    trainer(resumed, epochs=3).fit(Lit(), *loaders(), ckpt_path=tmp_path / "step=18.ckpt")
    assert told == ["epoch"]
    assert resumed.growth._position.epoch == 2
    assert resumed.growth.step == 27


def test_weights_that_somebody_lost_are_noticed(tmp_path):
    watcher = Stopping(tmp_path / "at.ckpt", 5)
    fit(Lit(), grower(), watcher)
    saved = torch.load(tmp_path / "at.ckpt", weights_only=True)
    saved["state_dict"]["net.slot.seed.inner.weight"].add_(1)
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(WiringError, match=r"not those that were saved, such as \['net.slot.seed.inner.weight'\]"):
        trainer(grower()).fit(Lit(), *loaders(), ckpt_path=tmp_path / "other.ckpt")


def test_a_trainer_without_the_callback_refuses_such_a_checkpoint(tmp_path):
    fit(Lit(), grower(), Stopping(tmp_path / "at.ckpt", 5))
    with pytest.raises(RuntimeError, match=r"slot .net.slot. is empty and the state has a seed for it"):
        trainer().fit(Lit(), *loaders(), ckpt_path=tmp_path / "at.ckpt")


def test_growth_begins_behind_a_checkpoint_of_the_host_alone(tmp_path):
    fit(Lit(), Stopping(tmp_path / "host.ckpt", 5))
    watcher, growth = Watcher(), grower(thresholds=None)
    made = trainer(watcher, growth)
    made.fit(Lit(), *loaders(), ckpt_path=tmp_path / "host.ckpt")
    alone = Watcher()
    trainer(alone).fit(Lit(), *loaders(), ckpt_path=tmp_path / "host.ckpt")
    assert len(alone.hosts) == 13
    assert differences(alone.hosts, watcher.hosts) == []
    watcher.truth.check(growth.growth.evidence()["net.slot"], 13)


# --- the best model ---


def outputs(model):
    model.eval()
    with torch.no_grad():
        return model.net(data(32, 1).tensors[0])


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("best", [0, 3], ids=["in TRAINING", "in BLENDING"])
def test_the_best_model_comes_back_in_the_stage_of_its_seed(tmp_path, best, weights_only):
    class Scored(Lit):
        def validation_step(self, batch, index):
            super().validation_step(batch, index)
            self.log("score", -abs(float(self.current_epoch) - best))

    class AtBest(Watcher):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == best:
                self.outputs = outputs(pl_module)
                pl_module.train()

    save = ModelCheckpoint(tmp_path, monitor="score", mode="max", save_weights_only=weights_only)
    model, watcher, growth = Scored(), AtBest(), grower()
    made = fit(model, growth, watcher, save, epochs=5, checkpoints=True)
    slot = model.net.slot
    assert slot.stage is Stage.BLENDING
    assert not torch.equal(outputs(model), watcher.outputs)
    made.test(model, loaders()[1], ckpt_path="best", verbose=False)
    assert slot.stage is (Stage.BLENDING if best else Stage.TRAINING)
    assert torch.equal(outputs(model), watcher.outputs)

    fresh = Scored()
    saved = torch.load(save.best_model_path, weights_only=True)
    restore_slots(fresh, saved, {"net.slot": Adapter})
    fresh.load_state_dict(saved["state_dict"])
    assert torch.equal(outputs(fresh), watcher.outputs)

    hook = {"restore_slots": restore_slots, "Adapter": Adapter}
    exec(documented("Lightning")[1], hook)

    class Loading(Scored):
        on_load_checkpoint = hook["on_load_checkpoint"]

    assert torch.equal(outputs(Loading.load_from_checkpoint(save.best_model_path)), watcher.outputs)
    epoch = best + 1
    fit(model, growth, epochs=1)  # and on from there
    assert growth.growth._position.epoch == epoch + 1
    if not weights_only:
        again = trainer(growth, epochs=6)
        again.fit(Loading(), *loaders(), ckpt_path=save.best_model_path)
        assert growth.growth._position.epoch == 6
    with pytest.raises(RuntimeError, match="is empty and the state has a seed for it"):
        Scored.load_from_checkpoint(save.best_model_path)


def test_a_checkpoint_of_the_host_alone_has_no_seeds_to_restore(tmp_path):
    fit(Lit(), Stopping(tmp_path / "host.ckpt", 5))
    with pytest.raises(WiringError, match="saved by a Trainer without a GrowthCallback"):
        restore_slots(Lit(), torch.load(tmp_path / "host.ckpt", weights_only=True), {"net.slot": Adapter})


# --- the same model once more ---


def test_another_fit_goes_on_with_the_seeds_that_are_there():
    model, growth = Lit(), grower()
    fit(model, growth, epochs=1)
    seed, first = model.net.slot.seed, growth.growth
    fit(model, growth, epochs=3)
    assert growth.growth is not first
    assert model.net.slot.seed is seed
    assert (growth.growth._position.epoch, model.net.slot.stage) == (4, Stage.BLENDING)
    assert growth.growth.evidence()["net.slot"].in_optimizer


def test_another_callback_does_not_know_the_seeds():
    model = Lit()
    fit(model, grower())
    with pytest.raises(WiringError, match=r"slots \['net.slot'\] hold seeds of whose life"):
        fit(model, grower())


# --- refused ---


@pytest.mark.parametrize("averaging", [WeightAveraging, lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1)])
def test_averages_of_a_copy_without_the_seeds_are_refused(averaging):
    with pytest.raises(WiringError, match="average in a fit of its own, without GrowthCallback"):
        fit(Lit(), grower(), averaging())
    model, growth = Lit(), grower()
    fit(model, growth, epochs=4)
    growth.growth.prune("net.slot")
    fit(model, averaging())


def test_a_fossil_is_averaged_in_a_fit_of_its_own():
    model, growth = Lit(), grower()
    fit(model, growth, epochs=3)
    for stage in (Stage.HOLDING, Stage.FOSSILIZED):
        growth.growth._mover.move(growth.growth._lives["net.slot"], stage, "test", "test")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, WeightAveraging(), epochs=1)
    assert model.net.slot.stage is Stage.FOSSILIZED
    assert not torch.equal(before["net.slot.seed.inner.weight"], model.net.slot.seed.inner.weight)


def test_strategies_that_load_weights_too_late_are_refused():
    growth, made = grower(), trainer()
    made.callbacks.append(growth)
    type(made.strategy).restore_checkpoint_after_setup = property(lambda self: True)
    try:
        with pytest.raises(WiringError, match="SingleDeviceStrategy loads weights after the optimizers were made"):
            made.fit(Lit(), *loaders())
    finally:
        del type(made.strategy).restore_checkpoint_after_setup
