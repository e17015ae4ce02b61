"""The commands that people type first."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

import seedtriton
from seedtriton import demo_tasks, doctor
from seedtriton.cli import main
from seedtriton.gradients import backend
from seedtriton.report.plots import lifecycle_figure
from seedtriton.report.runs import read_events


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
    shorten(monkeypatch, "digits", epochs=26)
    assert main(["demo", "--folder", str(tmp_path)]) == 1
    assert "gradient_never_measured" in capsys.readouterr().out


def shorten(monkeypatch, name, **changes):
    make = demo_tasks.TASKS[name]
    monkeypatch.setitem(demo_tasks.TASKS, name, lambda seed: dataclasses.replace(make(seed), **changes))


def test_the_language_model_grows_by_its_loss_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("seedtriton.demo.PATIENCE", 3)
    shorten(monkeypatch, "lm", epochs=13, germination=3)
    assert main(["demo", "--task", "lm", "--folder", str(tmp_path)]) == 0
    events = read_events(tmp_path / "events.jsonl")
    assert {event.get("accuracy") for event in events} == {None}
    assert [event["seed"] for event in events if event["event"] == "fossilized"] == ["healthy"]
    (last,) = [event["loss"] for event in events if event["event"] == "epoch" and event["epoch"] == 13]
    plain = [event["loss"] for event in events if event["event"] == "baseline"]
    assert last < plain[-1]
    output = capsys.readouterr().out
    assert "accuracy" not in output.split("with growth")[1]
    assert "lifecycle.png" in output


EVENTS = [{"event": "epoch", "seed": None, "epoch": n, "accuracy": n / 10, "loss": 1.0} for n in range(5)]
EVENTS += [{"event": "stage", "seed": "a", "epoch": 1, "source": "GERMINATED", "target": "TRAINING"}]
EVENTS += [{"event": "epoch", "seed": "a", "epoch": n, "ratio": 1.0, "blend_gain_t": 2.0, "alpha": 0.0} for n in (2, 3)]


EVENTS.sort(key=lambda event: event["epoch"])


@pytest.fixture
def events_file(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join(map(json.dumps, EVENTS)))
    return path


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_plot_draws_from_a_file_of_events_and_says_what_it_wrote(events_file, tmp_path, capsys, ending):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    picture = tmp_path / f"a.{ending}"
    assert main(["plot", str(events_file), str(picture)]) == 0
    assert picture.stat().st_size > 9_000
    assert capsys.readouterr().out == f"wrote {picture}\n"


def test_of_runs_that_were_appended_the_last_is_drawn_and_said(events_file, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    events_file.write_text(2 * (events_file.read_text() + "\n"))
    assert main(["plot", str(events_file), str(tmp_path / "a.png"), "--dark", "--title", "Two"]) == 0
    assert "of the last of 2 runs in the file" in capsys.readouterr().out


def failing(capsys, *arguments):
    """What a command that fails prints: on stderr, in a line, and with exit code 2."""
    assert main(list(map(str, arguments))) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("python -m seedtriton")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no events"),
        ('{"event": "epoch", "epoch": 0}\n{"ev', "line 2, is no event"),
        ("\x00\x01garbage", "line 1, is no event"),
        ('{"epoch": 1}', "event 1 has no name"),
    ],
    ids=["empty", "truncated", "garbage", "another file"],
)
def test_a_file_of_events_that_cannot_be_drawn_is_named(text, words, tmp_path, capsys):
    path = tmp_path / "events.jsonl"
    path.write_text(text)
    assert words in failing(capsys, "plot", path, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_files_that_cannot_be_read_or_written_are_named(events_file, tmp_path, capsys):
    assert "No such file or directory: " in failing(capsys, "plot", tmp_path / "none.jsonl", tmp_path / "a.png")
    assert "Is a directory" in failing(capsys, "plot", tmp_path, tmp_path / "a.png")
    assert "a picture ends in .png, .svg, .pdf, got" in failing(capsys, "plot", events_file, tmp_path / "a.jpeg2")
    assert "No such file" in failing(capsys, "plot", events_file, tmp_path / "no" / "a.png")
    assert "Not a directory" in failing(capsys, "demo", "--task", "lm", "--folder", events_file)


def test_a_folder_that_is_read_only_is_named(events_file, tmp_path, capsys, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "a.png"))

    figure = pytest.importorskip("matplotlib.figure", reason="pictures need matplotlib")
    monkeypatch.setattr(figure.Figure, "savefig", refuse)
    assert "Permission denied: " in failing(capsys, "plot", events_file, tmp_path / "a.png")


def test_without_matplotlib_it_says_how_to_get_it(events_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'seedtriton[demo]'" in failing(capsys, "plot", events_file, tmp_path / "a.png")


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("seedtriton.cli.doctor", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m seedtriton doctor | head -n 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.returncode == 0
    assert result.stdout.startswith("seedtriton")


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"seedtriton {seedtriton.__version__}\n"
    with pytest.raises(SystemExit) as left:
        main(["grow"])
    assert left.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_a_figure_is_handed_back_with_the_limits_that_were_in_force():
    figure_module = pytest.importorskip("matplotlib.figure", reason="pictures need matplotlib")
    asked = {"question": "blend_gain", "name": "n", "passed": True}
    gates = [
        {"event": "gate", "seed": "a", "gate": "G2", "epoch": n, "passed": n == 3, "blend_gain_t": 2.25,
         "checks": [{**asked, "limit": limit}]}
        for n, limit in ((2, 4.0), (3, 0.0))
    ]  # fmt: skip
    figure = lifecycle_figure([*EVENTS, *gates], title="Here")
    assert isinstance(figure, figure_module.Figure)
    assert figure.get_suptitle() == "Here"
    gain, result = figure.axes[2], figure.axes[4]
    dotted = {(tuple(line.get_xdata()), tuple(line.get_ydata())) for line in gain.lines if len(line.get_xdata()) == 2}
    assert {((1.5, 2.5), (4.0, 4.0)), ((2.5, 3.5), (0.0, 0.0))} <= dotted, "each verdict has its own limit"
    assert {text.get_text() for text in gain.texts} == {"G2: at least 4", "G2: at least 0"}
    dots = [line for line in gain.lines if line.get_marker() == "o"]
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == [(3, 2.25)]
    assert result.get_ylabel() == "validation\naccuracy"


def test_where_there_is_no_accuracy_the_loss_is_drawn():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    events = [{**event, "accuracy": None} if "accuracy" in event else event for event in EVENTS]
    result = lifecycle_figure(events).axes[4]
    assert result.get_ylabel() == "validation\nloss"
    assert list(result.lines[0].get_ydata()) == [1.0] * 5


def test_a_dark_picture_is_written_with_its_paper(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    light, dark = (lifecycle_figure(EVENTS, dark=dark).get_facecolor() for dark in (False, True))
    assert sum(light[:3]) > 2.9
    assert sum(dark[:3]) < 0.5


def test_drawing_leaves_the_callers_matplotlib_alone(tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="pictures need matplotlib")
    before = matplotlib.get_backend()
    with matplotlib.rc_context({"font.size": 7.0}):
        pyplot.switch_backend("svg")
        pyplot.figure()
        settings, figures = dict(matplotlib.rcParams), pyplot.get_fignums()
        event = {"event": "epoch", "seed": None, "epoch": 0, "accuracy": 0.5, "loss": 1.0}
        lifecycle_figure([event], tmp_path / "a.png", dark=True)
        assert (matplotlib.get_backend(), dict(matplotlib.rcParams), pyplot.get_fignums()) == ("svg", settings, figures)
    pyplot.close("all")
    pyplot.switch_backend(before)


def test_doctor_names_versions_and_the_reason_for_the_backend(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for word in ("torch", "triton", "backend", "relative error", "all is well"):
        assert word in output


def test_doctor_names_optional_packages_what_would_use_them_and_versions_that_nobody_tried(capsys, monkeypatch):
    versions = {"seedtriton": "0.1.0", "triton": "3.1.0", "transformers": "5.30.1", "peft": "0.21.9", "rich": "9.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(doctor.torch, "__version__", "2.40.0+cu999")
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "2.40.0+cu999 (not tested: the tests run with 2.6 to 2.14)" in output
    assert "triton 3.1.0 (not tested: the tests run with 3.4 to 3.8)" in output
    assert "transformers  5.30.1 (not tested: the tests run with 5.24): GrowthCallback" in output
    assert "rich          9.0 (not tested: the tests run with 15.0)" in output
    assert "peft          0.21.9: monitor_adapters" in output
    assert "lightning     not installed (pip install 'seedtriton[lightning]'): GrowthCallback" in output
    assert "wandb         not installed (pip install wandb): WandbSink" in output


COUNTED = {"passed", "names"}  # of a lane in which nothing failed


def test_the_versions_that_doctor_knows_are_those_of_the_tests_and_of_the_package():
    root = pathlib.Path(__file__).resolve().parents[1]
    pins = dict(line.split("==") for line in (root / "constraints.txt").read_text().split() if "==" in line)
    newest = {name: client.tried[1] for name, client in doctor.CLIENTS.items() if client.tried}
    for name, version in newest.items():
        assert f"{pins[name]}.".startswith(f"{version}."), name
    rows = json.loads(max((root / "bench" / "results").glob("versions-*.json")).read_text())["rows"]
    passed = [row for row in rows if not row["refused"] and all(set(lane) == COUNTED for lane in row["lanes"].values())]
    for name, tried in (("torch", doctor.TORCH), ("triton", doctor.TRITON)):
        assert doctor._numbers(tried[1]) == max(doctor._numbers(row[name])[:2] for row in passed), name
        assert doctor._remark(pins[name], tried) == "", name
    project = (root / "pyproject.toml").read_text()
    assert f'"torch>={doctor.TORCH[0]}"' in project
    assert doctor.TRITON[0] == ".".join(map(str, backend.OLDEST))
    for name, client in doctor.CLIENTS.items():
        assert client.extra is None or f"\n{client.extra} = [" in project, name


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
    assert result.returncode == 2
    assert "SEEDTRITON_BACKEND" in result.stderr
    assert "Traceback" not in result.stderr
