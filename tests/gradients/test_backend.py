"""Which backend and why; what importing the library imports; which room may import which."""

import ast
import functools
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from seedtriton import ConfigurationError, _backend, ops

ROOT = pathlib.Path(__file__).resolve().parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def env(monkeypatch):
    """A clean environment, with forgotten choices before and after."""

    caches = _backend._choose, _backend._triton_missing

    def forget():
        for cached in caches:
            cached.cache_clear()

    forget()
    monkeypatch.delenv(_backend.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield monkeypatch
    forget()


# --- the choice ---


@pytest.mark.parametrize("value", [None, "auto"])
def test_auto_on_a_cpu_is_torch_and_says_why(env, value):
    if value:
        env.setenv(_backend.VARIABLE, value)
    backend = ops.backend_of("cpu")
    assert backend.name == "torch"
    assert backend.reason == "cpu tensors: Triton's kernels are for cuda and xpu"


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu"])
def test_auto_on_an_accelerator_is_triton(env, device):
    env.setattr(_backend, "_triton_missing", lambda: "")
    backend = ops.backend_of(device)
    assert backend.name == "triton"
    assert torch.device(device).type in backend.reason


def test_auto_without_triton_is_torch_and_says_why(env):
    env.setattr(_backend, "_triton_missing", lambda: "Triton is not installed")
    assert _backend.choose(CUDA) == ("torch", "Triton is not installed")
    assert _backend.choose(CPU).name == "torch"


def test_torch_is_torch_everywhere(env):
    env.setenv(_backend.VARIABLE, "torch")
    for device in (CPU, CUDA):
        assert _backend.choose(device) == ("torch", "SEEDTRITON_BACKEND=torch")


@pytest.mark.parametrize("value", ["Triton", "cuda", "1"])
def test_an_unknown_value_is_named_with_the_known_ones(env, value):
    env.setenv(_backend.VARIABLE, value)
    with pytest.raises(ConfigurationError, match=f"SEEDTRITON_BACKEND='{value}' is unknown.*auto, triton, torch"):
        ops.backend_of("cpu")


def test_triton_on_a_cpu_is_refused_with_the_way_out(env):
    env.setattr(_backend, "_triton_missing", lambda: "")
    env.setenv(_backend.VARIABLE, "triton")
    with pytest.raises(ConfigurationError, match=r"no compiler for cpu.*SEEDTRITON_BACKEND=auto.*TRITON_INTERPRET=1"):
        ops.backend_of("cpu")
    assert _backend.choose(CUDA).name == "triton"


@pytest.mark.parametrize("value, on", [("1", True), ("", False), ("0", False)])
def test_triton_on_a_cpu_needs_the_interpreter(env, value, on):
    env.setattr(_backend, "_triton_missing", lambda: "")
    env.setenv(_backend.VARIABLE, "triton")
    env.setenv("TRITON_INTERPRET", value)
    assert _backend.interpreting() == on
    if on:
        assert _backend.choose(CPU).name == "triton"
        assert "interpreter" in _backend.choose(CPU).reason
    else:
        with pytest.raises(ValueError, match="no compiler for cpu"):
            _backend.choose(CPU)


def test_the_interpreter_alone_does_not_take_cpu_tensors_in_auto(env):
    env.setenv("TRITON_INTERPRET", "1")
    assert _backend.choose(CPU).name == "torch"


def test_the_interpreter_does_not_serve_other_devices(env):
    env.setattr(_backend, "_triton_missing", lambda: "")
    env.setenv(_backend.VARIABLE, "triton")
    env.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="no compiler for mps"):
        _backend.choose(torch.device("mps"))


def test_triton_that_is_missing_is_refused_and_says_what_is(env):
    env.setattr(_backend, "_triton_missing", lambda: "Triton is not installed")
    env.setenv(_backend.VARIABLE, "triton")
    with pytest.raises(ConfigurationError, match="but Triton is not installed; install Triton or set"):
        ops.backend_of("cuda")


