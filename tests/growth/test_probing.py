"""The gate-time probe: the loss of a blend that never happens, and nothing else changes."""

import dataclasses
import threading

import pytest
import torch
from networks import Cnn, Mlp, Residual, Scaled

from seedtriton import AlphaSchedule, BatchMeans, ConfigurationError, GateThresholds, GrowthController, Stage
from seedtriton.growth.probing import probe, twin_of

ONLY_THE_PROBE = GateThresholds(
    min_training_improvement=None, max_isolation_violations=None, min_training_epochs=None, min_gradient_ratio=None,
    max_gradient_ratio=None, min_samples=None, max_sample_age=None, max_dropped_share=None, require_optimizer=None,
    min_displacement=None, min_live_share=None, min_blend_gain_t=None, max_accuracy_drop=None, max_harm_t=None,
)  # fmt: skip


def grown(network=Mlp, stage=Stage.TRAINING):
    torch.manual_seed(0)
    model = network()
    model.slot.germinate(model.seed())
    for target in (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING):
        if model.slot.stage < stage:
            model.slot.move(target)
    return model


def data(network=Mlp):
    torch.manual_seed(1)
    return torch.randn(9, *network.shape[1:])


def losses_on(x):
    return lambda model: model(x).flatten(1).square().mean(dim=1)


def blended_by_hand(model, alpha, x):
    """The Mlp's losses with the seed's share written out."""
    with torch.no_grad():
        h = torch.tanh(model.first(x))
        h = h + alpha * (model.slot.seed(h) - h)
        return model.last(model.after(h)).square().mean(dim=1)


@pytest.mark.parametrize("stage", [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING])
def test_the_losses_are_those_of_the_blend_in_every_stage(stage):
    model, x = grown(stage=stage), data()
    found = probe(model, "slot", losses_on(x), (0.1, 1.0))
    base = blended_by_hand(model, 0.0, x)
    assert found.loss == pytest.approx(base.mean().item(), rel=1e-6)
    for alpha, change, error in zip(found.alphas, found.changes, found.errors):
        apart = (blended_by_hand(model, alpha, x) - base).double()
        assert change == pytest.approx(apart.mean().item(), rel=1e-4)
        assert error == pytest.approx((apart.var() / len(x)).sqrt().item(), rel=1e-4)
    assert found.changes[0] != found.changes[1]


def test_a_mean_alone_has_no_noise():
    model, x = grown(), data()
    for evaluate in (lambda m: losses_on(x)(m).mean(), lambda m: losses_on(x)(m).mean().item()):
        found = probe(model, "slot", evaluate, (0.5,))
        assert found.errors is found.spread is found.degrees is None
        assert found.changes[0] == pytest.approx(probe(model, "slot", losses_on(x), (0.5,)).changes[0], rel=1e-4)


def in_batches(losses, sizes):
    return [part.mean().item() for part in losses.split(sizes)], sizes


@pytest.mark.parametrize("sizes", [[3, 3, 3], [4, 4, 1], [1] * 9], ids=str)
def test_means_of_batches_are_worth_what_their_samples_are(sizes):
    model, x = grown(), data()
    samples = probe(model, "slot", losses_on(x), (0.5, 1.0))
    found = probe(model, "slot", lambda m: in_batches(losses_on(x)(m), sizes), (0.5, 1.0))
    assert probe(model, "slot", lambda m: BatchMeans(*in_batches(losses_on(x)(m), sizes)), (0.5, 1.0)) == found
    assert (found.loss, *found.changes) == pytest.approx((samples.loss, *samples.changes), rel=1e-5)
    assert (samples.degrees, found.degrees) == (8, len(sizes) - 1)
    # By hand: a weighted mean's error, and batch means that scatter by the root of their size less than samples.
    base = torch.tensor(in_batches(blended_by_hand(model, 0.0, x), sizes)[0], dtype=torch.float64)
    blended = torch.tensor(in_batches(blended_by_hand(model, 1.0, x), sizes)[0], dtype=torch.float64)
    count, parts = torch.tensor(sizes, dtype=torch.float64), len(sizes)
    change = blended - base
    mean = (count * change).sum() / 9
    error = (parts / (parts - 1) * ((count / 9) ** 2 * (change - mean) ** 2).sum()).sqrt()
    spread = ((count * (base - (count * base).sum() / 9) ** 2).sum() / (parts - 1)).sqrt()
    assert (found.errors[1], found.spread) == pytest.approx((error.item(), spread.item()), rel=1e-4)
    if sizes == [1] * 9:
        assert (found.errors, found.spread) == (pytest.approx(samples.errors, rel=1e-4), pytest.approx(samples.spread))


