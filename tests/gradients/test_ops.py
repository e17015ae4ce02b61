"""The public ops in eager torch: right for every dtype and layout, or refused by name. Truth is fp64."""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from seedtriton import ConfigurationError
from seedtriton.gradients import ops, reference
from seedtriton.gradients.checking import LANES
from seedtriton.gradients.row import QUANTITIES, SUMMARY_HEAD
from seedtriton.gradients.tensor_sums import ALONE, BLOCK, COPY, ROW, SMALL, SMALL_CONVERTED, TILE, _plan, constant

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
]

SIZES = [0, 1, 63, 127, 1023, 1024, 1025, 4097, 600_000]
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.complex32,
]


def values(size, dtype):
    if dtype.is_complex:
        return torch.randn(size, dtype=torch.complex64).to(dtype)
    return torch.randn(size).to(dtype)


def sumsq(tensor):
    """In fp64, of one tensor."""
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.to(torch.complex128).resolve_conj())
    return tensor.detach().double().square().sum().item()


def truth(tensors, segments, num_segments):
    sums = [0.0] * num_segments
    for tensor, segment in zip(tensors, segments):
        sums[segment] += sumsq(tensor)
    return torch.tensor(sums, dtype=torch.float64)


def assert_right(tensors, segments, num_segments, rtol=1e-6):
    found = ops.segmented_sumsq(tensors, segments, num_segments)
    torch.testing.assert_close(found, truth(tensors, segments, num_segments), rtol=rtol, atol=0.0)


# --- segmented_sumsq: values ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_size_agrees_with_fp64(dtype):
    tensors = [values(size, dtype) for size in SIZES]
    assert_right(tensors, range(len(SIZES)), len(SIZES))


def test_fp64_gradients_keep_fp64():
    tensors = [torch.randn(5000, dtype=torch.float64)]
    assert_right(tensors, [0], 1, rtol=1e-14)
    assert ops.segmented_sumsq([torch.full((3,), 1e25, dtype=torch.float64)], [0], 1).item() == pytest.approx(3e50)


