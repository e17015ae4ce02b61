"""Events go to every sink, and no sink can stop training, another sink, or itself for good."""

import copy
import csv
import json
import logging
import math
import os
import pathlib
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

import seedtriton.report.sinks as module
from seedtriton import ConfigurationError
from seedtriton.report.runs import read_events
from seedtriton.report.sinks import CallableSink, CsvSink, JsonLinesSink, LogSink, Telemetry


@pytest.fixture(autouse=True)
def _closed(monkeypatch):
    """Every file is closed when its test is over."""
    opened = []

    class Lines(module._Lines):
        def __init__(self, path):
            super().__init__(path)
            opened.append(self)

    monkeypatch.setattr(module, "_Lines", Lines)
    yield
    for lines in opened:
        lines.close()


def event(step, **fields):
    return {"event": "epoch", "seed": "s", "epoch": step, "step": step, "stage": "TRAINING", "ratio": 0.5, **fields}


class Sometimes:
    """Fails where it is told to, and keeps the steps of all others."""

    def __init__(self, fails):
        self.fails, self.seen, self.tried = fails, [], 0

    def __call__(self, event):
        self.tried += 1
        if self.fails(event["step"]):
            raise OSError("disk full")
        self.seen.append(event["step"])


def emitted(sinks, steps):
    telemetry = Telemetry(sinks)
    for step in range(steps):
        telemetry.emit(event(step))
    return telemetry


# --- a sink that fails ---


def test_a_sink_that_fails_is_named_once_and_costs_the_others_nothing(caplog):
    before, after, broken = Sometimes(lambda step: False), Sometimes(lambda step: False), Sometimes(lambda step: True)
    telemetry = emitted([before, broken, after], 50)
    assert before.seen == after.seen == list(range(50))
    assert broken.tried == 50, "it is tried again: nobody knows when it can"
    assert telemetry.lost == 50
    assert telemetry.sinks == [before, broken, after]
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.name == "seedtriton"
    assert "Sometimes" in record.message
    assert "disk full" in caplog.text


def test_one_that_can_again_goes_on_and_the_loss_is_counted(caplog):
    sink = Sometimes(lambda step: 3 <= step < 7 or step == 20)
    assert emitted([sink], 30).lost == 5
    assert sink.seen == [0, 1, 2, *range(7, 20), *range(21, 30)]
    levels = [record.levelname for record in caplog.records]
    assert levels == ["ERROR", "WARNING", "ERROR", "WARNING"]
    assert ["it lost 4 events" in text for text in caplog.messages] == [False, True, False, False]
    assert "it lost 1 events" in caplog.messages[3]


@pytest.mark.parametrize("period", [2, 3, 10])
def test_one_that_fails_now_and_then_is_not_said_each_time(caplog, period):
    sink = Sometimes(lambda step: step % period == 0)
    assert emitted([sink], 1000).lost == math.ceil(1000 / period)
    assert len(sink.seen) == 1000 - math.ceil(1000 / period)
    assert len(caplog.records) <= 2 * math.log2(4 * period)


def test_two_equal_sinks_are_two(caplog):
    class Equal(Sometimes):
        def __eq__(self, other):
            return True

        __hash__ = None

    good, bad = Equal(lambda step: False), Equal(lambda step: True)
    emitted([good, bad], 3)
    assert good.seen == [0, 1, 2]
    assert len(caplog.records) == 1


def test_what_ends_the_program_is_no_failure():
    def interrupted(event):
        raise KeyboardInterrupt

    telemetry = Telemetry([interrupted])
    with pytest.raises(KeyboardInterrupt):
        telemetry.emit(event(0))
    assert telemetry.lost == 0


