"""The model of GPU time: it answers for every row of the GPU report, and its parts do what they say."""

import itertools
import math

import pytest

from bench.performance import model, run, tables
from bench.performance.contenders import TASKS
from bench.performance.run import Case

H200 = model.CARDS[0]


@pytest.fixture(scope="module")
def record():
    return model.record()


def test_every_row_of_the_gpu_report_has_a_prediction_for_every_card(record):
    found = {(one["task"], one["shape"], one["dtype"], one["contender"]) for one in record["rows"]}
    assert len(found) == len(record["rows"])
    for part in run.PARTS[:3]:
        for case, one in itertools.product(run.cases(part), TASKS[part]):
            if "cuda" in one.devices:
                assert (case.title, case.what, case.dtype, one.name) in found
    for axis, points in run.growth_points(True, None).items():
        assert {(f"growth of {axis}", f"{number} {axis}") for number, *_ in points} <= {key[:2] for key in found}
    assert {key[3] for key in found if key[0] == "step"} == set(run.STEPS)
    for one in record["rows"]:
        assert one["time"] in ("gpu_us", "wall_us")
        assert all(math.isfinite(one[card.name]) and one[card.name] > 0 for card in model.CARDS)


def test_what_a_graph_cannot_hold_is_predicted_as_wall_time(record):
    capturable = {one.name: one.capturable for task in TASKS.values() for one in task}
    for one in record["rows"]:
        if one["task"] != "step":
            assert (one["time"] == "gpu_us") == capturable[one["contender"]]


def test_a_contender_that_the_model_does_not_know_is_an_error():
    stranger = TASKS["norm"][4].__class__("P99 somebody", print)
    with pytest.raises(ValueError, match="no prediction for 'P99 somebody'"):
        model.predict(H200, Case("norm", "1000 x 64", "fp32"), stranger)


def time_of(card, shape, dtype="fp32", design=model.DESIGN):
    return model.measure(card, model.work_of(Case("norm", shape, dtype)).items, design=design)


def test_no_prediction_is_faster_than_the_bytes_and_large_ones_are_near_them():
    for card in model.CARDS:
        for shape in ("ResNet-50", "GPT-2", "one 1B"):
            least = model.work_of(Case("norm", shape, "fp32")).bytes / card.roof
            assert time_of(card, shape) > least
        assert time_of(card, "one 1B") < 1.1 * least


def test_each_part_of_the_time_is_felt():
    base = time_of(H200, "ResNet-50", "bf16")
    for part, more in (("near", 1e-6), ("far", 1e-6), ("fence", 1e-6), ("node", 1e-6)):
        assert time_of(H200._replace(**{part: getattr(H200, part) + more}), "ResNet-50", "bf16") > base + 0.9e-6
    assert time_of(H200._replace(bandwidth=1e12), "ResNet-50", "bf16") > 2 * base / 1.9
    for change in ({"before": 50}, {"close": 30}, {"ahead": 1, "registers": 255}, {"doubles": 10**8}):
        assert time_of(H200, "ResNet-50", "bf16", model.DESIGN._replace(**change)) > base
    assert model.resident(H200, model.DESIGN._replace(registers=128)) < model.resident(H200, model.DESIGN)


def test_clipping_that_bites_moves_the_bytes_twice_more():
    items = model.work_of(Case("clip", "one 1B", "fp32")).items
    more = model.scale(H200, items, 0.5) - model.scale(H200, items, 1.0)
    assert more == pytest.approx(2 * 4e9 / H200.roof, rel=0.01)


def test_few_programs_leave_sooner_than_one_for_each_item():
    items = model.work_of(Case("clip", "Llama-3-8B / 8", "bf16")).items
    assert len(items.sizes) > 7_500
    each = model.scale(H200, items, 1.0, model.DESIGN._replace(scale_programs=None))
    assert model.scale(H200, items, 1.0) < each / 2


def test_the_worst_ratio_of_a_goal(record):
    goal = ("norm", "P5 vector_norm(flat)", ("GPT-2", "one 1B"), ("fp32",), 0.97)
    found = {
        (one["shape"], one["contender"]): one["H200"]
        for one in record["rows"]
        if (one["task"], one["dtype"]) == ("norm", "fp32")
    }
    ratios = [found[name, goal[1]] / found[name, "seedtriton"] for name in goal[2]]
    assert model.reached(record["rows"], H200, goal) == min(ratios)