def test_dtypes_mix_in_one_segment():
    tensors = [values(size, dtype) for dtype in DTYPES for size in (1, 1025, 0, 700)]
    assert_right(tensors, [0] * len(tensors), 1)
    # The first tensor's dtype is not everybody's: Megatron read 0.2165 here.
    halves = [torch.full((1,), 0.125, dtype=torch.bfloat16), torch.full((3,), 0.125)]
    assert ops.segmented_sumsq(halves, [0, 0], 1).item() == pytest.approx(4 * 0.125**2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [SMALL, SMALL_CONVERTED, COPY, 10 * TILE * (ROW - 1), ALONE, BLOCK, 5 * BLOCK // 2])
def test_sizes_next_to_a_threshold_agree_with_fp64(size, dtype):
    tensors = [values(size + more, dtype) for more in (-1, 0, 1, -ROW, ROW, 5, TILE * ROW - 1)]
    assert_right(tensors, range(7), 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [700, TILE * 1024, 5 * TILE * ROW + 100])
def test_equal_elements_which_all_round_the_same_way_agree_with_fp64(size, dtype):
    numbers = torch.cat([torch.rand(300) + 1.0, torch.arange(128, 256) / 128]).to(dtype)
    assert_right([number.repeat(size) for number in numbers], range(428), 428)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_view_ends_where_it_ends(dtype):
    memory = values(SMALL_CONVERTED + 50_000, dtype)
    memory[:40_000] *= 100.0
    assert_right([memory[40_000:-9], memory[:-50_000 + 77]], [0, 1], 2)


def test_magnitudes_that_fp32_lanes_are_good_for():
    for magnitude in (1e-19, 1e17):
        assert_right([torch.full((size,), magnitude) for size in (1, 700, 5 * TILE * ROW)], range(3), 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_tensors_of_more_elements_than_a_block_agree_with_fp64(dtype):
    sizes = [SMALL] * (BLOCK // SMALL) + [SMALL - 3] * 20 + [1, 0, 300] * 15
    tensors = [values(size, dtype) for size in sizes]
    assert_right(tensors, range(len(sizes)), len(sizes))


def test_small_and_large_tensors_of_all_dtypes_and_layouts_take_turns():
    tensors = []
    for turn in range(3):
        for dtype in DTYPES:
            tensors += [values(size, dtype) for size in (300 + turn, 20_000 + turn, 0, 256 * turn)]
            tensors += [values(6000, dtype).view(60, 100).t(), values(60_000, dtype).view(300, 200)[:, 1:150]]
            tensors += [values(40_000, dtype).view(2, 4, 50, 100).to(memory_format=torch.channels_last)]
        tensors += [torch.sparse_coo_tensor([[1, 1, 4]], [1.0, 2.0, 3.0], (6,)), torch.randn(1).expand(400)]
    assert_right(tensors, range(len(tensors)), len(tensors))
    assert_right(tensors[::-1], range(len(tensors)), len(tensors))


def test_a_call_leaves_nothing_behind_for_the_next():
    # Buffers are kept: the next call must not see what an earlier one, of other sizes, has left in them.
    for dtype in (torch.bfloat16, torch.float32):
        ops.segmented_sumsq([torch.full((5000,), math.nan, dtype=dtype) for _ in range(30)], [0] * 30, 1)
        assert_right([values(size, dtype) for size in (3, 700, 20_001, 5, 1000)], range(5), 5)


def test_the_default_device_is_not_asked():
    tensors = [values(size, dtype) for dtype in (torch.float32, torch.bfloat16) for size in (5, 700, 40_000)]
    found = []

    def measure():
        with torch.device("meta"):
            found.append(ops.segmented_sumsq(tensors, [0, 1, 2, 0, 1, 2], 3))
            ops.scale_(tensors, 0.5)

    right = truth(tensors, [0, 1, 2, 0, 1, 2], 3)
    thread = threading.Thread(target=measure)  # it has no buffers yet
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], right, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(truth(tensors, [0, 1, 2, 0, 1, 2], 3), right / 4, rtol=1e-6, atol=0.0)


def test_no_temporary_has_the_size_of_all_gradients():
    for dtype, size in ((torch.float32, 4000), (torch.bfloat16, 4000), (torch.bfloat16, 40_000)):
        tensors = [torch.ones(size, dtype=dtype) for _ in range(600)]
        ops.segmented_sumsq(tensors, [0] * 600, 1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            ops.segmented_sumsq(tensors, [0] * 600, 1)
        taken = max(event.self_cpu_memory_usage for event in profile.key_averages())
        assert 0 < taken <= 600 * size * dtype.itemsize / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_no_layout_changes_the_sum(dtype):
    base = values(4 * 6 * 10 * 14, dtype).view(4, 6, 10, 14)
    layouts = {
        "transposed": base[0, 0].t(),
        "channels_last": base.to(memory_format=torch.channels_last),
        "strided": base[:, ::2, 1:, ::3],
        "expanded": base[:, :1].expand(4, 5, 10, 14),
        "expanded from one": base[0, 0, 0, 0].expand(3000),
        "storage offset": base.view(-1)[1:-3],
        "offset channels_last": torch.cat([base, base]).to(memory_format=torch.channels_last)[4:],
        "offset transposed": base[2, 3].t(),
        "size one with odd stride": base.as_strided((1, 8), (777, 1), 5),
        "0-dim": base[1, 2, 3, 4],
        "empty": base[:0],
        "empty transposed": base[:, :0].transpose(0, 3),
    }
    tensors = list(layouts.values())
    assert_right(tensors, range(len(tensors)), len(tensors))


def test_conjugated_and_negated_views_count_as_they_are():
    z = torch.randn(40, 30, dtype=torch.complex64)
    assert_right([z.conj(), z.conj().imag, z.imag, z.t().conj(), z[::2]], range(5), 5)


def test_expanded_elements_count_as_often_as_they_appear():
    assert ops.segmented_sumsq([torch.tensor([3.0]).expand(5)], [0], 1).item() == pytest.approx(45.0)


def test_sparse_duplicates_are_added_before_they_are_squared():
    twice = torch.sparse_coo_tensor([[1, 1, 4]], [1.0, 2.0, 3.0], (6,))
    assert not twice.is_coalesced()
    assert ops.segmented_sumsq([twice], [0], 1).item() == pytest.approx(3.0**2 + 3.0**2)


def test_sparse_gradients_of_an_embedding_and_other_sparse_tensors():
    table = nn.Embedding(50, 16, sparse=True)
    table(torch.tensor([1, 1, 7])).square().sum().backward()
    hybrid = torch.sparse_coo_tensor([[0, 2]], torch.randn(2, 700), (3, 700))
    none = torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.int64), [], (6,))
    imaginary = torch.sparse_coo_tensor([[0, 2]], torch.randn(2, dtype=torch.complex64), (3,))
    assert_right([table.weight.grad, hybrid, none, imaginary, torch.ones(3)], range(5), 5)


def test_one_tensor_of_32_million_elements_where_foreach_norm_is_wrong():
    tensor = torch.randn(32 * 2**20)
    expected = math.fsum(chunk.double().square().sum().item() for chunk in tensor.split(2**20))
    foreach = torch._foreach_norm([tensor])[0].double().square().item()
    assert ops.segmented_sumsq([tensor], [0], 1).item() == pytest.approx(expected, rel=1e-6)
    assert foreach != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_lists_where_foreach_norm_is_wrong(dtype):
    tensors = [(torch.randn(size) * 0.02).to(dtype) for size in (768, 3 * 768, 768 * 768, 1_500_000)] * 3
    assert_right(tensors, [0] * 12, 1)
    foreach = torch.stack(torch._foreach_norm(tensors)).double().square().sum()
    assert foreach.item() != pytest.approx(truth(tensors, [0] * 12, 1).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0.1, 1.1, 0.5508392, 1.0288446, 0.5183303, 0.7268683])
@pytest.mark.parametrize("size", [952, 1023, 3000, 100_000])
def test_equal_elements_do_not_round_the_same_way_a_thousand_times(size, value, dtype):
    assert_right([torch.full((size,), value, dtype=dtype)], [0], 1)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    lists=st.lists(st.tuples(st.integers(0, 2100), st.integers(0, 6), st.sampled_from(DTYPES)), max_size=8),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_any_list_agrees_with_fp64(lists, scale):
    tensors = [(values(size, torch.float32) * scale).to(dtype) for size, _, dtype in lists]
    assert_right(tensors, [segment for _, segment, _ in lists], 7)


# --- segmented_sumsq: segments ---


@pytest.mark.parametrize(
    "segments", [[2, 0, 3, 0], [0, 0, 0, 0], [1, 2, 3, 4], [4, 3, 2, 1], [4, 4, 0, 4], [2, 2, 2, 2]]
)
def test_segments_in_any_order_with_empty_ones_anywhere(segments):
    assert_right([torch.randn(size) for size in (3, 2000, 0, 17)], segments, 5)


def test_an_empty_list_is_zeros():
    found = ops.segmented_sumsq([], [], 3)
    assert torch.equal(found, torch.zeros(3, dtype=torch.float64))


def test_only_empty_tensors_are_zeros():
    assert ops.segmented_sumsq([torch.empty(0), torch.empty(3, 0)], [1, 0], 3).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_non_finite_segment_leaves_the_others_right(bad, dtype):
    tensors = [values(3000, dtype) for _ in range(4)]
    expected = truth(tensors, [0, 1, 2, 1], 3)
    tensors[3][2500] = bad
    found = ops.segmented_sumsq(tensors, [0, 1, 2, 1], 3)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-6, atol=0.0)
    assert math.isnan(found[1]) if math.isnan(bad) else found[1] == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_lanes_neither_overflow_nor_vanish(dtype):
    large, small = torch.full((2000,), 1e20, dtype=dtype), torch.full((2000,), 1e-25, dtype=dtype)
    tensors = [large, small]
    narrow = ops.segmented_sumsq(tensors, [0, 1], 2)
    wide = ops.segmented_sumsq(tensors, [0, 1], 2, lanes=torch.float64)
    assert narrow.tolist() == [math.inf, 0.0]
    torch.testing.assert_close(wide, truth(tensors, [0, 1], 2), rtol=1e-12, atol=0.0)


