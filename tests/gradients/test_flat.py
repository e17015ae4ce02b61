"""Gradients in one buffer: they stay there whatever the loop does, and training stays the same bit for bit."""

import copy
import gc
import itertools
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from seedtriton import ConfigurationError, GradientMonitor, WiringError
from seedtriton.gradients.flat import FlatGradients, flat_buffer_of


class Net(nn.Module):
    """Odd sizes, a tied weight, a channels_last weight, and a layer that is not always used."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.first = nn.Linear(5, 7)
        self.tied = nn.Linear(5, 7, bias=False)
        self.tied.weight = self.first.weight
        self.side = nn.Linear(7, 7)
        self.last = nn.Linear(7, 3)

    def forward(self, x, side=True):
        x = self.conv(x).mean((2, 3))
        x = torch.tanh(self.first(x)) + self.tied(x)
        return self.last(x + self.side(x) if side else x)


def backward(model, seed=0, side=True):
    """One backward pass; the data depends on ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 5, 5, generator=generator)
    y = torch.randint(3, (4,), generator=generator)
    nn.functional.cross_entropy(model(x, side), y).backward()


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def twins():
    model = Net()
    return model, copy.deepcopy(model)


def inside(gradient, buffer):
    start, address = buffer.data_ptr(), gradient.data_ptr()
    end = address + gradient.numel() * gradient.element_size()
    return start <= address and end <= start + buffer.numel() * buffer.element_size()


def assert_flat(model, flat):
    for name, parameter in model.named_parameters():
        assert inside(parameter.grad, flat.buffer), name


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        if expected[name] is None:
            assert found[name] is None, name
        else:
            assert torch.equal(found[name], expected[name]), name


def replace(module):
    module.load_state_dict({name: value.clone() for name, value in module.state_dict().items()}, assign=True)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# Where the gradients lie


def test_every_gradient_is_an_aligned_view_with_the_layout_of_its_parameter():
    model = Net()
    flat = FlatGradients(model)
    backward(model)
    assert flat.buffer.ndim == 1
    assert_flat(model, flat)
    places = []
    for parameter in model.parameters():
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.stride() == parameter.stride()
        assert parameter.grad.data_ptr() % 16 == 0
        places.append((parameter.grad.data_ptr(), parameter.numel() * 4))
    places.sort()
    assert all(address + size <= after for (address, size), (after, _) in itertools.pairwise(places))
    assert not model.conv.weight.grad.is_contiguous()


def test_a_tied_parameter_has_one_place_and_padding_is_zero():
    model, plain = twins()
    flat = FlatGradients(model)
    backward(model)
    backward(plain)
    sizes = [p.numel() for p in model.parameters()]
    assert flat.buffer.numel() == sum(-(-size // 4) * 4 for size in sizes)
    assert flat.buffer.count_nonzero() == sum(p.grad.count_nonzero() for p in plain.parameters())
    torch.testing.assert_close(
        flat.buffer.double().square().sum(), sum(p.grad.double().square().sum() for p in plain.parameters())
    )


def test_an_expanded_parameter_has_a_contiguous_gradient():
    parameter = nn.Parameter(torch.randn(1, 3).expand(4, 3))
    flat = FlatGradients(parameter)
    (parameter * torch.arange(12.0).view(4, 3)).sum().backward()
    assert parameter.grad.stride() == (3, 1)
    assert torch.equal(flat.buffer, torch.arange(12.0))


def test_strides_of_dimensions_of_one_element_do_not_matter():
    parameter = nn.Parameter(torch.zeros(8).as_strided((1, 3, 2), (7, 1, 3)))
    FlatGradients(parameter)
    assert parameter.grad.stride() == (7, 1, 3)


def test_a_parameter_that_is_given_twice_has_one_place():
    parameter = nn.Parameter(torch.zeros(4))
    assert FlatGradients([parameter, nn.ParameterList([parameter]), parameter]).buffer.numel() == 4


def test_each_dtype_has_a_buffer_and_the_single_one_is_refused():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, dtype=torch.bfloat16), nn.Linear(2, 1, dtype=torch.float64))
    flat = FlatGradients(model)
    cpu = torch.device("cpu")
    assert set(flat.buffers) == {(cpu, torch.float32), (cpu, torch.bfloat16), (cpu, torch.float64)}
    for layer in model:
        layer(torch.ones(layer.in_features, dtype=layer.weight.dtype)).sum().backward()
        buffer = flat.buffers[cpu, layer.weight.dtype]
        assert buffer.dtype == layer.weight.dtype
        for parameter in layer.parameters():
            assert inside(parameter.grad, buffer)
            assert parameter.grad.data_ptr() % 16 == 0
    assert flat.restore() == 0
    with pytest.raises(WiringError, match=r"3 buffers.*torch.float32 on cpu.*`buffers`"):
        _ = flat.buffer


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")
def test_a_parameter_whose_gradient_has_another_dtype_lies_with_that_dtype():
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    parameter.grad_dtype = torch.float32
    flat = FlatGradients(parameter)
    (parameter.float() * 1.001).sum().backward()
    assert flat.buffer.dtype == torch.float32
    assert torch.equal(flat.buffer[:3], parameter.grad)
    assert flat.restore() == 0
    parameter.grad_dtype = None
    parameter.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(WiringError, match=r"parameter 0 is torch.float64, its place is for torch.float32"):
        flat.restore()