@pytest.mark.parametrize(
    "counts", [[1, 2], [1, 2, 0], [1, 2, -1], 3, [1, 2, float("nan")], [1, 2, float("inf")]], ids=str
)
def test_batch_means_need_a_count_each(counts):
    with pytest.raises(ConfigurationError, match="counts"):
        probe(grown(), "slot", lambda twin: ([1.0, 2.0, 3.0], counts))


def test_other_counts_on_another_call_are_refused():
    sizes = iter([[4, 2], [2, 4], [4, 2], [4, 2]])
    with pytest.raises(ConfigurationError, match="same samples in the same order"):
        probe(grown(), "slot", lambda twin: ([1.0, 1.0], next(sizes)))


def snapshot(model):
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters()), torch.get_rng_state()]
    tensors += [model.slot.alpha, model.slot.alpha.grad]
    flags = [module.training for module in model.modules()]
    slot = model.slot
    return (
        [None if tensor is None else tensor.detach().clone() for tensor in tensors],
        [flags, slot.alpha_value, slot._mode, slot.stage, slot.lifecycle.state_dict(), slot.isolation_violations],
        [id(p) for p in model.parameters()] + [id(slot.alpha), slot.alpha._version],
    )


@pytest.mark.parametrize("network", [Mlp, Cnn])
def test_nothing_that_anybody_could_see_is_changed(network):
    model, x = grown(network), data(network)
    model(x).square().sum().backward()
    before = snapshot(model)

    def evaluate(twin):
        assert not any(module.training for module in twin.modules())
        assert not torch.is_grad_enabled()
        losses = losses_on(x)(twin)
        torch.rand(3)
        # A careless script: batch norm would now update its statistics.
        twin.train()
        twin(x)
        return losses

    probe(model, "slot", evaluate)
    after = snapshot(model)
    for old, new in zip(before[0], after[0]):
        assert (old is None and new is None) or torch.equal(old, new)
    assert before[1:] == after[1:]


def test_another_thread_sees_the_host_while_the_probe_looks_at_the_blend():
    model, x = grown(), data()
    plain = model(x)
    seen, blended = [], []

    def evaluate(twin):
        thread = threading.Thread(target=lambda: seen.append(model(x)))
        thread.start()
        thread.join()
        blended.append(twin(x))
        return blended[-1].square().mean()

    probe(model, "slot", evaluate, (1.0,))
    assert all(torch.equal(found, plain) for found in seen)
    assert torch.equal(blended[0], plain)
    assert not torch.allclose(blended[1], plain)


def test_a_compiled_model_is_not_compiled_again():
    torch._dynamo.reset()
    model, x = grown(), data()
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph)
    compiled(x).sum().backward()
    probe(model, "slot", losses_on(x))
    compiled(x).sum().backward()
    assert len(graphs) == 1