def test_one_that_makes_everybody_wait_is_left_alone_for_a_while(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])

    class Server(Sometimes):
        def __call__(self, event):
            now[0] += 2.0  # a server that does not answer
            super().__call__(event)

    server, other = Server(lambda step: step < 75), Sometimes(lambda step: False)
    telemetry = Telemetry([server, other])
    for step in range(100):
        telemetry.emit(event(step))
        now[0] += 1.0
    assert other.seen == list(range(100))
    # Two seconds of failing, twenty of rest: 0, 20, 40 and 60 are tried, and from 80 on each.
    assert server.seen == list(range(80, 100))
    assert server.tried == 4 + 20
    assert telemetry.lost == 80


def test_a_copy_of_a_telemetry_knows_its_own_sinks(caplog):
    telemetry = emitted([Sometimes(lambda step: step == 0)], 1)
    copied = copy.deepcopy(telemetry)
    for each in (telemetry, copied):
        each.emit(event(1))
        assert each.sinks[0].seen == [1]
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING", "WARNING"]


# --- files ---


@contextmanager
def room_for(size):
    """No file may grow beyond ``size``: what comes after is cut off in the middle of a write, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def written(sink, path, room):
    """Three events, as many more on a full disk, three events; the file's lines."""
    telemetry = Telemetry([sink])
    for step in range(9):
        if step == 3:
            size = path.stat().st_size
        if 3 <= step < 6:
            with room_for(size + room):
                telemetry.emit(event(step))
        else:
            telemetry.emit(event(step))
    assert telemetry.lost == 3
    return path.read_text().splitlines()


@pytest.mark.parametrize("room", [0, 1, 40])
def test_a_full_disk_costs_json_lines_the_events_of_that_time(tmp_path, room):
    sink = JsonLinesSink(tmp_path / "events.jsonl")
    lines = written(sink, tmp_path / "events.jsonl", room)
    assert [json.loads(line) for line in lines] == [event(step) for step in (0, 1, 2, 6, 7, 8)]
    sink.close()


@pytest.mark.parametrize("room", [0, 1, 50])
def test_a_full_disk_costs_csv_whole_events(tmp_path, room):
    lines = written(CsvSink(tmp_path / "events.csv"), tmp_path / "events.csv", room)
    assert [int(row["step"]) for row in csv.DictReader(lines)] == [0, 0, 1, 1, 2, 2, 6, 6, 7, 7, 8, 8]


def test_half_a_line_that_cannot_be_taken_back_is_a_line_of_its_own(tmp_path, monkeypatch):
    sink, path = JsonLinesSink(tmp_path / "events.jsonl"), tmp_path / "events.jsonl"
    monkeypatch.setattr(sink._lines, "_cut", lambda begin, done: False)
    lines = written(sink, path, 10)
    torn = [line for line in lines if not line.endswith("}")]
    assert len(torn) == 1
    assert [json.loads(line)["step"] for line in lines if line not in torn] == [0, 1, 2, 6, 7, 8]


def test_what_another_process_has_appended_is_not_taken_back(tmp_path):
    path = tmp_path / "events.jsonl"
    sink = JsonLinesSink(path)
    with open(path, "a") as other:
        other.write("{}\n")
    assert not sink._lines._cut(0, 2)
    assert path.read_text() == "{}\n"


def test_a_file_that_ends_in_half_a_line_is_gone_on_with_in_a_new_one(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "epo')
    sink = JsonLinesSink(path)
    assert path.read_text() == '{"event": "epo'
    sink(event(1))
    sink(event(2))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()[1:]] == [1, 2]


def test_json_lines_are_complete_at_once_and_have_no_nan(tmp_path):
    path = tmp_path / "new" / "events.jsonl"
    sink = JsonLinesSink(path)
    sink({"event": "epoch", "loss": math.nan, "checks": [{"value": math.inf}]})
    assert json.loads(path.read_text()) == {"event": "epoch", "loss": None, "checks": [{"value": None}]}
    sink({"event": "epoch", "loss": 1.0, "seed": "ü"})
    assert len(path.read_text().splitlines()) == 2
    sink.close()
    again = JsonLinesSink(path)
    again({"event": "epoch", "loss": 2.0})
    assert [line["loss"] for line in read_events(path)] == [None, 1.0, 2.0]