def test_existing_gradients_move_in_and_frozen_and_empty_parameters_stay_out():
    model = Net()
    model.side.requires_grad_(False)
    model.empty = nn.Parameter(torch.empty(0, 4))
    backward(model)
    before = gradients(model)
    flat = FlatGradients(model)
    assert_equal(gradients(model), before)
    assert model.side.weight.grad is None
    assert model.empty.grad is None
    assert inside(model.first.weight.grad, flat.buffer)
    assert flat.restore() == 0


@pytest.mark.parametrize("wrap", [iter, list, lambda ps: [nn.ParameterList(ps)]], ids=["generator", "list", "modules"])
def test_parameters_may_come_in_any_iterable(wrap):
    model = Net()
    flat = FlatGradients(wrap(model.parameters()))
    flat.refresh()
    backward(model)
    flat.restore()
    assert_flat(model, flat)


# Refusals


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_sparse_embedding_is_refused_by_name(kind):
    model = nn.ModuleDict({"words": kind(5, 3, sparse=True), "out": nn.Linear(3, 2)})
    with pytest.raises(ConfigurationError, match=r"words\.weight.*sparse=False, or leave it out"):
        FlatGradients(model)
    model["words"].requires_grad_(False)
    FlatGradients(model)


def test_a_sparse_gradient_of_a_bare_parameter_is_refused_by_name_and_nothing_moves():
    words, out = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)
    parameters = [*out.parameters(), words.weight]
    flat = FlatGradients(parameters)
    for parameter in parameters:
        parameter.grad = None
    out(words(torch.tensor([1, 3]))).sum().backward()
    elsewhere = out.weight.grad
    with pytest.raises(WiringError, match=r"parameter 2 has layout torch.sparse_coo.*sparse=False"):
        flat.restore()
    assert out.weight.grad is elsewhere
    with pytest.raises(WiringError, match="parameter 2 has layout"):
        FlatGradients(parameters)


class Wrapped(torch.Tensor):
    pass


def test_parameters_without_a_plain_floating_gradient_are_refused_by_name():
    holder = nn.Module()
    for value, reason in (
        (nn.Parameter(torch.zeros(2, dtype=torch.complex64)), "torch.complex64, which is not floating point"),
        (nn.Parameter(torch.zeros(2).as_subclass(Wrapped)), "Wrapped, not a plain tensor"),
        (nn.Parameter(torch.eye(2).to_sparse()), "layout is torch.sparse_coo"),
        (nn.UninitializedParameter(), "one forward pass first"),
    ):
        holder.odd = value
        with pytest.raises(ConfigurationError, match=rf"parameter 'odd'.*{reason}"):
            FlatGradients(holder)
    with pytest.raises(ConfigurationError, match=r"parameter 0.*computed from other tensors"):
        FlatGradients([torch.ones(2, requires_grad=True) * 2])
    with pytest.raises(ConfigurationError, match="got str"):
        FlatGradients(["weight"])


