"""The performance report: shapes, contenders that are right, rows, tables; and that it can fail."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import machine
from bench.performance import contenders, shapes, variants
from bench.performance import pictures as performance_pictures
from bench.performance import run as gpu
from bench.performance import tables as performance_report
from bench.performance.contenders import TASKS, Call, Contender, Work, WrongAnswer

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = [(task, one) for task, found in TASKS.items() for one in found if "cpu" in one.devices and not one.missing()]
CPU = torch.device("cpu")
SIZES = [(3, 5), (64,), (7,), (1025,), (0,), (2, 3, 4)]


def ids(value):
    return getattr(value, "name", None)


def work_of(dtype="fp32", segments=2, offset=0, share=0.5):
    gradients = gpu.gradients_of(SIZES, dtype, CPU, offset)
    chosen = shapes.segments_of([gradient.numel() for gradient in gradients], segments, 1.0)
    work = Work(gradients, chosen, segments)
    work.max_norm = contenders.truth_of(work)["total"] * share
    return work


def error(task, one, work):
    truth, call = contenders.truth_of(work), one.build(work)
    with contenders.poisoned(call):
        found = call.run()
    return contenders.error_of(task, call, found, truth, one.tolerance)


# -- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, tensors, millions",
    [
        ("ResNet-50", 161, 25.6), ("GPT-2", 148, 124.4), ("Llama-3-8B / 8", 291, 1003.8), ("1000 x 64", 1000, 0.064),
        ("1000 x 1K", 1000, 1.024), ("200M + 2000 x 1K", 2001, 202.0), ("one 1B", 1, 1000.0), ("odd", 289, 34.3),
    ],
)  # fmt: skip
def test_shapes_have_the_stated_tensors_and_elements(name, tensors, millions):
    found = shapes.SHAPES[name]()
    assert len(found) == tensors
    assert shapes.elements(found) / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_scale_shrinks_elements_and_keeps_tensors_and_oddness():
    for make in shapes.SHAPES.values():
        whole = make()
        assert shapes.scaled(whole, 1.0) == whole
        small = shapes.scaled(whole, 1e-2)
        assert len(small) == len(whole)
        assert shapes.elements(small) <= shapes.elements(whole)
        assert all((a == 0) == (b == 0) for (a, *_), (b, *_) in zip(whole, small))
    half = shapes.elements(shapes.scaled(shapes.gpt2(), 0.5)) / shapes.elements(shapes.gpt2())
    assert half == pytest.approx(0.5, rel=0.01)
    sizes = [rows for (rows,) in shapes.scaled(shapes.odd(), 0.3) if rows]
    assert all(size % 4 for size in sizes)


def test_unaligned_gradients_are_views_at_an_odd_place_and_so_are_their_copies():
    gradients = gpu.gradients_of([(4, 4)], "bf16", CPU, shapes.OFFSETS["unaligned"])
    for one in (*gradients, *gpu.copies(gradients, 1)):
        assert one.storage_offset() == 1
        assert one.data_ptr() % 16 != 0
        assert torch.equal(one, gradients[0])


def test_mixed_has_its_vectors_in_fp32():
    matrix, vector = gpu.gradients_of([(4, 4), (4,)], "mixed", CPU)
    assert (matrix.dtype, vector.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("number", [1, 2, 8, 64])
@pytest.mark.parametrize("host_to_seeds", [100.0, 1.0])
def test_segments_are_host_and_seeds_in_the_asked_proportion(number, host_to_seeds):
    numels = [math.prod(shape) for shape in shapes.llama8b_shard()]
    segments = shapes.segments_of(numels, number, host_to_seeds)
    sums = [sum(n for n, s in zip(numels, segments) if s == k) for k in range(number)]
    assert sum(sums) == sum(numels)
    assert all(sums)
    if number > 1:
        assert sums[0] / sum(sums[1:]) == pytest.approx(host_to_seeds, rel=0.1)


def test_fewer_tensors_than_segments_are_refused():
    with pytest.raises(ValueError, match="1 tensors cannot be 2 segments"):
        shapes.segments_of([10], 2)


# -- contenders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, offset", [("fp32", 0), ("bf16", 1), ("fp16", 0), ("mixed", 0)])
@pytest.mark.parametrize("task, one", HERE, ids=ids)
def test_every_contender_is_right(task, one, dtype, offset):
    work = work_of(dtype, 2 if task == "telemetry" else 1, offset)
    assert error(task, one, work) <= one.tolerance


@pytest.mark.parametrize("one", [one for task, one in HERE if task == "clip"], ids=ids)
def test_clipping_at_coefficient_one_leaves_every_bit(one):
    work = work_of("bf16", 1, share=2.0)
    call = one.build(work)
    call.run()
    for before, after in zip(gpu.gradients_of(SIZES, "bf16", CPU), call.clips):
        assert torch.equal(before, after)


def test_the_epilogue_of_the_native_contenders_compiles_without_a_break():
    work = work_of()
    whole = torch.compile(contenders.epilogue, backend="eager", fullgraph=True, dynamic=True)
    call = contenders._native(work, whole)
    assert contenders.error_of("telemetry", call, call.run(), contenders.truth_of(work), 1e-6) <= 1e-6


def test_the_other_native_operation_is_right_where_powsum_is_missing(monkeypatch):
    monkeypatch.delattr(torch, "_foreach_powsum", raising=False)
    work = work_of("bf16")
    native = next(one for one in TASKS["telemetry"] if one.name == "P2 native")
    assert error("telemetry", native, work) < 1e-4


def test_esper_asks_the_host_for_each_group_and_ours_never(monkeypatch):
    asked = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: asked.append(1) or item(tensor))
    calls = {one.name: one.build(work_of(segments=3)) for task, one in HERE if task == "telemetry"}
    counts = {}
    for name, call in calls.items():
        asked.clear()
        call.run()
        counts[name] = len(asked)
    assert counts["seedtriton"] == counts["P2 native"] == 0
    assert counts["P6 esper-lite dual"] == 3
    assert counts["P6 esper-lite health"] == 5


def liar(task, work, change):
    honest = next(one for one in TASKS[task] if one.ours)
    call = honest.build(work)
    return dataclasses.replace(call, answer=lambda found: change(call.answer(found)))


@pytest.mark.parametrize(
    "task, change",
    [
        ("norm", lambda found: {"total": found["total"] * 1.001}),
        ("norm", lambda found: {"total": math.nan}),
        ("norm", lambda found: {}),
        ("telemetry", lambda found: {"total": found["total"]}),
        ("telemetry", lambda found: found | {"sums": found["sums"].flip(0)}),
        ("telemetry", lambda found: found | {"sums": found["sums"][:1]}),
        ("telemetry", lambda found: found | {"coefficient": 1.0}),
        ("telemetry", lambda found: found | {"ratio": 2 * found["ratio"]}),
    ],
)
def test_a_wrong_answer_is_caught(task, change):
    work = work_of(segments=2 if task == "telemetry" else 1)
    call = liar(task, work, change)
    with pytest.raises(WrongAnswer):
        contenders.error_of(task, call, call.run(), contenders.truth_of(work), 1e-6)


def test_gradients_that_were_not_clipped_are_caught():
    work = work_of(segments=1)
    total = contenders.truth_of(work)["total"]
    call = Call(lambda: total, clips=work.gradients)
    with pytest.raises(WrongAnswer, match="clipped gradients"):
        contenders.error_of("clip", call, total, contenders.truth_of(work), 1e-6)


def test_an_output_that_is_not_written_is_caught():
    work = work_of(segments=1)
    total = contenders.truth_of(work)["total"]
    stale = torch.tensor(total)
    call = Call(lambda: None, lambda _: {"total": stale}, (stale,))
    with contenders.poisoned(call):
        found = call.run()
    with pytest.raises(WrongAnswer, match="total"):
        contenders.error_of("norm", call, found, contenders.truth_of(work), 1e-6)


def test_memory_is_poisoned_while_a_contender_is_checked_and_not_afterwards():
    with contenders.poisoned(Call(lambda: None)):
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_nemo_style_kernel_compiles_for_sm_90_and_loads_element_by_element():
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from bench.performance import nemo_style

    if not isinstance(nemo_style.partial_sums, triton.runtime.JITFunction):
        pytest.skip("this process interprets")
    for dtype, load in ((triton.language.float32, "ld.global.b32"), (triton.language.bfloat16, "ld.global.b16")):
        signature = dict.fromkeys(("addresses", "numels", "tensors", "offsets"), "*i64") | {"partials": "*fp64"}
        constants = {"DTYPE": dtype, "CHUNK": nemo_style.CHUNK, "BLOCK": nemo_style.BLOCK}
        signature |= dict.fromkeys(constants, "constexpr")
        source = triton.compiler.ASTSource(nemo_style.partial_sums, signature, constants)
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert load in code
        assert "fma.rn.f64" in code
        assert "ld.global.v" not in code


INTERPRETED = """
from bench.performance import run as gpu, shapes
from bench.performance.contenders import TASKS
bench = gpu.Bench("cpu", 1e-3, 2)
for task in TASKS:
    number, coefficient = 2 if task == "telemetry" else 1, 0.5 if task == "clip" else 1.0
    case = gpu.Case(task, "x", "mixed", number, 1.0, coefficient, sizes=[(3,), (16, 65), (9001,)])
    for row in bench.measure(case, [one for one in TASKS[task] if one.ours or one.name.startswith("P10")]):
        print(row["task"], "|", row["contender"], "|", row["rel_error"], "|", row["note"])