def test_an_event_that_json_has_no_word_for_leaves_nothing_in_the_file(tmp_path):
    path = tmp_path / "events.jsonl"
    telemetry = Telemetry([JsonLinesSink(path)])
    telemetry.emit(event(0, tag=object()))
    telemetry.emit(event(1))
    assert [line["step"] for line in read_events(path)] == [1]


def test_csv_has_a_row_for_each_number_and_the_same_columns_for_all(tmp_path):
    path = tmp_path / "new" / "events.csv"
    for run in range(2):  # a second run goes on in the same file
        sink = CsvSink(path)
        sink(event(run, loss=math.nan, seed='a "slot", say'))
        sink({"event": "pruned", "seed": "s", "epoch": 1, "step": 9, "stage": "PRUNED", "reason": "x"})
        sink({"event": "epoch", "seed": None, "epoch": 1, "step": 9, "stage": None, "accuracy": None})
        sink.close()
    head, *rows = csv.reader(path.read_text().splitlines())
    assert head == ["event", "seed", "epoch", "step", "stage", "name", "value"]
    assert rows[:4] == [
        ["epoch", 'a "slot", say', "0", "0", "TRAINING", "stage", "3.0"],
        ["epoch", 'a "slot", say', "0", "0", "TRAINING", "ratio", "0.5"],
        ["epoch", 'a "slot", say', "0", "0", "TRAINING", "loss", "nan"],
        ["pruned", "s", "1", "9", "PRUNED", "stage", "8.0"],
    ]
    assert len(rows) == 8
    assert {len(row) for row in rows} == {7}


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "event,seed\n", "event,seed,epoch,step,stage,na"])
def test_csv_refuses_a_file_with_other_columns(tmp_path, text):
    path = tmp_path / "events.csv"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"events\.csv has other columns"):
        CsvSink(path)
    assert path.read_text() == text


def test_a_function_gets_the_numbers_and_the_step():
    seen = []
    sink = CallableSink(lambda values, step: seen.append((values, step)))
    sink(event(7))
    sink({"event": "pruned", "seed": None, "step": 8, "reason": "no number"})
    assert seen == [({"growth/s/stage": 3.0, "growth/s/ratio": 0.5}, 7)]


def test_a_file_that_nobody_has_closed_is_closed_without_a_warning(tmp_path):
    """A script that ends without close(), in a process where a warning is an error."""
    code = (
        "import gc; from seedtriton.report.sinks import JsonLinesSink\n"
        "JsonLinesSink('gone.jsonl')({'event': 'stage'}); gc.collect()\n"
        "kept = JsonLinesSink('kept.jsonl'); kept({'event': 'stage'})"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    path = {"PYTHONPATH": str(pathlib.Path(module.__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [len(read_events(tmp_path / name)) for name in ("gone.jsonl", "kept.jsonl")] == [1, 1]


# --- the log ---


def test_the_log_has_one_readable_line_per_event(caplog):
    with caplog.at_level(logging.INFO, logger="seedtriton"):
        LogSink()({"event": "stage", "seed": "block2", "target": "BLENDING", "checks": [1]})
    assert caplog.messages == ["stage seed=block2 target=BLENDING"]


def test_harm_is_seen_by_scripts_that_set_no_logging_up(caplog):
    with caplog.at_level(logging.DEBUG, logger="seedtriton"):
        for sink in (LogSink(), LogSink(level=logging.ERROR)):
            sink({"event": "harm", "seed": "block2", "action": "fade"})
            sink({"event": "alpha_target", "seed": "block2"})
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.WARNING, logging.INFO, logging.ERROR, logging.ERROR]


def test_the_log_goes_where_it_is_told(caplog):
    with caplog.at_level(logging.DEBUG, logger="mine"):
        LogSink(logging.getLogger("mine"), logging.DEBUG)({"event": "epoch"})
    assert caplog.records[0].name == "mine"
