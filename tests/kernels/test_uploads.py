"""The ring of pinned buffers behind an address table, with a device that only remembers what was asked."""

import pytest
import torch

pytest.importorskip("triton")

from seedtriton.kernels import _launch, _plan, _uploads


class Device:
    """Stands in for torch.cuda: its events remember whether anybody waited for them."""

    def __init__(self):
        self.events = []
        device = self

        class Event:
            def __init__(self):
                self.recorded = self.waited = 0
                device.events.append(self)

            def record(self):
                self.recorded += 1

            def synchronize(self):
                assert self.recorded
                self.waited += 1

        self.Event = Event


def table_of(sizes, extras, device):
    plan = _plan.make_plan(sizes, [0] * len(sizes), [0] * len(sizes), 1)
    return _uploads.AddressTable(plan, extras, torch.device("cpu"), device, pin=False)


def test_a_staging_buffer_is_used_again_only_after_its_event():
    device = Device()
    table = table_of([1, 2], 1, device)
    for turn in range(3 * _uploads.STAGES):
        table.write([turn, 2**40 + turn], [-turn])
        assert table.values.tolist() == [turn, 2**40 + turn, -turn]
    assert len(device.events) == _uploads.STAGES >= 3
    # Nobody waits in the first round; later each buffer waits for its own copy, once per use.
    assert [(e.recorded, e.waited) for e in device.events] == [(3, 2)] * _uploads.STAGES
    assert len({buffer.data_ptr() for buffer, _ in table._staged}) == _uploads.STAGES


def test_every_item_has_an_address_of_its_own():
    table = table_of([8192 * 2 + 1, 5, 0, 8192], 2, Device())
    table.write([2**40, 700, 9], [-3, -4])
    assert table.values.tolist() == [2**40, 2**40 + 32768, 2**40 + 65536, 700, 9, -3, -4]


def test_a_table_without_tensors_has_an_item_and_the_rest():
    table = table_of([0], 1, Device())
    table.write([], [5])
    assert table.values.tolist() == [0, 5]


def test_tensors_on_the_cpu_are_refused_without_the_interpreter():
    assert _launch.INTERPRETED or "no compiler" in _launch.unsupported(torch.zeros(3))