"""


def test_the_kernels_are_right_in_the_interpreter():
    pytest.importorskip("triton")
    said = run("-c", INTERPRETED, TRITON_INTERPRET="1", SEEDTRITON_BACKEND="triton").stdout.strip().splitlines()
    rows = [line.split(" | ") for line in said]
    assert {(task, name) for task, name, *_ in rows} >= {("norm", "P10 NeMo-style"), ("telemetry", "seedtriton flat")}
    assert all(float(error) < 1e-6 for _, _, error, _ in rows), said


def run(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# -- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Two parts, one after the other into one file; the first as a user runs it."""
    output = tmp_path_factory.mktemp("report")
    arguments = f"--device cpu --scale tiny --repeats 2 --output {output} --part".split()
    run("-m", "bench.performance", *arguments, "clip")
    assert gpu.main([*arguments, "step"]) == 0
    (path,) = output.glob("cpu-*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_rows_have_exactly_the_fields(record):
    assert all(tuple(row) == gpu.FIELDS for row in record["rows"])
    for row in record["rows"]:
        assert row["gpu_us_median"] is row["gpu_us_p10"] is row["gpu_us_p90"] is row["kernels"] is None
        assert row["wall_us_median"] > 0
        assert row["rel_error"] is not None


def test_parts_share_a_file_and_a_header(record):
    assert {row["task"] for row in record["rows"]} == {"clip 1", "clip below 1", "step"}
    assert record["anchors"].keys() == {"clip", "step"}
    assert all(value > 0 for anchors in record["anchors"].values() for value in anchors.values())
    assert {"command", "date", "torch", "commit", "machine", "device", "triton", "threads"} <= record["header"].keys()


def test_a_part_that_is_run_again_replaces_its_rows_and_another_commit_the_file(tmp_path):
    header = {"device": "x", "machine": "m", "date": "2026-01-01", "commit": "a", "torch": "t", "scale": None}
    rows = [{"task": "clip 1"}, {"task": "clip below 1"}]
    gpu.write(tmp_path, "cpu", header, "clip", {}, rows, [])
    gpu.write(tmp_path, "cpu", header, "norm", {}, [{"task": "norm"}], [])
    path = gpu.write(tmp_path, "cpu", header, "clip", {}, rows[:1], [])
    assert [row["task"] for row in json.loads(path.read_text())["rows"]] == ["norm", "clip 1"]
    gpu.write(tmp_path, "cpu", header | {"commit": "b"}, "step", {}, [], [])
    assert json.loads(path.read_text())["rows"] == []


def test_what_fails_is_a_row_that_says_so_and_has_no_time():
    def break_(work):
        raise RuntimeError("out of\nmemory")

    bench = gpu.Bench("cpu", 1e-3, 2)
    case = gpu.Case("norm", "x", "fp32", sizes=SIZES)
    chosen = [
        Contender("broken", break_),
        Contender("wrong", lambda work: Call(lambda: 1.0)),
        Contender("absent", break_, missing=lambda: "x: not installed"),
        TASKS["norm"][0],
    ]
    broken, wrong, absent, right = bench.measure(case, chosen)
    assert broken["note"] == "RuntimeError: out of memory"
    assert wrong["note"].startswith("WrongAnswer: total is off by")
    assert absent["note"] == "x: not installed"
    assert all(one["wall_us_median"] is None and tuple(one) == gpu.FIELDS for one in (broken, wrong, absent))
    assert right["wall_us_median"] > 0
    (refused,) = bench.measure(case._replace(segments=99), chosen[3:])
    assert "cannot be 99 segments" in refused["note"]


def test_a_wrong_answer_of_ours_fails_the_command(tmp_path, monkeypatch, capsys):
    bad = dataclasses.replace(TASKS["norm"][0], build=lambda work: Call(lambda: 1.0))
    monkeypatch.setattr(gpu, "cases", lambda part: [gpu.Case(part, "ResNet-50", "fp32")])
    monkeypatch.setitem(gpu.TASKS, "norm", [bad])
    arguments = f"--device cpu --scale tiny --repeats 2 --part norm --output {tmp_path}".split()
    assert gpu.main(arguments) == 1
    assert "WrongAnswer" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["--scale 2", "--scale big", "--repeats 1", "--part all --device tpu"])
