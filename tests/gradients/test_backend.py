"""Which backend and why; what importing the library imports; which room may import which."""

import functools
import pathlib
import subprocess
import sys

import pytest
import torch

from seedtriton import ConfigurationError
from seedtriton.gradients import backend, ops

ROOT = pathlib.Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def env(monkeypatch):
    """A clean environment, with forgotten choices before and after."""

    caches = backend._choose, backend._triton_missing

    def forget():
        for cached in caches:
            cached.cache_clear()

    forget()
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield monkeypatch
    forget()


# --- the choice ---


@pytest.mark.parametrize("value", [None, "auto"])
def test_auto_on_a_cpu_is_torch_and_says_why(env, value):
    if value:
        env.setenv(backend.VARIABLE, value)
    found = ops.backend_of("cpu")
    assert found.name == "torch"
    assert found.reason == "cpu tensors: Triton's kernels are for cuda and xpu"


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu"])
def test_auto_on_an_accelerator_is_triton(env, device):
    env.setattr(backend, "_triton_missing", lambda: "")
    found = ops.backend_of(device)
    assert found.name == "triton"
    assert torch.device(device).type in found.reason


@pytest.mark.parametrize(
    "version, served", [("3.2.0", False), ("3.3.1", False), ("3.4.0", True), ("3.10.0", True), ("4.0+git", True)]
)
def test_a_triton_that_cannot_compile_the_kernels_is_left_alone(env, version, served):
    env.setattr(backend.importlib.metadata, "version", lambda package: version)
    found = backend.choose(CUDA)
    assert found.name == ("triton" if served else "torch")
    if not served:
        assert found.reason == f"Triton {version[:3]} cannot compile the kernels, 3.4 or newer can"


def test_a_triton_of_another_name_or_none_at_all_is_found(env):
    def version(package):
        if package != "pytorch-triton-rocm":
            raise backend.importlib.metadata.PackageNotFoundError(package)
        return "3.3.0+git"

    env.setattr(backend.importlib.metadata, "version", version)
    assert backend.triton_version() == (3, 3)

    def missing(package):
        raise backend.importlib.metadata.PackageNotFoundError(package)

    env.setattr(backend.importlib.metadata, "version", missing)
    assert backend.triton_version() is None


def test_auto_without_triton_is_torch_and_says_why(env):
    env.setattr(backend, "_triton_missing", lambda: "Triton is not installed")
    assert backend.choose(CUDA) == ("torch", "Triton is not installed")
    assert backend.choose(CPU).name == "torch"


def test_torch_is_torch_everywhere(env):
    env.setenv(backend.VARIABLE, "torch")
    for device in (CPU, CUDA):
        assert backend.choose(device) == ("torch", "SEEDTRITON_BACKEND=torch")


@pytest.mark.parametrize("value", ["Triton", "cuda", "1"])
def test_an_unknown_value_is_named_with_the_known_ones(env, value):
    env.setenv(backend.VARIABLE, value)
    with pytest.raises(ConfigurationError, match=f"SEEDTRITON_BACKEND='{value}' is unknown.*auto, triton, torch"):
        ops.backend_of("cpu")


def test_triton_on_a_cpu_is_refused_with_the_way_out(env):
    env.setattr(backend, "_triton_missing", lambda: "")
    env.setenv(backend.VARIABLE, "triton")
    with pytest.raises(ConfigurationError, match=r"no compiler for cpu.*SEEDTRITON_BACKEND=auto.*TRITON_INTERPRET=1"):
        ops.backend_of("cpu")
    assert backend.choose(CUDA).name == "triton"


@pytest.mark.parametrize("value, on", [("1", True), ("", False), ("0", False)])
def test_triton_on_a_cpu_needs_the_interpreter(env, value, on):
    env.setattr(backend, "_triton_missing", lambda: "")
    env.setenv(backend.VARIABLE, "triton")
    env.setenv("TRITON_INTERPRET", value)
    assert backend.interpreting() == on
    if on:
        assert backend.choose(CPU).name == "triton"
        assert "interpreter" in backend.choose(CPU).reason
    else:
        with pytest.raises(ValueError, match="no compiler for cpu"):
            backend.choose(CPU)


def test_the_interpreter_alone_does_not_take_cpu_tensors_in_auto(env):
    env.setenv("TRITON_INTERPRET", "1")
    assert backend.choose(CPU).name == "torch"


def test_the_interpreter_does_not_serve_other_devices(env):
    env.setattr(backend, "_triton_missing", lambda: "")
    env.setenv(backend.VARIABLE, "triton")
    env.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="no compiler for mps"):
        backend.choose(torch.device("mps"))


def test_triton_that_is_missing_is_refused_and_says_what_is(env):
    env.setattr(backend, "_triton_missing", lambda: "Triton is not installed")
    env.setenv(backend.VARIABLE, "triton")
    with pytest.raises(ConfigurationError, match="but Triton is not installed; install Triton or set"):
        ops.backend_of("cuda")


def test_a_change_of_the_variable_is_seen(env):
    env.setattr(backend, "_triton_missing", lambda: "")
    assert backend.choose(CUDA).name == "triton"
    env.setenv(backend.VARIABLE, "torch")
    assert backend.choose(CUDA).name == "torch"


@pytest.mark.parametrize(
    "absent, reason", [("triton", "not installed"), ("seedtriton.kernels.gradient_sums", "symbolic links"), ("", "")]
)
def test_what_is_missing_is_found_without_importing_it(env, absent, reason):
    env.setattr(backend.importlib.util, "find_spec", lambda name: None if name == absent else object())
    env.setattr(backend, "triton_version", lambda: backend.OLDEST)  # whichever is installed
    missing = backend._triton_missing()
    assert reason in missing
    assert bool(missing) == bool(absent)


# --- what importing the library imports ---

HEAVY = ("triton", "matplotlib", "sklearn", "rich", "transformers", "lightning")
USE = """
import torch
host, seed = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
monitor = seedtriton.GradientMonitor(host, {"a": seed})
seed(host(torch.ones(1, 2))).sum().backward()
monitor.measure(), monitor.read(), monitor.clip_grad_norm_(0.1)
"""


@functools.cache
def imported_by(code):
    """Which heavy libraries a fresh Python has loaded after ``code``, beyond what torch alone loads."""
    script = f"import torch, sys\nown = set(sys.modules)\n{code}\nprint(*(m for m in {HEAVY} if m in sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


def test_importing_and_using_it_on_a_cpu_loads_no_heavy_library():
    assert imported_by("import seedtriton" + USE) == []


def test_that_check_can_fail():
    code = "import seedtriton, sys, types; sys.modules['triton'] = types.ModuleType('triton')"
    assert imported_by(code) == ["triton"]
