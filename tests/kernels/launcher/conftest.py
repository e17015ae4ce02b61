"""The launcher lane: Triton's JIT and launcher for a GPU that is not there. Not in a process that interprets."""

import os
import shutil

import pytest

collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") else []


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: Triton builds its launcher with one, and so do these tests their driver")
    from launcher.fake_cuda import FakeCuda, built

    return FakeCuda(built(compiler, tmp_path_factory.mktemp("fake_cuda")))


@pytest.fixture
def cuda(driver, monkeypatch):
    """The fake driver behind kernels that take tensors on the CPU for tensors on it."""
    from seedtriton.gradients import backend
    from seedtriton.kernels import _launch

    monkeypatch.setattr(_launch, "INTERPRETED", True)  # so that tensors on the CPU are let in
    monkeypatch.setattr(backend, "interpreting", lambda: True)  # and have "triton" chosen for them
    monkeypatch.setenv("SEEDTRITON_BACKEND", "triton")
    _launch.warp_size.cache_clear()
    _launch.release()
    yield driver
    driver.fail()
    driver.expect(None)
    _launch.release()
    backend._failed.clear()
    backend._choose.cache_clear()