def test_nothing_that_requires_a_gradient_is_an_error():
    model = Net().requires_grad_(False)
    with pytest.raises(WiringError, match="no parameter requires a gradient"):
        FlatGradients(model)


@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("method", ["restore", "zero_"])
@pytest.mark.parametrize(
    "convert, change",
    [
        (lambda m: m.double(), "dtype torch.float32 -> torch.float64"),
        (lambda m: m.to(memory_format=torch.contiguous_format), "strides"),
    ],
    ids=["dtype", "layout"],
)
def test_a_converted_model_is_refused_until_refresh(convert, change, method, cleared):
    model = Net()
    flat = FlatGradients(model)
    backward(model)
    if cleared:
        model.zero_grad(set_to_none=True)
    convert(model)
    before = [p.grad for p in model.parameters()]
    with pytest.raises(WiringError, match=rf"parameter 'conv.weight' was converted.*{change}.*refresh\(\)"):
        getattr(flat, method)()
    assert all(p.grad is old for p, old in zip(model.parameters(), before))
    flat.refresh()
    flat.restore(missing="zero")
    for parameter in model.parameters():
        assert parameter.grad.dtype == flat.buffer.dtype == parameter.dtype
        assert parameter.grad.device == flat.buffer.device == parameter.device
        assert parameter.grad.stride() == parameter.stride()


def test_a_parameter_with_other_data_is_refused_until_refresh():
    weight = nn.Parameter(torch.ones(3))
    flat = FlatGradients(weight)
    weight.data = weight.data.double()
    for method in (flat.restore, flat.zero_):
        with pytest.raises(WiringError, match=r"parameter 0 was converted.*float32 -> torch.float64.*refresh\(\)"):
            method()


def test_parameters_replaced_by_a_conversion_are_refused_until_refresh():
    model = Net()
    flat = FlatGradients(model)
    model.to("meta")
    for method in (flat.restore, flat.zero_):
        with pytest.raises(WiringError, match=r"parameter 'conv.weight' was replaced.*refresh\(\)"):
            method()
    flat.refresh()
    flat.zero_()
    assert all(p.grad.device == flat.buffer.device == p.device for p in model.parameters())


def test_a_parameter_replaced_by_a_load_is_refused_until_refresh():
    model = Net()
    flat = FlatGradients(model)
    buffer = flat.buffer
    model.load_state_dict(model.state_dict())
    assert flat.restore() == 0
    assert flat.buffer is buffer
    replace(model.last)
    for _ in range(2):
        for method in (flat.restore, flat.zero_):
            with pytest.raises(WiringError, match=r"parameter 'last.weight' was replaced.*refresh\(\)"):
                method()
    flat.refresh()
    flat.zero_()
    assert_flat(model, flat)


def test_a_gradient_that_went_through_a_conversion_and_back_returns_to_its_place():
    model = Net()
    flat = FlatGradients(model)
    backward(model)
    before = gradients(model)
    model.double().float()
    assert not inside(model.first.weight.grad, flat.buffer)
    assert flat.restore() == len(before)
    assert_flat(model, flat)
    assert_equal(gradients(model), before)


def test_missing_takes_two_words():
    with pytest.raises(ConfigurationError, match="'leave' or 'zero', got 'keep'"):
        FlatGradients(Net()).restore(missing="keep")


# restore()


def test_set_to_none_is_survived_with_the_bits_of_backward():
    model, plain = twins()
    flat = FlatGradients(model)
    for step in range(3):
        for net in (model, plain):
            net.zero_grad(set_to_none=True)
            backward(net, step)
        assert not inside(model.first.weight.grad, flat.buffer)
        assert flat.restore() == len(list(model.parameters()))
        assert_flat(model, flat)
        assert_equal(gradients(model), gradients(plain))
        assert flat.buffer.count_nonzero() == sum(p.grad.count_nonzero() for p in plain.parameters())