def test_a_change_of_the_variable_is_seen(env):
    env.setattr(_backend, "_triton_missing", lambda: "")
    assert _backend.choose(CUDA).name == "triton"
    env.setenv(_backend.VARIABLE, "torch")
    assert _backend.choose(CUDA).name == "torch"


@pytest.mark.parametrize(
    "absent, reason", [("triton", "not installed"), ("seedtriton.kernels.gradient_sums", "symbolic links"), ("", "")]
)
def test_what_is_missing_is_found_without_importing_it(env, absent, reason):
    env.setattr(_backend.importlib.util, "find_spec", lambda name: None if name == absent else object())
    missing = _backend._triton_missing()
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


# --- which room may import which ---

# Design section 2. A room may also import what its rooms may: arrows point down, over any distance.
TABLE = {
    "errors": "",
    "_state": "errors",
    "lifecycle": "errors _state",
    "evidence": "errors _state lifecycle",
    "schedules": "errors _state lifecycle evidence",
    "gates": "errors _state lifecycle evidence schedules",
    "_tensor_sums": "torch",
    "reference": "torch _tensor_sums",
    "_backend": "torch",
    "ops": "torch reference _backend errors",
    "blending": "torch schedules errors",
    "isolation": "torch blending schedules errors",
    "_parameters": "torch errors",
    "_training": "torch ops evidence _state errors",
    "_in_backward": "torch ops errors",
    "_loss_scale": "torch errors",
    "_step_hook": "torch _loss_scale errors",
    "flat": "torch _tensor_sums _parameters errors",
    "monitor": "torch ops flat _in_backward _parameters _training _loss_scale _step_hook evidence _state errors",
    "slot": "torch lifecycle gates evidence isolation blending errors",
    "probing": "torch evidence slot errors",
    "_groups": "torch slot errors",
    "growth": "slot monitor gates probing telemetry _groups",
    "telemetry": "gates lifecycle evidence",
}
# These show things: any room, torch, and heavy libraries inside functions.
SHOWING = ("cli", "demo", "plots", "testing", "telemetry", "__main__", "__init__")
# Only inside a function.
INSIDE = {"ops": {"kernels"}, "_backend": {"triton"}}


def allowed_rooms(room):
    found, todo = set(), TABLE[room].split()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += TABLE.get(name, "").split()
    return found


def imports(source):
    """(dotted name, inside a function) of every import; ``from . import x`` in this package is seedtriton.x."""
    found = []

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level < 2, "an import from above the package"
                base = "seedtriton" if child.level else child.module
                if child.level and child.module:
                    base += f".{child.module}"
                if base == "seedtriton":
                    found.extend((f"seedtriton.{alias.name}", inside) for alias in child.names)
                else:
                    found.append((base, inside))
            walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    walk(ast.parse(source), False)
    return found


def violations(room, source):
    """The imports of a file of seedtriton/ that the table does not allow."""
    bad = []
    for name, inside in imports(source):
        root, _, rest = name.partition(".")
        if root in sys.stdlib_module_names:
            continue
        target = rest.partition(".")[0] if root == "seedtriton" else root
        if room in SHOWING:
            fine = root in ("seedtriton", "torch") and target != "kernels"
            fine = fine or (inside and root != "kernels") or target in allowed_rooms("telemetry")
            if room in TABLE and not inside:
                fine = target in allowed_rooms(room)
        else:
            fine = target in allowed_rooms(room) or (inside and target in INSIDE.get(room, ()))
            fine = fine and (root == "seedtriton") == (target in TABLE or target == "kernels")
        if not fine:
            bad.append(f"{room} imports {name}")
    return bad


def kernel_violations(source):
    """Kernels import torch, triton and each other, by the full name."""
    relative = [node.lineno for node in ast.walk(ast.parse(source)) if getattr(node, "level", 0)]
    if relative:
        return [f"a relative import in line {line}" for line in relative]
    names = [name for name, _ in imports(source)]
    return [
        name
        for name in names
        if name.partition(".")[0] not in {"torch", "triton", *sys.stdlib_module_names}
        and not (name + ".").startswith("seedtriton.kernels.")
    ]