def test_arguments_that_make_no_sense_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", *wrong.split()])
    assert wrong.split()[-1] in capsys.readouterr().err


def test_every_part_has_cases_and_none_asks_for_more_segments_than_tensors():
    for part in TASKS:
        found = gpu.cases(part)
        assert len(found) == len(set(found))
        assert {case.shape for case in found} <= shapes.SHAPES.keys()
        assert all(case.segments <= len(shapes.SHAPES[case.shape]()) for case in found)
    assert {case.segments for case in gpu.cases("telemetry")} == {1, 2, 8, 64}
    assert {case.dtype for case in gpu.cases("norm")} == set(gpu.DTYPES)
    assert {case.coefficient for case in gpu.cases("clip")} == {1.0, 0.5}


def test_the_slope_is_that_of_the_larger_half():
    assert gpu.slope([(n, 3.0 * max(n, 100)) for n in (1, 10, 100, 1000, 10_000)]) == pytest.approx(1.0)
    assert gpu.slope([(1, 2.0), (10, 2.0)]) == pytest.approx(0.0)


# -- a GPU that is not there -----------------------------------------------------------------------------------------


class FakeGraph:
    """Replays what was about to be captured."""

    def replay(self):
        for run in self.runs:
            run()


def fake_capture(graph):
    graph.runs = sys._getframe(1).f_locals["runs"]
    return contextlib.nullcontext()