def test_gradients_in_their_places_are_not_touched():
    model = Net()
    flat = FlatGradients(model)
    backward(model)
    views = [p.grad for p in model.parameters()]
    version = flat.buffer._version
    with Operations() as operations:
        assert flat.restore() == 0
        assert flat.restore(missing="zero") == 0
    assert operations.names == []
    assert all(p.grad is view for p, view in zip(model.parameters(), views))
    assert flat.buffer._version == version


def test_no_gradient_stays_no_gradient_and_leaves_no_stale_numbers():
    model, plain = twins()
    flat = FlatGradients(model)
    backward(model)
    used = {name for name, _ in model.named_parameters() if not name.startswith("side")}
    for net in (model, plain):
        net.zero_grad(set_to_none=True)
        backward(net, 1, side=False)
    assert flat.restore() == len(used)
    assert_equal(gradients(model), gradients(plain))
    assert model.side.weight.grad is None
    assert flat.buffer.count_nonzero() == sum(plain.get_parameter(n).grad.count_nonzero() for n in used)
    with Operations() as operations:
        assert flat.restore() == 0
    assert operations.names == []
    model.zero_grad(set_to_none=True)
    backward(model, 2)
    flat.restore()
    assert_flat(model, flat)
    assert model.side.weight.grad.count_nonzero()


def test_no_gradient_becomes_zero_when_asked_but_not_for_a_frozen_parameter():
    model = Net()
    flat = FlatGradients(model)
    backward(model)
    model.zero_grad(set_to_none=True)
    model.last.requires_grad_(False)
    everything = len(list(model.parameters()))
    assert flat.restore(missing="zero") == everything - 2
    assert inside(model.side.weight.grad, flat.buffer)
    assert model.last.weight.grad is None
    assert not flat.buffer.any()


def test_gradients_assigned_by_hand_are_copied_even_when_they_are_swapped_or_shared():
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(4)]
    flat = FlatGradients(parameters)
    for index, parameter in enumerate(parameters):
        parameter.grad.fill_(index + 1)
    a, b, c, d = parameters
    a.grad, b.grad = b.grad, a.grad
    c.grad = d.grad
    d.grad = torch.full((3,), 9.0)
    assert flat.restore() == 4
    assert [p.grad.tolist() for p in parameters] == [[2.0] * 3, [1.0] * 3, [4.0] * 3, [9.0] * 3]
    assert len({p.grad.data_ptr() for p in parameters}) == 4


def test_a_gradient_with_history_is_copied_without_it():
    weight = nn.Parameter(torch.tensor([2.0, 3.0]))
    flat = FlatGradients(weight)
    with pytest.warns(UserWarning, match="create_graph"):
        weight.pow(3).sum().backward(create_graph=True)
    assert flat.restore() == 1
    assert weight.grad.tolist() == [12.0, 27.0]
    assert not weight.grad.requires_grad
    assert not flat.buffer.requires_grad


# zero_()


def test_zeroing_is_one_operation_per_buffer():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2, dtype=torch.bfloat16))
    flat = FlatGradients(model)
    flat.buffers[torch.device("cpu"), torch.float32].fill_(1.0)
    with Operations() as operations:
        flat.zero_()
    assert operations.names == ["zero_", "zero_"]
    assert not any(p.grad.any() for p in model.parameters())


def test_zeroing_attaches_every_view_again():
    model = Net()
    flat = FlatGradients(model)
    model.zero_grad(set_to_none=True)
    backward(model, side=False)
    flat.zero_()
    assert_flat(model, flat)
    assert not flat.buffer.any()
    backward(model)
    assert_flat(model, flat)
    assert flat.buffer.any()


