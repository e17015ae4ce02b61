"""Makes ``kernel_cases`` importable, and the emulator a fixture: what several lanes share."""

import sys
from pathlib import Path

import pytest

# Appended, not inserted: the folders beside this file must not hide anybody's package.
sys.path.append(str(Path(__file__).parent))
pytest.register_assert_rewrite("kernel_cases")


@pytest.fixture
def emulator(monkeypatch):
    """The emulator behind the launchers, and pieces of 256 bytes, so that small tensors have many items."""
    # A lane with a GPU or the interpreter has no use for these.
    from emulator.emulation import Allocated, take_over

    from seedtriton.kernels import _launch, _plan

    _launch.release()
    monkeypatch.setattr(_plan, "MIN_CHUNK", 256)
    monkeypatch.setattr(_plan, "MAX_CHUNK", 256)
    with Allocated() as allocated:
        yield take_over(monkeypatch, allocated)
    _launch.release()
