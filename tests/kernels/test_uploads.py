"""The ring of pinned buffers behind an address table, with a device that only remembers what was asked."""

import pytest
import torch

pytest.importorskip("triton")

from seedtriton.kernels import _launch, _tables


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


def test_a_staging_buffer_is_used_again_only_after_its_event():
    device = Device()
    table = _tables._AddressTable(3, torch.device("cpu"), device, pin=False)
    for turn in range(3 * _tables.STAGES):
        table.write([turn, 2**40 + turn, -turn])
        assert table.values.tolist() == [turn, 2**40 + turn, -turn]
    assert len(device.events) == _tables.STAGES >= 3
    # Nobody waits in the first round; later each buffer waits for its own copy, once per use.
    assert [(e.recorded, e.waited) for e in device.events] == [(3, 2)] * _tables.STAGES
    assert len({buffer.data_ptr() for buffer, _, _ in table._staged}) == _tables.STAGES


def test_an_empty_table_has_memory_and_writes_nothing():
    table = _tables._AddressTable(0, torch.device("cpu"), Device(), pin=False)
    table.write([])
    assert table.values.tolist() == [0]


def test_tensors_on_the_cpu_are_refused_without_the_interpreter():
    assert _launch.INTERPRETED or "no compiler" in _launch.unsupported(torch.zeros(3))