def test_zeroing_takes_the_gradient_of_a_frozen_parameter_away():
    model = Net()
    flat = FlatGradients(model)
    backward(model)
    model.last.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = model.last.weight.clone()
    flat.zero_()
    backward(model)
    assert model.last.weight.grad is None
    optimizer.step()
    assert torch.equal(model.last.weight, before)
    model.last.requires_grad_(True)
    flat.zero_()
    assert_flat(model, flat)


# refresh()


def test_refresh_follows_the_parameters_and_keeps_the_gradients():
    model = Net()
    model.side.requires_grad_(False)
    flat = FlatGradients(model)
    backward(model)
    model.side.requires_grad_(True)
    model.last.requires_grad_(False)
    model.first.bias.grad = None
    before = gradients(model)
    old = weakref.ref(flat.buffer.untyped_storage())
    flat.refresh()
    assert_equal(gradients(model), before)
    gc.collect()
    assert old() is None
    assert inside(model.first.weight.grad, flat.buffer)
    assert not inside(model.last.weight.grad, flat.buffer)
    flat.restore(missing="zero")
    assert inside(model.side.weight.grad, flat.buffer)


def test_refreshing_leaves_one_hook_per_module_however_often():
    model = Net()
    flat = FlatGradients(model)
    for _ in range(3):
        flat.refresh()
    assert [len(module._load_state_dict_post_hooks) for module in model.modules()] == [1] * len(list(model.modules()))


def test_a_refused_refresh_changes_nothing():
    model = Net()
    flat = FlatGradients(model)
    backward(model)
    buffer, views = flat.buffer, [p.grad for p in model.parameters()]
    model.words = nn.Embedding(3, 2, sparse=True)
    with pytest.raises(ConfigurationError, match=r"words\.weight"):
        flat.refresh()
    assert flat.buffer is buffer
    assert all(p.grad is view for p, view in zip(model.parameters(), views))
    assert flat.restore() == 0


def test_buffers_laid_out_in_inference_mode_can_be_trained_with():
    model = Net()
    with torch.inference_mode():
        flat = FlatGradients(model)
        flat.refresh()
    backward(model)
    assert flat.restore() == 0
    assert_flat(model, flat)


# Copies


def test_a_copied_model_has_nothing_to_do_with_the_buffer():
    model = Net()
    flat = FlatGradients(model)
    backward(model)
    other = copy.deepcopy(model)
    before = flat.buffer.clone()
    backward(other, 1)
    assert all(not inside(p.grad, flat.buffer) for p in other.parameters())
    assert torch.equal(flat.buffer, before)
    pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copied_together_with_its_model_it_serves_the_copied_model(copied):
    model = Net()
    flat = FlatGradients(model)
    other, other_flat = copied((model, flat))
    backward(other)
    other_flat.restore()
    assert_flat(other, other_flat)
    assert not flat.buffer.any()
    replace(other.last)
    with pytest.raises(WiringError, match="was replaced"):
        other_flat.restore()
    assert flat.restore() == 0


def test_the_model_keeps_no_reference_to_the_buffers_owner():
    model = Net()
    flat = weakref.ref(FlatGradients(model))
    gc.collect()
    assert flat() is None
    model.load_state_dict(model.state_dict())


# Training

OPTIMIZERS = {
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
}
LOOPS = ("zero_", "restore", "zero_grad(False)")


def train(original, make, loop, clip, accumulate, autocast):
    """Weights and optimizer state after a few steps; ``side`` is used in every other step."""
    model = copy.deepcopy(original)
    optimizer = make(model.parameters())
    flat = FlatGradients(model) if loop in LOOPS else None
    if loop in ("restore", "set_to_none"):
        optimizer.zero_grad(set_to_none=True)
    if loop == "set_to_zero":
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    for step in range(5):
        for micro in range(accumulate):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                backward(model, 10 * step + micro, side=step % 2 == 0)
            if loop == "restore":
                flat.restore()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if flat is not None:
            assert all(p.grad is None or inside(p.grad, flat.buffer) for p in model.parameters())
        optimizer.step()
        if loop == "zero_":
            flat.zero_()
        else:
            optimizer.zero_grad(set_to_none=loop in ("restore", "set_to_none"))
    state = [v for s in optimizer.state_dict()["state"].values() for v in s.values() if v is not None]
    return [*model.parameters(), *state]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("clip, accumulate, autocast", [(False, 1, False), (True, 1, True), (True, 3, False)])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_is_the_same_bit_for_bit(make, loop, clip, accumulate, autocast):
    original = Net()
    plain = "set_to_none" if loop == "restore" else "set_to_zero"
    expected = train(original, make, plain, clip, accumulate, autocast)
    found = train(original, make, loop, clip, accumulate, autocast)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.dtype == b.dtype
        assert a.detach().numpy().tobytes() == b.detach().numpy().tobytes()


