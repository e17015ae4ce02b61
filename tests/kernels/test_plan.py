"""The plan, in plain integers: every element in exactly one item, whatever the sizes."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seedtriton.kernels import _plan

SMALL = st.integers(0, 40_000)
LARGE = st.integers(2**31 - 2, 2**33 + 5)
TENSORS = st.lists(
    st.tuples(st.one_of(SMALL, SMALL, SMALL, st.just(0)), st.integers(0, 2), st.integers(0, 4)), max_size=30
)


def plan_of(tensors, num_segments=5, chunk=None):
    numels, dtypes, segments = zip(*tensors) if tensors else ((), (), ())
    return _plan.make_plan(numels, dtypes, segments, num_segments, chunk)


def items_of(plan):
    """(segment, tensor, first element, length, dtype) of each item."""
    tensors = [plan.tensors[slot] if plan.tensors else None for slot in plan.slots]
    starts = [piece * plan.chunk // _plan.WIDTHS[dtype] for piece, dtype in zip(plan.pieces, plan.dtypes)]
    return list(zip(plan.segments, tensors, starts, plan.lengths, plan.dtypes))


@given(TENSORS)
def test_every_element_is_in_exactly_one_item_and_no_item_crosses_a_tensor(tensors):
    covered = {}
    for segment, tensor, first, length, dtype in items_of(plan_of(tensors)):
        if length:
            assert (dtype, segment) == tensors[tensor][1:]
            # Items of a tensor come in order and touch; together they are its elements, once each.
            assert first == covered.get(tensor, 0)
            covered[tensor] = first + length
    assert covered == {index: numel for index, (numel, _, _) in enumerate(tensors) if numel}


@given(TENSORS)
def test_order_is_segment_then_tensor_then_offset(tensors):
    keys = [item[:3] for item in items_of(plan_of(tensors)) if item[3]]
    assert keys == sorted(keys)


@given(TENSORS)
def test_starts_and_counts_describe_the_segments(tensors):
    plan = plan_of(tensors)
    assert plan.parts == tuple(plan.slots.count(slot) for slot in plan.slots)
    assert len(plan.segment_starts) == len(plan.slot_starts) == 6
    assert (plan.segment_starts[-1], plan.slot_starts[-1]) == (plan.items, len(plan.tensors))
    for segment in range(5):
        members = [numel for numel, _, s in tensors if s == segment]
        mine = range(plan.segment_starts[segment], plan.segment_starts[segment + 1])
        slots = range(plan.slot_starts[segment], plan.slot_starts[segment + 1])
        assert all(plan.segments[item] == segment for item in mine)
        assert sorted({plan.slots[item] for item in mine if plan.tensors}) == list(slots)
        # Empty tensors are counted, and are no slots.
        assert plan.tensor_counts[segment] == len(members)
        assert plan.element_counts[segment] == sum(members)
        assert len(slots) == sum(numel > 0 for numel in members)
    busy = {segment for numel, _, segment in tensors if numel}
    assert plan.busy_segments == max(len(busy), 1)


@given(TENSORS)
def test_items_are_aligned_as_their_tensor_is(tensors):
    for _, _, first, length, dtype in items_of(plan_of(tensors)):
        assert first * _plan.WIDTHS[dtype] % 16 == 0
        assert 0 <= length * _plan.WIDTHS[dtype] <= _plan.MAX_CHUNK


def test_widths_are_those_of_the_dtype_codes():
    import torch

    codes = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
    assert [_plan.WIDTHS[code] for code in codes.values()] == [dtype.itemsize for dtype in codes]
    _launch = pytest.importorskip("seedtriton.kernels._launch", reason="needs Triton")
    assert codes == _launch.DTYPES


@settings(max_examples=10, deadline=None)
@given(LARGE, st.integers(0, 2))
def test_more_than_2_31_elements_plan(numel, dtype):
    plan = plan_of([(3, 0, 0), (numel, dtype, 1)])
    assert sum(plan.lengths) == numel + 3
    assert plan.pieces[-1] * plan.chunk // _plan.WIDTHS[dtype] + plan.lengths[-1] == numel
    assert plan.element_counts[1] == numel
    # What the kernel holds in 32 bits stays far below 2^31; offsets are computed in 64.
    assert max(plan.lengths) <= 2**17
    assert max(plan.pieces[-1], plan.items) <= 2**18 + 1


@given(st.integers(0, 2**45))
def test_chunk_is_a_power_of_two_in_its_bounds_and_grows_with_the_total(total):
    chunk = _plan.chunk_bytes(total)
    assert chunk & (chunk - 1) == 0
    assert _plan.MIN_CHUNK <= chunk <= _plan.MAX_CHUNK
    assert chunk in (_plan.MIN_CHUNK, _plan.MAX_CHUNK) or chunk // 2 < total / _plan.TARGET_ITEMS <= chunk


def test_chunks_of_known_models():
    # ResNet-50, GPT-2 124M and Llama-3-8B / 8, in bf16 and in fp32.
    models = (25_600_000, 124_400_000, 1_000_000_000)
    chunks = [[_plan.chunk_bytes(n * width) // 1024 for n in models] for width in (2, 4)]
    assert chunks == [[64, 256, 256], [128, 256, 256]]
    edge = _plan.MIN_CHUNK * _plan.TARGET_ITEMS
    assert [_plan.chunk_bytes(n) for n in (0, 1, edge, edge + 1)] == [32768, 32768, 32768, 65536]


def test_the_same_bytes_of_a_host_give_the_same_chunk_however_they_are_divided():
    whole = plan_of([(100_000_000, 0, 0)])
    parts = plan_of([(50_000_000, 0, 0), (0, 0, 2), (100_000_000, 2, 0), (50_000_000, 2, 4)])
    no_host = plan_of([(50_000_000, 0, 1), (0, 0, 0), (100_000_000, 2, 4)])
    assert whole.chunk == parts.chunk == no_host.chunk == 262144


def test_only_seeds_of_thousands_of_millions_make_the_pieces_of_a_small_host_larger():
    assert plan_of([(3, 0, 0), ((1 << 31) - 3, 0, 1)]).chunk == 32768
    assert plan_of([(3, 0, 0), ((1 << 31) - 2, 0, 1)]).chunk == 65536


def test_seeds_of_whatever_size_leave_the_hosts_items_as_they_are():
    host = [(100_000_000, 0, 0), (77_777, 1, 0)]
    alone = plan_of(host)
    for seeds in ([(10, 0, 1)], [(900_000_000, 0, 2)], [(900_000_000, 1, 1), (5, 0, 3)]):
        plan = plan_of(host + seeds)
        items = alone.segment_starts[1]
        assert plan.chunk == alone.chunk
        assert plan.segment_starts[1] == items
        for column in ("lengths", "dtypes", "slots", "pieces", "parts"):
            assert getattr(plan, column)[:items] == getattr(alone, column)[:items]


def test_nothing_to_sum_is_still_one_item_in_segment_0():
    for tensors in ([], [(0, 0, 3), (0, 1, 1)]):
        plan = plan_of(tensors)
        assert (plan.lengths, plan.segments, plan.tensors) == ((0,), (0,), ())
        assert (plan.busy_segments, plan.segment_starts) == (1, (0, 1, 1, 1, 1, 1))


def test_a_plan_cannot_be_changed():
    plan = plan_of([(10, 0, 0)])
    with pytest.raises(AttributeError):
        plan.chunk = 1
    assert isinstance(plan.lengths, tuple)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (([1], [0, 0], [0], 1), "1 sizes, 2 dtypes and 1 segments"),
        (([1, 1], [0, 0], [0, 2], 2), "tensor 1 is in segment 2, outside 0..1"),
        (([1], [0], [-1], 2), "tensor 0 is in segment -1"),
        (([], [], [], 0), "num_segments is 0"),
    ],
)
def test_columns_that_disagree_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        _plan.make_plan(*arguments)


def test_more_tensors_than_the_kernel_counts_are_refused(monkeypatch):
    assert 3 * _plan.MOST_TENSORS.bit_length() == 63  # three counts in one int64 that is never negative
    monkeypatch.setattr(_plan, "MOST_TENSORS", 3)
    assert _plan.make_plan([1] * 4, [0] * 4, [0, 1, 1, 1], 2).tensor_counts == (1, 3)
    with pytest.raises(ValueError, match="segment 1 has 4 tensors, and the kernel counts 3 at most: measure with"):
        _plan.make_plan([1] * 5, [0] * 5, [0, 1, 1, 1, 1], 2)


def test_the_plan_imports_neither_torch_nor_triton():
    # Loaded by path: importing the package around it loads torch.
    code = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('_plan', {_plan.__file__!r}); "
        "module = importlib.util.module_from_spec(spec); sys.modules['_plan'] = module; "
        "spec.loader.exec_module(module); "
        "sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
