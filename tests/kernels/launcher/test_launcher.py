"""From a call to the driver: the JIT, the second launch, the runner that is kept, capture, and what fails.

The kernels do not run here, so that no number is asserted but those that eager torch makes when a launch has failed.
"""

import logging

import pytest
import torch

from seedtriton.core.errors import WiringError
from seedtriton.gradients import backend, ops, reference
from seedtriton.gradients.row import CLIP_EPS, LAYOUT, QUANTITIES, SUMMARY_HEAD, Listed, Rules, TensorTable, Window
from seedtriton.kernels import _launch, gradient_scale, gradient_sums

SEGMENTS = [0, 1, 1]


def gradients():
    return [torch.ones(5000), torch.ones(300, dtype=torch.bfloat16), torch.ones(33, dtype=torch.float16)]


def window(num_segments=2):
    table = TensorTable(
        torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int64),
    )  # fmt: skip
    return Window(
        torch.zeros(4, num_segments, QUANTITIES, dtype=torch.float64), torch.zeros((), dtype=torch.int64),
        torch.zeros(SUMMARY_HEAD + 3 * num_segments, dtype=torch.float64), table,
    )  # fmt: skip


def tables():
    (found,) = _launch._cache._recent.values()
    return found


def sums(tensors, **options):
    return gradient_sums.segmented_sumsq(tensors, SEGMENTS, 2, **options)


def record(tensors, into, **options):
    gradient_sums.record_(
        Listed(tensors, SEGMENTS), Listed([], []), into, Rules(1.0), ops.UNSCALED, layout=LAYOUT, clip_eps=CLIP_EPS,
        **options,
    )  # fmt: skip


@pytest.fixture
def dispatched(monkeypatch):
    """How often Triton's own dispatch was asked, by kernel."""
    asked = []
    for kernel in (gradient_sums._sums_kernel, gradient_sums._finish_kernel, gradient_scale._scale_kernel):

        def run(*args, kernel=kernel, original=kernel.run, **kwargs):
            asked.append(kernel)
            return original(*args, **kwargs)

        monkeypatch.setattr(kernel, "run", run)
    return asked


def test_the_driver_is_the_fake_one(cuda):
    assert _launch.triton.runtime.driver.active.get_current_target().arch == 90
    before = cuda.launches
    sums(gradients())
    assert cuda.launches == before + 1


def test_the_arguments_arrive_as_the_kernel_declares_them(cuda):
    kernel = gradient_sums._sums_kernel
    cuda.expect(kernel)
    into = window()
    for again in (False, True):  # through the JIT, and through the runner that is kept
        record(gradients(), into)
        found = dict(zip((p.name for p in kernel.params if not p.is_constexpr), cuda.arguments(kernel)))
        assert found["addresses"] == tables().addresses
        assert found["work"] == tables().work.data_ptr()
        rows = [row.data_ptr() for row in tables().counters]
        assert found["counters"] == rows[again]
        assert found["items"] == tables().items == cuda.grid
        assert (found["num_segments"], found["summary"]) == (2, into.summary.data_ptr())
        assert (found["max_norm"], found["eps"], found["found_inf"]) == (1.0, Rules(1.0).eps, 0)
        assert cuda.block == 32 * _launch.OPTIONS["num_warps"]


def test_from_the_second_launch_on_nobody_asks_the_jit(cuda, dispatched):
    before = cuda.launches
    for _ in range(4):
        sums(gradients())
    assert cuda.launches - before == 4
    assert dispatched == [gradient_sums._sums_kernel]


def test_a_kernel_is_loaded_once_whatever_the_tensors_are(cuda):
    sums(gradients())
    loaded = cuda.modules
    for tensors in (gradients()[::-1], [torch.ones(n) for n in (3, 0, 100000)], [t[1:] for t in gradients()]):
        sums(tensors)
    assert cuda.modules == loaded


@pytest.mark.parametrize("two_launches", [False, True])
@pytest.mark.parametrize("lanes", [torch.float32, torch.float64])
def test_every_variant_launches_twice(cuda, lanes, two_launches, dispatched):
    into = window()
    calls = [
        lambda: sums(gradients(), lanes=lanes, two_launches=two_launches),
        lambda: record(gradients(), into, two_launches=two_launches),
        lambda: sums(gradients(), lanes=lanes, programs=2, two_launches=two_launches),
        lambda: gradient_scale.scale_(gradients(), torch.ones((), dtype=lanes)),
    ]
    for call in calls:
        asked, before = len(dispatched), cuda.launches
        call()
        first = cuda.launches - before
        asked = len(dispatched) - asked
        call()
        assert cuda.launches - before == 2 * first
        assert asked == first == 1 + (two_launches and call is not calls[-1])


def test_each_grid_has_a_runner_of_its_own(cuda):
    for programs in (1, 2, 1, 2):
        sums(gradients(), programs=programs)
        assert cuda.grid == programs


def test_addresses_that_move_are_uploaded_and_nothing_else_changes(cuda, dispatched):
    one, other = gradients(), gradients()
    for tensors in (one, other, one):
        sums(tensors)
        assert tables()._addresses.values[:3].tolist() == [t.data_ptr() for t in tensors]
    assert len(dispatched) == 1