# flat_buffer_of()


def test_views_of_one_storage_are_covered_by_the_smallest_range():
    storage = torch.arange(100.0)
    tensors = [
        storage[42:47],
        storage[60:84].view(2, 3, 4).permute(2, 0, 1),
        storage.as_strided((2, 3), (5, 2), 21),
        torch.empty(0),
    ]
    found = flat_buffer_of(tensors)
    assert found.tolist() == list(range(21, 84))
    assert found.data_ptr() == storage.data_ptr() + 21 * 4
    assert found.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()
    assert tensors[0].storage_offset() - found.storage_offset() == 21
    assert flat_buffer_of(iter(tensors[:1])).tolist() == list(range(42, 47))
    assert flat_buffer_of([storage[7]]).tolist() == [7.0]
    assert flat_buffer_of([storage[:3], storage.as_strided((2, 3), (5, 2), 80)]).tolist() == list(range(90))


def test_what_does_not_lie_in_one_buffer_is_none():
    a = torch.zeros(8)
    half = a.view(torch.bfloat16)
    assert flat_buffer_of([]) is None
    assert flat_buffer_of([torch.empty(0)]) is None
    assert flat_buffer_of([a[:4], torch.zeros(4)]) is None
    assert flat_buffer_of([a[:4], half[8:]]) is None
    assert flat_buffer_of([a.to_sparse()]) is None
    assert flat_buffer_of([a[:4], a.to_sparse()]) is None
    assert flat_buffer_of([torch.zeros(2, dtype=torch.complex64).conj().imag]) is None
    assert flat_buffer_of([torch.zeros(2, dtype=torch.complex64).conj()]) is None
    assert flat_buffer_of([a.as_subclass(Wrapped)]) is None
    meta = torch.empty(4, device="meta")
    assert flat_buffer_of([meta, torch.empty(4, device="meta")]) is None
    assert flat_buffer_of([half[:4], half[10:]]).numel() == 16


def test_neither_copies_nor_keeps_history():
    leaf = torch.zeros(8, requires_grad=True)
    tensors = [leaf[:4], leaf[4:]]
    with Operations() as operations:
        found = flat_buffer_of(tensors)
    assert not found.requires_grad
    assert found.data_ptr() == leaf.data_ptr()
    assert set(operations.names) <= {"detach", "as_strided"}


def test_own_flat_gradients_are_recognised():
    model = Net()
    flat = FlatGradients(model)
    backward(model)
    found = flat_buffer_of(p.grad for p in model.parameters())
    assert found.data_ptr() == flat.buffer.data_ptr()
    assert flat.buffer.numel() - found.numel() < 4


@pytest.mark.usefixtures("gloo")
def test_the_bucket_of_ddp_is_recognised():
    model, plain = twins()
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    for step in range(3):  # DDP lays its buckets out anew after the first
        for net in (model, plain):
            net.zero_grad(set_to_none=step == 1)
        backward(ddp, step)
        backward(plain, step)
        found = flat_buffer_of([p.grad for p in model.parameters()])
        assert found.numel() == sum(p.numel() for p in plain.parameters())
        for parameter, expected in zip(model.parameters(), plain.parameters()):
            offset = (parameter.grad.data_ptr() - found.data_ptr()) // 4
            there = found.as_strided(parameter.shape, parameter.grad.stride(), found.storage_offset() + offset)
            assert torch.equal(there, expected.grad)