def test_the_design_is_that_of_the_kernels():
    gradient_sums = pytest.importorskip("seedtriton.kernels.gradient_sums", reason="needs Triton")
    import torch

    from seedtriton.kernels import _launch, _row, gradient_scale

    assert model.DESIGN.warps == _launch.OPTIONS["num_warps"]
    assert model.DESIGN.step == gradient_sums.BLOCK_BYTES[torch.float32, 32]
    assert model.DESIGN.scale_programs == gradient_scale.PROGRAMS
    assert model.DESIGN.items_at_once == _row.TENSOR_BLOCK.value
    assert model.DESIGN.tensors_at_once == _row.SEGMENT_BLOCK.value


def test_the_table_says_that_it_predicts_and_shows_a_measurement_beside_it(record):
    said = tables.predictions(record, "raw.json")
    assert "Predictions of a model, not measurements" in said
    rows = [line for line in said.splitlines() if line.startswith("|")]
    assert all(line.count("|") == rows[0].count("|") for line in rows if line.startswith("| norm | GPT"))
    found = {one["contender"]: one for one in record["rows"] if (one["task"], one["shape"]) == ("norm", "GPT-2")}
    of = {"dtype": "fp32", "gpu_us_median": None, "copy_bandwidth_fraction": None}
    rows = [
        found["seedtriton"] | of | {"gpu_us_median": 1234.4, "wall_us_median": 2000.0, "copy_bandwidth_fraction": 0.8},
        found["P1 get_total_norm"] | of | {"gpu_us_median": 1500.0, "wall_us_median": 9000.0},
        found["P7 double loop"] | of | {"wall_us_median": 6000.0},
    ]
    said = tables.predictions(record, "raw.json", {"header": {"device": "NVIDIA H200"}, "rows": rows})
    assert "NVIDIA H200, measured" in said
    assert "| 1234 |" in said
    last = {}
    for goal in record["goals"]:
        start = f"| {goal['task']} | {goal['peer']} | {', '.join(goal['shapes'])} | {', '.join(goal['dtypes'])} |"
        line = next(line for line in said.splitlines() if line.startswith(start))
        last[goal["task"], goal["peer"], goal["shapes"][0], goal["dtypes"][0]] = line.split("|")[-2].strip()
    assert last["norm", "copy", "GPT-2", "fp32"] == "**0.80**"
    assert last["norm", "P1 get_total_norm", "GPT-2", "fp32"] == "1.22", "GPU times, where both have them"
    assert last["norm", "P7 double loop", "GPT-2", "fp32"] == "**3.00**", "walls, where one waits"
    assert set(last.values()) == {"**0.80**", "1.22", "**3.00**", "-"}


def test_variants_are_set_against_the_first_of_their_column():
    header = {"device": "GPU", "torch": "2", "triton": "3", "commit": "c", "command": "python"}
    names = (("as it is", 10.0), ("8 warps", 11.0), ("two launches", None))
    rows = [
        {"shape": "GPT-2, 2 segments 1:1", "dtype": dtype, "contender": name, "gpu_us_median": taken and factor * taken}
        for dtype, factor in (("bf16", 1), ("fp32", 2))
        for name, taken in names
    ]
    rows[-2]["gpu_us_median"] = 19.0
    lines = tables.variants({"header": header, "rows": rows}, "raw.json").splitlines()
    assert lines[2] == "| | GPT-2 bf16 | GPT-2 fp32 |"
    assert lines[4:] == ["| as it is, µs | 10.0 | 20.0 |", "| 8 warps | +10.0% | -5.0% |"]


def test_what_was_left_out_is_counted_by_part():
    (_, said) = tables._left_out({"telemetry": ["telemetry, GPT-2, fp32"], "growth": ["norm, 10 tensors, fp32"] * 2})
    assert said == "Cases left out for lack of time: 1 of telemetry, 2 of growth."
    assert tables._left_out({}) == []