def test_only_the_parameters_are_shared():
    model = grown(Cnn)
    twin = twin_of(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert not any(a is b for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_the_noise_of_dropout_is_the_same_at_every_alpha():
    model = grown()
    drawn = []
    probe(model, "slot", lambda twin: drawn.append(torch.rand(1).item()) or 1.0, (0.5, 1.0))
    assert len(set(drawn)) == 1


@pytest.mark.parametrize("alphas", [(), (0.0,), (1.5,), (float("nan"),)])
def test_impossible_alphas_are_refused(alphas):
    with pytest.raises(ConfigurationError, match=r"\(0, 1\]"):
        probe(grown(), "slot", lambda twin: 1.0, alphas)


@pytest.mark.parametrize("losses", [None, "low", torch.ones(2, 2), torch.ones(0), [1.0]])
def test_what_is_no_loss_is_refused_by_its_kind(losses):
    with pytest.raises(ConfigurationError, match="loss of each sample as a 1-D tensor, a pair of batch means"):
        probe(grown(), "slot", lambda twin: losses)


def test_losses_of_other_samples_are_refused():
    counts = iter([3, 4, 4, 4])
    with pytest.raises(ConfigurationError, match="same samples in the same order"):
        probe(grown(), "slot", lambda twin: torch.ones(next(counts)))


def test_an_empty_slot_and_what_is_no_slot_are_refused():
    with pytest.raises(ConfigurationError, match="germinate"):
        probe(Mlp(), "slot", lambda twin: 1.0)
    with pytest.raises(ConfigurationError, match="no slot"):
        probe(grown(), "first", lambda twin: 1.0)


def test_a_model_that_cannot_be_copied_is_refused_with_the_way_out():
    model = grown()
    model.lock = threading.Lock()
    with pytest.raises(ConfigurationError, match="cannot be copied"):
        probe(model, "slot", lambda twin: 1.0)


# --- in the controller --------------------------------------------------------------------------------------


def controller(seed, x, **options):
    torch.manual_seed(0)
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options.setdefault("thresholds", ONLY_THE_PROBE)
    growth = GrowthController(model, optimizer, sinks=(), evaluate=losses_on(x), **options)
    growth.germinate("slot", seed)
    model(x).square().mean().backward()
    growth.measure()
    optimizer.step()
    return growth


def names(verdict):
    return [check.name for check in verdict.failed]


def test_g2_refuses_a_seed_that_would_harm_and_passes_one_that_helps():
    x = data()
    (verdict,) = controller(Scaled(3.0), x).end_epoch()
    assert names(verdict) == ["blend_lowers_no_loss", "blend_would_harm"]
    growth = controller(Scaled(0.5), x)
    (verdict,) = growth.end_epoch()
    assert verdict.passed
    assert growth.slots["slot"].stage is Stage.BLENDING


def test_what_evaluate_returns_decides_which_limit_the_blend_gain_has():
    """Means of batches know their noise; one mean does not, and leaves the gain its own limit."""
    limits = dataclasses.replace(ONLY_THE_PROBE, min_blend_gain_t=1e9, min_probed_gain_t=0.0)

    def verdict(form):
        growth = controller(Scaled(0.5), data(), thresholds=limits)
        for _ in range(10):
            growth.model(torch.randn(9, 5)).square().mean().backward()
            growth.measure()
            growth.optimizer.step()
            growth.optimizer.zero_grad()
        losses = growth.evaluate
        growth.evaluate = lambda twin: form(losses(twin))
        return growth.end_epoch()[0]

    assert verdict(lambda losses: losses).passed
    assert verdict(lambda losses: BatchMeans(*in_batches(losses, [2] + [1] * 7))).passed
    assert names(verdict(lambda losses: losses.mean().item())) == ["blend_gain_insignificant"]


def test_the_loss_is_not_probed_when_the_seed_is_refused_already():
    calls = []
    x = data()
    growth = controller(Scaled(0.5), x, thresholds=GateThresholds())
    growth.evaluate = lambda twin: calls.append(twin) or 1.0
    (verdict,) = growth.end_epoch()
    assert not verdict.passed
    assert not calls
    assert {check.passed for check in verdict.checks if check.question.startswith("probe")} == {None}


def test_a_gain_that_is_not_certain_is_left_to_the_probe():
    thresholds = dataclasses.replace(ONLY_THE_PROBE, min_blend_gain_t=1e9)
    growth = controller(Scaled(0.5), data(), thresholds=thresholds)
    for _ in range(10):
        growth.model(torch.randn(9, 5)).square().mean().backward()
        growth.measure()
        growth.optimizer.zero_grad()
        growth.optimizer.step()
    assert growth.evidence()["slot"].blend_gain_t > 0.0
    evaluate, growth.evaluate = growth.evaluate, None
    assert names(growth.end_epoch()[0]) == ["blend_gain_insignificant"]
    growth.evaluate = evaluate
    assert growth.end_epoch()[0].passed


def test_g5_asks_what_the_seed_contributes():
    growth = controller(Scaled(0.5), data(), schedule=AlphaSchedule(steps=0))
    slot = growth.slots["slot"]

    def epoch():
        growth.model(data()).square().mean().backward()
        growth.measure()
        return growth.end_epoch()[0]

    assert epoch().passed
    assert epoch().passed
    assert (slot.stage, slot.alpha_value) == (Stage.HOLDING, 1.0)
    with torch.no_grad():
        slot.seed.factor.fill_(1.0)
    assert names(epoch()) == ["seed_contributes_nothing"]
    with torch.no_grad():
        slot.seed.factor.fill_(0.5)
    looked = []
    evaluate, growth.evaluate = growth.evaluate, lambda twin: looked.append(twin.slot.alpha_value) or evaluate(twin)
    assert epoch().passed
    assert looked == [0.0, 1.0]
    assert slot.stage is Stage.FOSSILIZED


def test_the_script_may_probe_at_any_time_and_looks_up_to_the_target():
    x = data()
    growth = controller(Residual(7), x)
    found = growth.probe("slot")
    assert found.alphas == (0.1, 0.5, 1.0)
    assert found == probe(growth.model, "slot", losses_on(x), (0.1, 0.5, 1.0))
    assert growth.probe("slot", lambda twin: 1.0, (0.25,)).changes == (0.0,)
    growth.evaluate = None
    with pytest.raises(ConfigurationError, match="evaluate"):
        growth.probe("slot")
    with pytest.raises(ConfigurationError, match="no slot 'elsewhere'"):
        growth.probe("elsewhere", lambda twin: 1.0)