@pytest.mark.usefixtures("gloo")
def test_flat_gradients_beside_ddp_hold_what_ddp_computed():
    model, plain = twins()
    flat = FlatGradients(model)
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=False)
    for step in range(3):
        flat.zero_()
        plain.zero_grad()
        backward(ddp, step)
        backward(plain, step)
        flat.restore()
        assert_flat(model, flat)
        assert_equal(gradients(model), gradients(plain))


@pytest.mark.usefixtures("gloo")
def test_a_monitor_beside_ddp_measures_what_it_would_measure_without():
    model, plain = twins()
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    last = [{"last": net.last} for net in (model, plain)]
    monitor = GradientMonitor(model, last[0], flat="auto")
    expected = GradientMonitor(plain, last[1])
    for step in range(5):
        for net in (model, plain):
            net.zero_grad(set_to_none=step % 2 == 1)
        for net in (ddp, plain):
            backward(net, step)
        monitor.measure()
        expected.measure()
    torch.testing.assert_close(monitor.ring, expected.ring, rtol=1e-6, atol=0, equal_nan=True)
    assert monitor.read()["last"].samples == 5


@pytest.mark.parametrize("flat", [True, "yes", torch.zeros(3), nn.Linear(2, 2)])
def test_a_monitor_refuses_what_is_no_flat_buffer(flat):
    model = Net()
    with pytest.raises(ConfigurationError, match=r'flat must be a FlatGradients, "auto" or None'):
        GradientMonitor(model, {"last": model.last}, flat=flat)


# What is unfrozen, added or replaced later


def add(model):
    model.extra = nn.Linear(3, 2)
    return model.extra.weight


def thaw(model):
    model.side.requires_grad_(True)
    return model.side.weight


@pytest.mark.parametrize("change", [add, thaw])
@pytest.mark.parametrize("method", ["zero_", "restore"])
def test_what_was_unfrozen_or_added_is_found_and_zeroed(change, method):
    """Left out, its gradient would pile up: 3 backward passes of ones make 3."""
    model = Net()
    model.side.requires_grad_(False)
    flat = FlatGradients(model)
    backward(model)
    flat.zero_()
    late = change(model)
    for _ in range(3):
        if method == "zero_":
            flat.zero_()
        else:
            model.zero_grad()
        late.sum().backward()
        flat.restore()
    assert torch.equal(late.grad, torch.ones_like(late))
    assert inside(late.grad, flat.buffer)
    assert flat.places() == {id(p) for p in model.parameters() if p.requires_grad}


def test_what_was_added_and_cannot_have_a_place_is_zeroed_all_the_same(caplog):
    model = Net()
    flat = FlatGradients(model)
    model.words = nn.Embedding(3, 2, sparse=True)
    for _ in range(3):
        flat.zero_()
        model.words(torch.tensor([0])).sum().backward()
        flat.restore()
    assert model.words.weight.grad.coalesce().values().tolist() == [[1.0, 1.0]]
    assert caplog.text.count("words.weight' was added and cannot have a flat gradient") == 1


def test_a_parameter_replaced_by_hand_is_refused_until_refresh():
    model = Net()
    flat = FlatGradients(model)
    model.side.weight = nn.Parameter(model.side.weight.detach().clone())
    with pytest.raises(WiringError, match=r"parameter 'side.weight' was replaced.*refresh\(\)"):
        flat.zero_()
    flat.refresh()
    flat.zero_()


def test_a_monitor_follows_its_flat_gradients_to_what_was_added():
    model, seed = Net(), nn.Linear(2, 2)
    flat = FlatGradients([model, seed])
    monitor = GradientMonitor(model, {"a": seed}, flat=flat)
    backward(model)
    monitor.measure()
    late = add(model)
    flat.zero_()
    backward(model)
    late.sum().backward()
    monitor.measure()
    truth = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None))
    assert monitor.read()["a"].host_norm == pytest.approx(truth, rel=1e-6)
    assert inside(late.grad, flat.buffer)