def test_sums_of_sums_do_not_overflow_fp32():
    tensors = [torch.full((1,), 1e19), torch.full((1,), 1.8e19)]
    assert_right(tensors, [0, 0], 1)


def test_the_result_is_float64_on_the_tensors_device_and_has_the_same_bits_every_time():
    tensors = [values(size, dtype) for size in (5, 5000) for dtype in DTYPES]
    segments = [index % 3 for index in range(len(tensors))]
    first = ops.segmented_sumsq(tensors, segments, 4)
    assert (first.dtype, first.shape, first.device) == (torch.float64, (4,), tensors[0].device)
    assert all(torch.equal(first, ops.segmented_sumsq(tensors, segments, 4)) for _ in range(3))


def test_nothing_is_written():
    tensor = torch.randn(2000).to(torch.bfloat16)
    before = tensor.clone()
    ops.segmented_sumsq([tensor], [0], 1)
    assert tensor._version == 0
    assert torch.equal(tensor, before)


# --- segmented_sumsq: refusals ---


@pytest.mark.parametrize(
    "tensors, segments, num_segments, lanes, words",
    [
        ([torch.ones(2), torch.ones(3, dtype=torch.int32)], [0, 0], 1, torch.float32, "tensor 1 has dtype torch.int32"),
        ([torch.ones(2, dtype=torch.bool)], [0], 1, torch.float32, "tensor 0 has dtype torch.bool"),
        ([torch.ones(2)], [0, 1], 2, torch.float32, "1 tensors but 2 segments"),
        ([torch.ones(2)], [], 2, torch.float32, "1 tensors but 0 segments"),
        ([torch.ones(2), torch.ones(2).char(), torch.ones(2).bool()], [0] * 3, 1, torch.float32, "tensor 1 has dtype"),
        ([torch.ones(2), torch.ones(2)], [0, 2], 2, torch.float32, r"segment 2 of tensor 1 is outside \[0, 2\)"),
        ([torch.ones(2)], [-1], 2, torch.float32, r"segment -1 of tensor 0 is outside \[0, 2\)"),
        ([], [], 0, torch.float32, "num_segments must be at least 1, got 0"),
        ([], [], -3, torch.float32, "num_segments must be at least 1, got -3"),
        ([torch.ones(2)], [0], 1, torch.bfloat16, "lanes must be one of .* got torch.bfloat16"),
    ],
)
def test_impossible_arguments_are_named(tensors, segments, num_segments, lanes, words):
    with pytest.raises(ConfigurationError, match=words):
        ops.segmented_sumsq(tensors, segments, num_segments, lanes=lanes)


