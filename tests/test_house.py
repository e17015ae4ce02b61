"""The rooms of the house: who may import whom, how large a room may be, and what each wing shows to users."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import house
import pytest

import seedtriton

FILES = house.files()


# --- arrows ---


@pytest.mark.parametrize("module", FILES, ids=lambda module: module or "seedtriton")
def test_a_file_imports_only_what_its_wing_may(module):
    path = FILES[module]
    assert house.violations(module, path.read_text("utf-8"), is_init=path.name == "__init__.py") == []


@pytest.mark.parametrize("path", house.kernels(), ids=lambda path: path.stem)
def test_kernels_import_torch_triton_and_kernels(path):
    assert house.kernel_violations(path.read_text("utf-8")) == []


def test_there_are_files_to_check():
    wings = {house.wing_of(module) for module in FILES} - {""}
    assert wings >= {"core", "gradients", "growth", "report"}
    assert wings <= house.WINGS.keys()
    folders = {path.name for path in (house.ROOT / "seedtriton").iterdir() if path.is_dir()}
    folders -= {"__pycache__", "kernels"}
    assert folders <= house.WINGS.keys(), "a folder that is no wing has no rule"
    assert len(FILES) > 30
    assert len(house.kernels()) == 8


def test_no_file_imports_itself_in_a_circle():
    assert house.circle(house.graph()) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("core.errors", "import torch"),
        ("core.evidence", "def f():\n    import torch"),
        ("core.evidence", "def f():\n    import numpy"),
        ("core.gates", "from ..gradients import monitor"),
        ("core.gates", "from .. import GradientMonitor"),
        ("core.gates", "import seedtriton.growth.slot"),
        ("gradients.reference", "def f():\n    import triton"),
        ("gradients.ops", "from seedtriton.kernels import gradient_sums"),
        ("gradients.ops", "from ..kernels import gradient_sums"),
        ("gradients.ops", "def f():\n    import kernels.gradient_sums"),
        ("gradients.ops", "if True:\n    from ..growth import slot"),
        ("gradients.ops", "from ..parallel import layout"),
        ("gradients.ops", "from ..report.sinks import LogSink"),
        ("gradients.monitor", "def f():\n    from ..kernels import gradient_sums"),
        ("gradients.monitor", "import numpy"),
        ("growth.controller", "from ..demo import run"),
        ("growth.controller", "from ..integrations import transformers"),
        ("growth.controller", "import tensorboard"),
        ("growth.controller", "def f():\n    import tensorboard"),
        ("report.sinks", "from ..growth import GrowthController"),
        ("report.sinks", "import tensorboard"),
        ("report.plots", "import matplotlib"),
        ("demo", "from sklearn.datasets import load_digits"),
        ("cli", "import seedtriton.kernels.gradient_sums"),
        ("cli", "def f():\n    import kernels._plan"),
    ],
)
def test_the_import_rule_can_fail(module, source):
    assert len(house.violations(module, source)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("gradients.ops", "def f():\n    from seedtriton.kernels import gradient_sums"),
        ("gradients.ops", "def f():\n    from ..kernels import gradient_sums"),
        ("gradients.ops", "from . import reference\nfrom ..core.errors import WiringError\nimport torch"),
        ("growth.controller", "from ..core import verdict\nfrom ..report import events\nfrom .slot import SeedSlot"),
        ("integrations.transformers", "def f():\n    import transformers\nimport torch\nfrom ..growth import slot"),
        ("report.plots", "def f():\n    import matplotlib"),
        ("demo", "def f():\n    import sklearn.datasets\nfrom .growth.slot import SeedSlot"),
        ("core.evidence", "import math, collections.abc"),
    ],
)
def test_the_import_rule_allows_what_the_table_does(module, source):
    assert house.violations(module, source) == []


def test_the_search_for_circles_can_fail():
    assert house.circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert house.circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    "source",
    [
        "from . import _plan",
        "import kernels._plan",
        "from kernels import _plan",
        "import seedtriton",
        "from seedtriton.core import errors",
        "from seedtriton.core.errors import ConfigurationError",
        "import numpy",
        "from seedtriton.gradients.row import Rules",
        "if TYPE_CHECKING:\n    from seedtriton.gradients.ops import scale_",
    ],
)
def test_the_kernel_import_check_can_fail(source):
    assert len(house.kernel_violations(source)) == 1


BARE = re.compile(r"^\s*(?:import|from)\s+kernels\b", re.MULTILINE)


def test_nobody_imports_the_kernels_by_the_name_of_the_folder():
    # It works in a checkout, and finds Hugging Face's package, or nothing, once installed.
    folders = ("seedtriton", "kernels", "tests", "bench", "examples")
    paths = [path for folder in folders for path in house.ROOT.glob(f"{folder}/**/*.py")]
    assert len(paths) > 60
    assert [str(path) for path in paths if BARE.search(path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    "line",
    ["import kernels", "import kernels._plan as p", "    from kernels import _plan", "from kernels._plan import x"],
)
def test_that_search_can_fail(line):
    assert BARE.search(f"x = 1\n{line}\n")
    assert not BARE.search("from seedtriton.kernels import _plan\nfrom .kernels import x\nimport kernels_of_torch\n")


# --- rooms ---

LINES, FUNCTION, CLASS = 500, 60, 350


def too_large(name, source):
    found = [f"{name}: {source.count(chr(10))} lines"] if source.count("\n") > LINES else []
    for node in ast.walk(ast.parse(source)):
        limit = {ast.FunctionDef: FUNCTION, ast.AsyncFunctionDef: FUNCTION, ast.ClassDef: CLASS}.get(type(node))
        if limit and node.end_lineno - node.lineno + 1 > limit:
            found.append(f"{name}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    return found


def test_no_room_is_a_whole_house():
    paths = [*FILES.values(), *house.kernels()]
    assert [words for path in paths for words in too_large(path.name, path.read_text("utf-8"))] == []


def test_that_measure_can_fail():
    body = "    x = 1\n"
    assert too_large("a", "def f():\n" + body * FUNCTION) == ["a: f has 61 lines"]
    assert too_large("a", "class C:\n" + body * CLASS) == ["a: C has 351 lines"]
    assert too_large("a", "\n" * (LINES + 1)) == ["a: 501 lines"]
    assert too_large("a", "def f():\n" + body * (FUNCTION - 1)) == []


# --- doors ---


@pytest.mark.parametrize("wing", [wing for wing in house.WINGS if wing in FILES])
def test_a_wings_door_hands_names_on_and_nothing_else(wing):
    docstring, *body = ast.parse(FILES[wing].read_text("utf-8")).body
    assert isinstance(docstring, ast.Expr)
    for node in body:
        assert isinstance(node, ast.ImportFrom), ast.dump(node)
        assert all(alias.name == alias.asname for alias in node.names), "handed on as ``X as X``"


def test_the_picture_in_contributing_is_the_house():
    text = (house.ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert house.picture() in text
    assert house.with_picture(text) == text, "python tests/house.py --write"
    assert house.with_picture(text.replace("core[", "cellar[")) == text
    assert text.count("\n") <= 60


PUBLIC = {
    "seedtriton": """
        AlphaSchedule BatchMeans BlendProbe Check ConfigurationError FlatGradients Gate GateThresholds GradientMonitor
        GrowthController Lifecycle PairProbe ProgressThreshold QualityGates Ranks SeedEvidence SeedSlot SeedStatus
        SeedtritonError Stage StateDictError StraightThrough TRANSITIONS TransitionError TrustRegion Verdict WiringError
        insert_slot load_grown merge_fossils ops remove_slot restore_slots step_if_grads telemetry __version__
    """,
    "seedtriton.ops": "LANES backend_of scale_ segmented_sumsq",
    "seedtriton.errors": "ConfigurationError SeedtritonError StateDictError TransitionError WiringError",
    "seedtriton.evidence": "BlendProbe Sample SeedEvidence collect_evidence NEVER_MEASURED NO_GRADIENT",
    "seedtriton.flat": "FlatGradients flat_buffer_of",
    "seedtriton.gates": "Check Gate GateThresholds QualityGates SeedStatus Verdict",
    "seedtriton.lifecycle": "FORWARD TRANSITIONS Lifecycle Stage diagram",
    "seedtriton.schedules": "AlphaSchedule ProgressThreshold AlphaController",
    "seedtriton.monitor": "GradientMonitor",
    "seedtriton.reference": "segmented_sumsq record_",
    "seedtriton.growth": "GrowthController SeedSlot insert_slot remove_slot",
    "seedtriton.slot": "SeedSlot",
    "seedtriton.isolation": "StraightThrough TrustRegion behind leaks",
    "seedtriton.blending": "BLENDS GateNetwork blend candidate",
    "seedtriton.probing": "probe twin_of",
    "seedtriton.telemetry": """
        CallableSink CsvSink Event JsonLinesSink LogSink MlflowSink Sink Telemetry TensorBoardSink WandbSink numbers
    """,
    "seedtriton.testing": "assert_invisible assert_isolated",
    "seedtriton.report": """
        CallableSink CsvSink Event History JsonLinesSink LogSink MlflowSink Sink Summary TensorBoardSink WandbSink
        numbers
    """,
    "seedtriton.report.page": "write_page",
    "seedtriton.report.plots": "lifecycle_figure",
    "seedtriton.report.runs": "read_events",
    "seedtriton.integrations.accelerate": "AcceleratedGrowth prepare_growth",
    "seedtriton.integrations.lightning": "Growing restore_slots",
    "seedtriton.integrations.peft": "AdapterMonitor load_seeds monitor_adapters save_seeds",
    "seedtriton.integrations.transformers": "GrowthCallback GrowthTrainerMixin load_seeds",
    "seedtriton.cli": "main",
}


@pytest.mark.parametrize("module, name", [(module, name) for module, names in PUBLIC.items() for name in names.split()])
def test_a_public_name_is_where_users_import_it_from(module, name):
    assert hasattr(importlib.import_module(module), name)


def test_modules_that_users_import_are_found_by_a_fresh_python():
    code = (
        "from seedtriton.ops import segmented_sumsq; from seedtriton.telemetry import JsonLinesSink\n"
        "import seedtriton.ops, seedtriton.testing, seedtriton\n"
        "assert seedtriton.ops.segmented_sumsq is segmented_sumsq is seedtriton.gradients.ops.segmented_sumsq"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=house.ROOT)
    assert done.returncode == 0, done.stderr


def test_every_name_that_the_package_shows_is_on_that_list():
    shown = {name for name in vars(seedtriton) if name[0].isupper()}
    assert shown == {name for name in PUBLIC["seedtriton"].split() if name[0].isupper()}
    for module in PUBLIC:  # also as an attribute, as after ``import seedtriton.lifecycle``
        if module.count(".") == 1 and module not in ("seedtriton.testing", "seedtriton.cli"):
            assert getattr(seedtriton, module.partition(".")[2]) is importlib.import_module(module)
    assert pathlib.Path(seedtriton.__file__).name == "__init__.py"