FILES = sorted((ROOT / "seedtriton").glob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_arrows_only_point_down(path):
    assert path.stem in TABLE or path.stem in SHOWING, f"{path.name} is not in the import table"
    assert violations(path.stem, path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_import_torch_triton_and_kernels(path):
    assert kernel_violations(path.read_text("utf-8")) == []


def test_there_are_files_to_check():
    assert len(FILES) >= len(TABLE)
    assert KERNELS


def test_the_core_does_not_know_torch():
    for room in ("errors", "_state", "lifecycle", "evidence", "schedules", "gates"):
        assert "torch" not in allowed_rooms(room)


@pytest.mark.parametrize(
    "room, source",
    [
        ("errors", "import torch"),
        ("evidence", "def f():\n    import torch"),
        ("lifecycle", "from .gates import Gate"),
        ("schedules", "from seedtriton.gates import Gate"),
        ("gates", "from . import monitor"),
        ("reference", "from .ops import scale_"),
        ("reference", "def f():\n    import triton"),
        ("_backend", "import triton"),
        ("ops", "from seedtriton.kernels import gradient_sums"),
        ("ops", "from .kernels import gradient_sums"),
        ("ops", "def f():\n    import kernels.gradient_sums"),
        ("ops", "if True:\n    from . import monitor"),
        ("isolation", "from .slot import SeedSlot"),
        ("monitor", "def f():\n    from .kernels import gradient_sums"),
        ("monitor", "from .slot import SeedSlot"),
        ("monitor", "import numpy"),
        ("slot", "from .growth import GrowthController"),
        ("growth", "from .demo import run"),
        ("telemetry", "from .growth import GrowthController"),
        ("telemetry", "import tensorboard"),
        ("plots", "import matplotlib"),
        ("demo", "from sklearn.datasets import load_digits"),
        ("cli", "import seedtriton.kernels.gradient_sums"),
        ("cli", "def f():\n    import kernels._plan"),
    ],
)
def test_the_import_check_can_fail(room, source):
    assert len(violations(room, source)) == 1


@pytest.mark.parametrize(
    "room, source",
    [
        ("ops", "def f():\n    from seedtriton.kernels import gradient_sums"),
        ("ops", "def f():\n    from .kernels import gradient_sums"),
        ("_backend", "def f():\n    import triton"),
        ("demo", "def f():\n    import sklearn.datasets"),
        ("growth", "from . import evidence, slot"),
        ("evidence", "import math, collections.abc"),
    ],
)
def test_the_import_check_allows_what_the_table_does(room, source):
    assert violations(room, source) == []


@pytest.mark.parametrize(
    "source",
    [
        "from . import _plan",
        "import kernels._plan",
        "from kernels import _plan",
        "import seedtriton",
        "from seedtriton import errors",
        "from seedtriton.errors import ConfigurationError",
        "import numpy",
    ],
)
def test_the_kernel_import_check_can_fail(source):
    assert len(kernel_violations(source)) == 1


BARE = re.compile(r"^\s*(?:import|from)\s+kernels\b", re.MULTILINE)


def test_nobody_imports_the_kernels_by_the_name_of_the_folder():
    # It works in a checkout, and finds Hugging Face's package, or nothing, once installed.
    folders = ("seedtriton", "kernels", "tests", "bench", "examples")
    paths = [path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
    assert len(paths) > 20
    assert [str(path) for path in paths if BARE.search(path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    "line",
    ["import kernels", "import kernels._plan as p", "    from kernels import _plan", "from kernels._plan import x"],
)
def test_that_search_can_fail(line):
    assert BARE.search(f"x = 1\n{line}\n")
    assert not BARE.search("from seedtriton.kernels import _plan\nfrom .kernels import x\nimport kernels_of_torch\n")