def test_other_sparse_layouts_are_refused_with_a_way_out():
    with pytest.raises(ConfigurationError, match=r"tensor 0 has layout torch.sparse_csr.*to_sparse_coo"):
        ops.segmented_sumsq([torch.eye(3).to_sparse_csr()], [0], 1)
    with pytest.raises(ConfigurationError, match=r"layout torch\.sparse_csr"):
        ops.scale_([torch.eye(3).to_sparse_csr()], 0.5)


# --- segmented_sumsq: grad modes, compile, export ---


def test_constants_first_made_in_inference_mode_serve_outside_of_it():
    for made_once in (constant, _plan, reference._grouping):
        made_once.cache_clear()
    tensors, segments = [torch.randn(30_000), torch.randn(5), torch.randn(7)], [1, 0, 1]
    with torch.inference_mode():
        inside = ops.segmented_sumsq(tensors, segments, 2)
    outside = ops.segmented_sumsq(tensors, segments, 2)
    assert torch.equal(inside, outside)
    assert not outside.is_inference()
    with torch.no_grad():
        assert torch.equal(ops.segmented_sumsq(tensors, segments, 2), outside)
    assert not constant((1, 0, 2), torch.int64, torch.device("cpu")).is_inference()


def test_fake_tensors_do_not_spoil_the_constants_of_real_ones():
    for made_once in (constant, _plan, reference._grouping):
        made_once.cache_clear()
    with FakeTensorMode():
        found = ops.segmented_sumsq([torch.ones(3000)], [0], 1)
        assert found.shape == (1,)
    assert ops.segmented_sumsq([torch.ones(3000)], [0], 1).item() == pytest.approx(3000.0)