def test_of_a_list_that_is_known_what_has_lost_its_memory_or_lies_crooked_is_refused(cuda):
    """Neither type nor shape nor layout tells of it."""
    sums(gradients())
    before = cuda.launches
    freed, crooked = gradients(), gradients()
    freed[1].untyped_storage().resize_(0)
    with pytest.raises(_launch.Unsupported, match=r"tensor 1 .*it has elements and no address"):
        sums(freed)
    crooked[0] = torch.frombuffer(bytearray(4 * 5000 + 4), dtype=torch.float32, offset=1, count=5000)
    with pytest.raises(_launch.Unsupported, match=r"tensor 0 .*its address is not a multiple of its element size"):
        sums(crooked)
    assert cuda.launches == before


# --- capture ---


@pytest.fixture
def stream(monkeypatch):
    """The current stream: [its handle, the number of the capture that it is in or 0]."""
    now = [0, 0]
    monkeypatch.setattr(_launch, "_stream", lambda device: tuple(now))
    return now


def test_a_capture_needs_a_measurement_before_it(cuda, stream):
    stream[1] = 7
    before = cuda.launches
    with pytest.raises(_launch.Uncapturable, match="were not measured before the capture"):
        sums(gradients())
    assert cuda.launches == before


def test_what_a_graph_was_captured_with_no_upload_ever_touches(cuda, stream):
    tensors = gradients()
    sums(tensors)
    stream[:] = [1, 7]
    sums(tensors)
    (captured,) = (each for found in _launch._cache._captured.values() for each in found)
    before = captured._addresses.values.tolist()
    stream[:] = [0, 0]
    sums(gradients())
    assert tables() is not captured
    assert captured._addresses.values.tolist() == before == [t.data_ptr() for t in tensors]


def test_two_graphs_over_the_same_tensors_share_no_memory_that_is_written(cuda, stream):
    kernel = gradient_sums._sums_kernel
    cuda.expect(kernel)
    names = [p.name for p in kernel.params if not p.is_constexpr]
    tensors, written = gradients(), []
    for capture in (7, 8):
        stream[:] = [0, 0]
        sums(tensors)
        stream[:] = [1, capture]
        for _ in range(2):
            sums(tensors)
            written.append([dict(zip(names, cuda.arguments(kernel)))[each] for each in ("work", "counters")])
    assert written[0][0] == written[1][0]
    assert len({counters for _, counters in written}) == 4
    assert written[0][0] != written[2][0] == written[3][0]
    stream[:] = [1, 9]
    with pytest.raises(_launch.Uncapturable, match="Run one measurement before each capture"):
        sums(tensors)


@pytest.mark.parametrize("error", [0, 900])
def test_the_driver_says_which_capture_it_is(cuda, error):
    cuda.capture(number=123456789012, error=error)
    assert _launch.capture_number(1) == (1 if error else 123456789012)


# --- what fails ---


def summed(tensors):
    return torch.equal(ops.segmented_sumsq(tensors, SEGMENTS, 2), reference.segmented_sumsq(tensors, SEGMENTS, 2))


def scaled(tensors):
    return ops.scale_(tensors, 0.5) or {t.unique().item() for t in tensors} == {0.5}


def recorded(tensors):
    found, wanted = window(), window()
    arguments = Listed(tensors, SEGMENTS), Listed([], [])
    ops.record_(*arguments, found, Rules(1.0))
    reference.record_(*arguments, wanted, Rules(1.0), ops.UNSCALED)
    sums = torch.equal(found.table.sumsq, wanted.table.sumsq)
    return sums and torch.equal(found.ring.nan_to_num(-1.0), wanted.ring.nan_to_num(-1.0))


CALLS = {"sums": summed, "scale": scaled, "record": recorded}
LISTS = {"all fit": gradients, "one does not": lambda: [*gradients()[:2], torch.ones(7, dtype=torch.float64)]}


@pytest.mark.parametrize("listed", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("error", [{"load": 209}, {"launch": 700}], ids=["load", "launch"])
def test_a_driver_that_fails_is_said_once_and_eager_torch_goes_on(cuda, error, call, listed, caplog):
    for kernel in (gradient_sums._sums_kernel, gradient_scale._scale_kernel):
        kernel.device_caches.clear()  # nothing is loaded yet
    cuda.fail(**error)
    with caplog.at_level(logging.ERROR):
        assert call(listed())
        assert call(listed())
    (said,) = (record.message for record in caplog.records)
    assert "could not be launched" in said
    assert "the fake driver was told to fail" in said
    assert ops.backend_of("cpu").name == "torch"
    assert "the fake driver was told to fail" in ops.backend_of("cpu").reason


def test_a_launch_that_fails_later_is_no_different(cuda, caplog):
    tensors = gradients()
    before = cuda.launches
    ops.segmented_sumsq(tensors, SEGMENTS, 2)
    assert cuda.launches == before + 1
    cuda.fail(launch=719)
    assert summed(tensors)
    assert len(caplog.records) == 1


def test_bad_input_is_no_failure_of_the_driver(cuda):
    from seedtriton.core.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match="segment"):
        ops.segmented_sumsq(gradients(), [0, 1, 2], 2)
    assert ops.backend_of("cpu").name == "triton"
    assert not backend._failed


def test_a_capture_that_cannot_be_is_no_failure_of_the_driver(cuda, stream):
    stream[1] = 7
    with pytest.raises(WiringError, match="were not measured before the capture"):
        ops.segmented_sumsq(gradients(), SEGMENTS, 2)
    assert not backend._failed