@pytest.fixture
def fake_gpu(monkeypatch):
    """``torch.cuda`` as far as the report calls it, over tensors of the CPU: its logic, not its figures."""
    stats = iter(range(10**6))
    event = lambda **_: SimpleNamespace(record=int, synchronize=int, elapsed_time=lambda other: 0.5)  # noqa: E731
    names = {
        "CUDAGraph": FakeGraph,
        "Event": event,
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: SimpleNamespace(synchronize=int),
        "empty_cache": lambda: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1000, name="Fake"),
        "graph": fake_capture,
        "max_memory_allocated": lambda: 7,
        "memory_allocated": lambda: 3,
        "memory_stats": lambda: {"allocation.all.allocated": next(stats)},
        "reset_peak_memory_stats": lambda: None,
        "set_sync_debug_mode": lambda mode: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
    }
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    event = SimpleNamespace(device_type=torch.autograd.DeviceType.CUDA)
    profile = SimpleNamespace(events=lambda: [event, event, SimpleNamespace(device_type=None)])
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(profile))
    bench = gpu.Bench("cpu", 1e-3, 4)
    bench.cuda, bench.budget, bench.cold_bytes, bench.least = True, 0.0, 20_000, 4
    return bench


@pytest.mark.parametrize("task", TASKS)
def test_the_gpu_report_measures_all_it_promises(fake_gpu, task):
    number, coefficient = 2 if task == "telemetry" else 1, 0.5 if task == "clip" else 1.0
    case = gpu.Case(task, "x", "fp32", number, 1.0, coefficient, sizes=SIZES)
    chosen = [
        dataclasses.replace(one, devices=("cpu",))
        for one in TASKS[task]
        if one.name.split()[-1] not in ("compiled", "graph")  # what replays nothing finds nothing
    ]
    rows = fake_gpu.measure(case, chosen)
    assert len(rows) == len(chosen)
    for one, found in zip(chosen, rows):
        assert tuple(found) == gpu.FIELDS
        if one.missing():
            continue
        assert found["wall_us_median"] > 0, found["note"]
        assert (found["kernels"], found["syncs"], found["allocations"], found["peak_bytes"]) == (2, 0, 1, 4)
        if one.capturable:
            # Sets of 4.6 KB until there are 20 KB: five calls in half a millisecond.
            assert found["gpu_us_median"] == found["gpu_us_p90"] == pytest.approx(100.0)
            assert found["copy_bandwidth_fraction"] == pytest.approx(
                found["bytes"] / 1e-4 / fake_gpu.anchors["copy_bytes_per_second"]
            )
        else:
            assert found["gpu_us_median"] is None
        assert found["bytes"] == (3 if task == "clip" else 1) * 4 * sum(map(math.prod, SIZES))