def test_the_result_of_tensors_that_require_grad_does_not():
    tensor = torch.randn(2000, requires_grad=True)
    assert not ops.segmented_sumsq([tensor, tensor * 2], [0, 0], 1).requires_grad


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("lanes", LANES, ids=str)
def test_compiled_segmented_sumsq_has_the_bits_of_eager(backend, lanes):
    torch._dynamo.reset()
    tensors, segments = [torch.randn(3000), torch.randn(5, 7).to(torch.bfloat16), torch.randn(4).t()], [2, 0, 2]

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(tensors):
        return ops.segmented_sumsq(tensors, segments, 4, lanes=lanes)

    assert torch.equal(compiled(tensors), ops.segmented_sumsq(tensors, segments, 4, lanes=lanes))


def test_compiled_segmented_sumsq_takes_tensors_that_require_grad():
    torch._dynamo.reset()
    tensor = torch.randn(2000, requires_grad=True)
    compiled = torch.compile(lambda t: ops.segmented_sumsq([t], [0], 1), fullgraph=True, backend="aot_eager")
    found = compiled(tensor)
    assert found.item() == ops.segmented_sumsq([tensor], [0], 1).item()
    assert not found.requires_grad


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_scale_has_the_bits_of_eager(backend):
    torch._dynamo.reset()
    originals = [torch.randn(3000), torch.randn(5, 7).to(torch.bfloat16)]
    compiled = torch.compile(ops.scale_, fullgraph=True, backend=backend)
    for coefficient in (0.3, torch.tensor(0.3)):
        eager, found = ([t.clone() for t in originals] for _ in range(2))
        ops.scale_(eager, coefficient)
        compiled(found, coefficient)
        assert all(torch.equal(a, b) for a, b in zip(eager, found))
        assert not torch.equal(found[0], originals[0])


class Norms(nn.Module):
    def forward(self, x, y):
        return ops.segmented_sumsq([x, y], [1, 0], 2).sqrt()


def test_a_module_that_calls_it_exports():
    arguments = torch.randn(30), torch.randn(4, 5)
    program = torch.export.export(Norms(), arguments)
    assert torch.equal(program.module()(*arguments), Norms()(*arguments))


def opcheck(op, *arguments, **options):
    checks = torch.library.opcheck(op, arguments, options)
    assert set(checks.values()) == {"SUCCESS"}, checks


# torch 2.14 looks at .grad of its own copies, in meta_utils, and warns itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("wide", [[], [True]])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_segmented_sumsq(wide, requires_grad):
    tensors = [torch.randn(3, requires_grad=requires_grad), torch.randn(2000).to(torch.bfloat16)]
    opcheck(torch.ops.seedtriton.segmented_sumsq.default, tensors, [1, 0], 3, *wide)


def test_opcheck_scale():
    opcheck(torch.ops.seedtriton.scale_.default, [torch.randn(3), torch.randn(2, 4)], torch.tensor(0.5))


@pytest.mark.parametrize("entries", [None, [3, 1]])
def test_opcheck_record(entries):
    opcheck(
        torch.ops.seedtriton.record_.default,
        [torch.randn(3), torch.randn(2, 4)],
        [0, 1],
        [torch.randn(())],
        [1],
        torch.zeros(4, 2, QUANTITIES, dtype=torch.float64),
        torch.zeros((), dtype=torch.int64),
        torch.zeros(SUMMARY_HEAD + 3 * 2, dtype=torch.float64),
        torch.zeros(5, dtype=torch.float64),
        torch.zeros(5, dtype=torch.int32),
        torch.zeros(5, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int64),
        1.0,
        1e-8,
        entries=entries,
    )


# --- scale_ ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["number", "float32", "float64", "one element"])
def test_scale_is_mul_bit_for_bit(dtype, kind):
    coefficient = {
        "number": 0.1,
        "float32": torch.tensor(0.1),
        "float64": torch.tensor(0.1, dtype=torch.float64),
        "one element": torch.tensor([0.1]),
    }[kind]
    originals = [torch.randn(3000).to(dtype), torch.randn(8, 6).to(dtype).t(), torch.empty(0, dtype=dtype)]
    found, expected = ([t.clone() for t in originals] for _ in range(2))
    ops.scale_(found, coefficient)
    for tensor in expected:
        tensor.mul_(coefficient)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("coefficient", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["number", "tensor"])
