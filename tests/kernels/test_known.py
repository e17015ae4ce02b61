"""Lists of tensors that are recognised by one call: what may change between two calls is seen, and nothing is held."""

import gc
import weakref

import pytest
import torch

from seedtriton.kernels import _known
from seedtriton.kernels._known import Key, KnownLists

WHAT, KEY, SEGMENTS = ("record", 7), Key("sizes"), (0, 1, 1)


def gradients():
    return [torch.randn(4), torch.randn(3, 2, dtype=torch.bfloat16), torch.empty(0)]


@pytest.fixture
def known():
    lists = KnownLists()
    lists.keep(WHAT, gradients(), SEGMENTS, KEY)
    return lists


def test_this_torch_can_look_at_a_whole_list():
    assert _known._check_of(gradients()) is not None


def test_other_tensors_of_the_same_kinds_are_recognised_by_their_key(known):
    assert known.find(WHAT, gradients(), SEGMENTS) is KEY
    assert known.find(WHAT, gradients(), list(SEGMENTS)) is KEY
    with torch.no_grad():
        assert known.find(WHAT, gradients(), SEGMENTS) is KEY


class Special(torch.Tensor):
    pass


OTHERS = {
    "shape": torch.randn(5),
    "as many elements": torch.randn(2, 2),
    "dtype": torch.randn(4).half(),
    "holes": torch.randn(8)[::2],
    "subclass": torch.randn(4).as_subclass(Special),
    "negated": torch.randn(4, dtype=torch.complex64).conj().imag.as_strided((4,), (1,)),
    "sparse": torch.ones(4).to_sparse(),
    "meta": torch.empty(4, device="meta"),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_whatever_else_is_looked_at_anew(other, known):
    assert known.find(WHAT, [other, *gradients()[1:]], SEGMENTS) is None


def test_another_order_length_purpose_or_segment_too(known):
    given = gradients()
    assert known.find(WHAT, [given[1], given[0], given[2]], SEGMENTS) is None
    assert known.find(WHAT, given[:2], SEGMENTS) is None
    assert known.find(("scale",), given, SEGMENTS) is None
    assert known.find(WHAT, given, (0, 1, 0)) is None


def test_of_each_purpose_the_newest_list_is_kept_and_no_tensor_is(known):
    newest, other = [torch.randn(9)], Key("others")
    references = [weakref.ref(tensor) for tensor in newest]
    known.keep(WHAT, newest, (0,), other)
    assert known.find(WHAT, newest, (0,)) is other
    assert known.find(WHAT, gradients(), SEGMENTS) is None
    del newest
    gc.collect()
    assert not any(reference() is not None for reference in references)
    for number in range(_known.KEPT + 5):
        known.keep(number, gradients(), SEGMENTS, KEY)
    assert len(known._lists) == _known.KEPT
    known.clear()
    assert known.find(number, gradients(), SEGMENTS) is None


def test_without_that_name_in_torch_nothing_is_recognised(monkeypatch):
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    lists = KnownLists()
    lists.keep(WHAT, gradients(), SEGMENTS, KEY)
    assert lists.find(WHAT, gradients(), SEGMENTS) is None


def test_a_key_is_equal_to_one_of_equal_parts_and_to_nothing_else():
    assert Key(1, (2,)) == Key(1, (2,))
    assert hash(Key(1, (2,))) == hash(Key(1, (2,)))
    assert Key(1, (2,)) != Key(1, (3,))
    assert Key(1) != (1,)
