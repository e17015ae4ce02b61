"""The commands that people type first."""

import json
import os
import subprocess
import sys

import pytest

from seedtriton.cli import main
from seedtriton.report.plots import lifecycle_figure


def test_demo_fossilizes_the_healthy_seed_and_refuses_the_sabotaged_one(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
    assert main(["demo", "--folder", str(tmp_path)]) == 0
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["seed"] for event in events if event["event"] == "fossilized"] == ["healthy"]
    refused = [event for event in events if event["event"] == "gate" and event["seed"] == "sabotaged"]
    refused = [event for event in refused if event["gate"] == "G2"]
    assert refused
    assert not any(event["passed"] for event in refused)
    reasons = {check["name"]: check["reason"] for check in refused[-1]["checks"] if check["passed"] is False}
    assert "no optimizer" in reasons["seed_in_no_optimizer"]
    # What makes it worth showing: the bare ratio of the original gate passed it every time.
    ratios = [check for event in refused for check in event["checks"] if check["question"] == "gradient_ratio"]
    assert all(check["passed"] for check in ratios)
    assert max(check["value"] for check in ratios) > 1000 * 0.05, "the README says so beside the picture"
    output = capsys.readouterr().out
    assert "seed_in_no_optimizer" in output
    assert (tmp_path / "lifecycle.png").read_bytes()[:4] == b"\x89PNG"


def test_the_demo_says_when_it_did_not_go_as_it_should(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
    monkeypatch.setattr("seedtriton.GrowthController.measure", lambda self: None)
    monkeypatch.setattr("seedtriton.demo.PATIENCE", 3)
    monkeypatch.setattr("seedtriton.demo.EPOCHS", 26)
    assert main(["demo", "--folder", str(tmp_path)]) == 1
    assert "gradient_never_measured" in capsys.readouterr().out


def test_plot_draws_from_a_file_of_events_and_a_missing_file_is_no_traceback(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    events = [{"event": "epoch", "seed": None, "epoch": n, "accuracy": n / 10, "loss": 1.0} for n in range(5)]
    events += [{"event": "stage", "seed": "a", "epoch": 1, "source": "GERMINATED", "target": "TRAINING"}]
    measured = {"event": "epoch", "seed": "a", "ratio": 1.0, "blend_gain_t": 2.0, "alpha": 0.0}
    events += [{**measured, "epoch": n} for n in (2, 3)]
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join(map(json.dumps, events)))
    assert main(["plot", str(path), str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert main(["plot", str(tmp_path / "none.jsonl"), str(tmp_path / "b.png")]) == 1
    assert "none.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("text, words", [("", "no events"), ('{"event": "epoch", "epoch": 0}\n{"ev', "line 2")])
def test_a_file_of_events_that_cannot_be_drawn_is_named(text, words, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    path = tmp_path / "events.jsonl"
    path.write_text(text)
    assert main(["plot", str(path), str(tmp_path / "a.png")]) == 1
    assert words in capsys.readouterr().out
    assert not (tmp_path / "a.png").exists()


def test_drawing_leaves_the_callers_matplotlib_alone(tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="pictures need matplotlib")
    before = matplotlib.get_backend()
    with matplotlib.rc_context({"font.size": 7.0}):
        pyplot.switch_backend("svg")
        pyplot.figure()
        settings, figures = dict(matplotlib.rcParams), pyplot.get_fignums()
        event = {"event": "epoch", "seed": None, "epoch": 0, "accuracy": 0.5, "loss": 1.0}
        lifecycle_figure([event], tmp_path / "a.png")
        assert (matplotlib.get_backend(), dict(matplotlib.rcParams), pyplot.get_fignums()) == ("svg", settings, figures)
    pyplot.close("all")
    pyplot.switch_backend(before)


def test_doctor_names_versions_and_the_reason_for_the_backend(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for word in ("torch", "triton", "backend", "relative error", "all is well"):
        assert word in output


def test_doctor_fails_when_the_sums_are_wrong(monkeypatch, capsys):
    from seedtriton import ops

    right = ops.segmented_sumsq
    monkeypatch.setattr(ops, "segmented_sumsq", lambda *args, **kwargs: right(*args, **kwargs) * (1 + 1e-5))
    assert main(["doctor"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_doctor_explains_an_impossible_backend():
    environment = {**os.environ, "SEEDTRITON_BACKEND": "cuda"}
    result = subprocess.run(
        [sys.executable, "-m", "seedtriton", "doctor"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "SEEDTRITON_BACKEND" in result.stdout
    assert "Traceback" not in result.stderr