def test_scale_rounds_the_coefficient_no_more_than_the_tensor(dtype, coefficient):
    tensor = torch.randn(50, dtype=dtype)
    expected = tensor * coefficient
    ops.scale_([tensor], coefficient)
    tolerance = {"rtol": 1e-6, "atol": 0.0} if dtype == torch.complex64 else {"rtol": 1e-15, "atol": 0.0}
    torch.testing.assert_close(tensor, expected, **tolerance)


@pytest.mark.parametrize("one", [1.0, 1, torch.tensor(1.0), torch.tensor([1.0], dtype=torch.float64)])
def test_a_coefficient_of_exactly_one_does_not_write(one):
    tensors = [torch.randn(50), torch.randn(5).to(torch.bfloat16)]
    ops.scale_(tensors, one)
    assert [tensor._version for tensor in tensors] == [0, 0]


@pytest.mark.parametrize("nearly", [1.0 - 2**-24, torch.tensor(1.0 + 2**-23)])
def test_a_coefficient_next_to_one_writes(nearly):
    tensor = torch.randn(50)
    expected = tensor * nearly
    ops.scale_([tensor], nearly)
    assert tensor._version == 1
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("bad", [math.nan, torch.tensor(math.nan)])
def test_a_nan_coefficient_makes_nan(bad):
    tensors = [torch.randn(5), torch.randn(3).to(torch.bfloat16)]
    ops.scale_(tensors, bad)
    assert all(tensor.isnan().all() for tensor in tensors)


def test_scale_takes_dtypes_mixed_and_sparse():
    sparse = torch.sparse_coo_tensor([[1, 1]], [1.0, 2.0], (3,))
    double, half = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float16)
    ops.scale_([double, sparse, half], torch.tensor(0.5))
    assert double.tolist() == half.tolist() == [0.5] * 3
    assert sparse.to_dense().tolist() == [0.0, 1.5, 0.0]


def test_scale_takes_fp8_or_says_no_by_name():
    first, tensor = torch.ones(3), torch.full((4,), 2.0).to(torch.float8_e4m3fn)
    try:
        ops.scale_([first, tensor], 0.5)
    except ConfigurationError as error:
        assert "float8_e4m3fn" in str(error)  # noqa: PT017
        assert first.tolist() == [1.0] * 3
    else:
        assert tensor.float().tolist() == [1.0] * 4


def test_an_expanded_tensor_is_refused_and_nothing_is_scaled():
    first, expanded = torch.ones(3), torch.ones(1).expand(4)
    with pytest.raises(ConfigurationError, match=r"tensor 1 \(shape \(4,\), strides \(0,\)\)"):
        ops.scale_([first, expanded], 0.5)
    assert first.tolist() == [1.0] * 3
    assert expanded.tolist() == [1.0] * 4


@pytest.mark.parametrize("coefficient", [torch.ones(2), torch.tensor(2), torch.ones(0), torch.tensor(1j)], ids=str)
def test_a_coefficient_that_is_no_number_is_named(coefficient):
    tensor = torch.ones(3)
    with pytest.raises(ConfigurationError, match=r"coefficient must be a number .* got torch"):
        ops.scale_([tensor], coefficient)
    assert tensor.tolist() == [1.0] * 3


def test_scale_refuses_integers_and_takes_an_empty_list():
    with pytest.raises(ConfigurationError, match=r"tensor 0 has dtype torch\.int64"):
        ops.scale_([torch.ones(3, dtype=torch.int64)], 0.5)
    ops.scale_([], 0.5)


def test_scale_writes_leaves_that_require_grad():
    leaf = torch.ones(3, requires_grad=True)
    ops.scale_([leaf], torch.tensor(0.5, requires_grad=True))
    assert leaf.tolist() == [0.5] * 3
    assert leaf.is_leaf
