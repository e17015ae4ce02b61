"""Events go to every sink, and no sink can stop training."""

import json
import logging
import math

from seedtriton.report.sinks import JsonLinesSink, LogSink, Telemetry


def test_a_sink_that_raises_is_reported_once_and_the_others_go_on(caplog):
    seen = []

    def broken(event):
        raise OSError("disk full")

    telemetry = Telemetry([broken, seen.append])
    with caplog.at_level(logging.ERROR, logger="seedtriton"):
        for step in range(3):
            telemetry.emit({"event": "epoch", "step": step})
    assert [event["step"] for event in seen] == [0, 1, 2]
    assert len(caplog.records) == 1
    assert "disk full" in caplog.text


def test_json_lines_are_complete_at_once_and_have_no_nan(tmp_path):
    path = tmp_path / "new" / "events.jsonl"
    sink = JsonLinesSink(path)
    sink({"event": "epoch", "loss": math.nan, "checks": [{"value": math.inf}]})
    assert json.loads(path.read_text()) == {"event": "epoch", "loss": None, "checks": [{"value": None}]}
    sink({"event": "epoch", "loss": 1.0})
    assert len(path.read_text().splitlines()) == 2
    sink.close()


def test_the_log_has_one_readable_line_per_event(caplog):
    with caplog.at_level(logging.INFO, logger="seedtriton"):
        LogSink()({"event": "stage", "seed": "block2", "target": "BLENDING", "checks": [1]})
    assert caplog.messages == ["stage seed=block2 target=BLENDING"]


def test_the_log_goes_where_it_is_told(caplog):
    with caplog.at_level(logging.DEBUG, logger="mine"):
        LogSink(logging.getLogger("mine"), logging.DEBUG)({"event": "epoch"})
    assert caplog.records[0].name == "mine"