def test_a_graph_that_computes_nothing_is_caught(fake_gpu, monkeypatch):
    monkeypatch.setattr(FakeGraph, "replay", lambda graph: None)
    chosen = [TASKS["telemetry"][0], next(one for one in TASKS["telemetry"] if one.name == "P2 native")]
    ours, _ = fake_gpu.measure(gpu.Case("telemetry", "x", "fp32", sizes=SIZES), chosen)
    assert "not captured: WrongAnswer: sums is off by nan" in ours["note"]
    assert ours["gpu_us_median"] is None


def test_a_graph_that_cannot_be_captured_leaves_the_eager_times(fake_gpu, monkeypatch):
    def refuse(graph):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    (found,) = fake_gpu.measure(gpu.Case("norm", "x", "fp32", sizes=SIZES), TASKS["norm"][:1])
    assert "not captured: RuntimeError: operation not permitted" in found["note"]
    assert found["gpu_us_median"] is None
    assert found["wall_us_median"] > 0


def test_the_gpu_report_goes_through_steps_and_growth(fake_gpu):
    fake_gpu.properties = SimpleNamespace(L2_cache_size=1000)
    rows = fake_gpu.step()
    assert [row["note"] for row in rows] == [""] * 10
    assert all(row["kernels"] == 2 and row["wall_us_median"] > 0 and row["rel_error"] == 0.0 for row in rows)
    rows, fits = fake_gpu.growth()
    assert {row["task"] for row in rows} == {"growth of tensors", "growth of elements", "growth of segments"}
    assert all(row["gpu_us_median"] > 0 for row in rows), {row["note"] for row in rows}
    assert {(fit["axis"], fit["time"]) for fit in fits} >= {("tensors", "gpu_us_median"), ("segments", "cpu_us_median")}


# -- tables and pictures ---------------------------------------------------------------------------------------------


def synthetic():
    """A GPU result with invented numbers: ours 10 µs, P1 20, and a contender that no graph can hold."""
    rows = []
    for task in performance_report.SHOWN:
        for dtype in ("fp32", "bf16"):
            shape = "transformer" if task == "step" else "GPT-2"
            for name, taken, wall in (("seedtriton", 10.0, 15.0), ("P1 torch", 20.0, 45.0), ("P7 loop", None, 75.0)):
                case = gpu.Case("norm", shape, dtype)
                found = gpu.row(case, name, bytes=10_000_000, gpu_us_median=taken, cpu_us_median=wall / 3)
                rows.append(found | {
                    "task": task, "wall_us_median": wall, "kernels": 1, "syncs": 0, "allocations": 0,
                    "rel_error": 1e-8, "copy_bandwidth_fraction": 0.9,
                })  # fmt: skip
    failed = gpu.row(gpu.Case("norm", "one 1B", "fp32"), "seedtriton", note="RuntimeError: x")
    fits = [{"axis": "tensors", "contender": "seedtriton", "time": "gpu_us_median", "slope": 0.5}]
    anchors = {"norm": {"copy_bytes_per_second": 4e12}}
    header = {"device": "Fake GPU", "torch": "2", "commit": "c", "cuda": "13.0", "command": "python -m bench"}
    return {"header": header, "anchors": anchors, "fits": fits, "rows": [*rows, failed]}


def test_a_gpu_result_becomes_tables():
    said = performance_report.markdown(synthetic(), "gpu-fake.json")
    assert said.startswith("Fake GPU, torch 2, commit c; a copy moves 4000 GB/s")
    assert "| GPT-2 | fp32 | 10.0 | 90% | 5 | 1 / 0 / 0 | 1e-08 | 2.00 / 3.0 | 5.00 w / 5.0 |" in said
    assert "| one 1B | fp32 | RuntimeError: x |" in said
    assert "| tensors | 0.50 |" in said
    assert "docs/ratios-gpu.png" in said
    widths = [line.count("|") for line in said.splitlines() if line.startswith("|")]
    assert set(widths[: widths.index(3)]) == {10}


def test_and_pictures(tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    before = matplotlib.get_backend(), dict(matplotlib.rcParams)
    performance_pictures.pictures(synthetic(), tmp_path)
    assert (matplotlib.get_backend(), dict(matplotlib.rcParams)) == before
    assert {path.name for path in tmp_path.iterdir()} == {"bandwidth-gpu.png", "ratios-gpu.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_pictures_have_a_row_for_each_and_names_in_the_place_of_codes():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    codes = {contender.name for found in TASKS.values() for contender in found}
    unnamed = {name for name in codes if name not in performance_pictures.NAMES}
    assert {name for name in unnamed if not name.startswith("seedtriton")} == set()
    assert not any(re.match(r"P\d", name) for name in performance_pictures.NAMES.values())
    ratios = performance_pictures.ratios(synthetic())
    assert len(ratios.axes) == len(performance_report.SHOWN)
    (peer, loop) = (line for line in ratios.axes[0].lines if line.get_marker() == "o")
    assert (peer.get_xdata()[0], loop.get_xdata()[0]) == (2.0, 5.0)
    bandwidth = performance_pictures.bandwidth(synthetic())
    fp32 = {line.get_label(): line for line in bandwidth.axes[0].lines if line.get_marker() != "None"}
    assert fp32["seedtriton"].get_xdata()[0] == pytest.approx(1000.0), "10 MB in 10 us are 1000 GB/s"
    assert fp32["seedtriton"].get_linestyle() == "None", "sizes are rows, and nothing joins them"
    assert [label.get_text() for label in bandwidth.axes[0].get_yticklabels()] == ["GPT-2, 10 MB"]


def test_the_readme_block_says_so_while_there_is_no_result(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("report", ROOT / "bench" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    page = (ROOT / "docs" / "how-fast.md").read_text(encoding="utf-8")
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert "No GPU result is committed yet" in report.with_tables("docs/how-fast.md", page)
    text = json.dumps(synthetic())
    for name in ("gpu-a-2026-01-02.json", "gpu-b-2026-01-01.json"):
        (results / name).write_text(text)
    assert report.newest("gpu").name == "gpu-a-2026-01-02.json"
    assert "Fake GPU" in report.with_tables("docs/how-fast.md", page)
    assert "No GPU result" not in report.with_tables("docs/how-fast.md", page)


def test_what_does_not_begin_in_time_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "cases", lambda part: [gpu.Case(part, "GPT-2", "fp32"), gpu.Case(part, "odd", "bf16")])
    arguments = ["--device", "cpu", "--scale", "tiny", "--repeats", "2", "--output", str(tmp_path)]
    assert gpu.main([*arguments, "--part", "norm", "--seconds", "0"]) == 0
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert record["rows"] == []
    assert record["left_out"] == {"norm": ["norm, GPT-2, fp32", "norm, odd, bf16"]}
    assert gpu.main([*arguments, "--part", "telemetry"]) == 0
    record = json.loads(path.read_text())
    assert record["left_out"] == {"norm": ["norm, GPT-2, fp32", "norm, odd, bf16"], "telemetry": []}, "a part each"
    assert gpu.main([*arguments, "--part", "norm", "--budget", "0"]) == 0
    record = json.loads(path.read_text())
    assert {row["shape"] for row in record["rows"] if row["task"] == "norm"} == {"GPT-2", "odd"}
    assert record["left_out"]["norm"] == []


def test_the_budget_ends_the_repeats():
    bench = gpu.Bench("cpu", 1e-3, 50, budget=0.0)
    turns = bench._turns(["one"], lambda name: 1, 50, 7)
    assert len(turns["one"]) == 7
    bench.budget = 1e9
    assert len(bench._turns(["one"], lambda name: 1, 50, 7)["one"]) == 50


def test_a_variant_of_the_kernels_holds_while_it_runs_and_no_longer():
    from seedtriton.kernels import _plan, _tables

    changes = variants.variants()
    assert changes["as it is"] == {}
    warps, chunk = dict(_tables.OPTIONS), _plan.chunk_bytes
    seen = []
    build = lambda work: Call(lambda: seen.append((_tables.OPTIONS["num_warps"], _plan.chunk_bytes(1))))  # noqa: E731
    for name in ("as it is", "8 warps", "items of 64 KiB"):
        variants.under(changes[name], build)(Work([torch.ones(1)], [0])).run()
    assert seen == [(4, 32 << 10), (8, 32 << 10), (4, 64 << 10)]
    assert (_tables.OPTIONS, _plan.chunk_bytes) == (warps, chunk)
    assert len({tuple(sorted(name for _, name in found)) for found in changes.values()}) >= 5


def test_a_copy_without_the_repository_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("BENCH_COMMIT", "abc1234")
    assert machine.header("python")["commit"] == "abc1234"


def test_variants_need_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        variants.main([])
    assert "these kernels do not run" in capsys.readouterr().err
