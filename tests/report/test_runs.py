"""Files of events and the runs in them."""

import json

import pytest

from seedtriton import ConfigurationError, Stage
from seedtriton.report.runs import limits, passes, points, read_events, runs_of, stage_bands


def epoch(number, seed=None, **fields):
    return {"event": "epoch", "epoch": number, "seed": seed, **fields}


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"event": "epoch", "epoch": 0}\n{"ev', r"line 2, is no event.*ended while it wrote its last line"),
        ("what is this", "line 1, is no event"),
        ("[1, 2]", "line 1, is no event"),
        ("\x00\x01", "line 1, is no event"),
        (b"\x89PNG\xff\xfe", "something else"),
    ],
)
def test_a_file_that_is_none_of_events_is_named_with_the_line(text, words, tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigurationError, match=rf"events\.jsonl.*{words}"):
        read_events(path)


def test_an_event_that_no_controller_has_emitted_is_named():
    for event in ({"epoch": 1}, {"event": "epoch"}, {"event": "epoch", "epoch": None}):
        with pytest.raises(ConfigurationError, match="event 2 has no name or no epoch"):
            runs_of([epoch(1), event])
    assert runs_of([]) == []


def test_runs_that_were_appended_are_told_apart():
    first, second = [epoch(n, run="a") for n in (1, 2, 3)], [epoch(n, run="b") for n in (1, 2)]
    assert runs_of(first + second) == [first, second]
    nameless = [epoch(1), epoch(2), epoch(1)]
    assert [len(run) for run in runs_of(nameless)] == [2, 1]
    again = [epoch(0, run="c"), epoch(1, run="c")]  # germination comes before the first epoch
    assert runs_of(first + again) == [first, again]
    short = [epoch(1, run="d")]
    assert runs_of([*short, epoch(1, run="e")]) == [short, [epoch(1, run="e")]]


def test_a_run_that_was_resumed_is_one_run_and_what_was_lost_is_not_in_it():
    before, after = [epoch(n, run="a", loss=1.0) for n in (1, 2, 3, 4)], [epoch(n, run="b", loss=2.0) for n in (3, 4)]
    (run,) = runs_of(before + after)
    assert points(run, None, "loss") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_a_resumed_run_keeps_the_epoch_before_whatever_the_script_does_first():
    """What happens before the first end_epoch() bears the number of the epoch before, which is not told again."""
    early = {"event": "pruned", "seed": "s", "epoch": 2, "run": "b"}
    before = [epoch(n, run="a", loss=1.0) for n in (1, 2, 3, 4)]
    (run,) = runs_of([*before, early, epoch(3, run="b", loss=2.0)])
    assert points(run, None, "loss") == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert early in run
    (run,) = runs_of([*before[:2], early])  # ended before it had an epoch
    assert [event["epoch"] for event in run] == [1, 2, 2]
    fresh = [{**early, "event": "germinated", "epoch": 0}, epoch(1, run="b")]
    assert runs_of(before + fresh) == [before, fresh]


def test_what_a_resumed_run_tells_again_is_there_once():
    germinated = {"event": "germinated", "seed": "late", "epoch": 1, "step": 10}
    first = [epoch(1, run="a"), {**germinated, "run": "a"}, epoch(2, run="a")]
    resumed = [{**germinated, "run": "b"}, epoch(2, run="b")]
    assert runs_of(first + resumed) == [first[:1] + resumed]


def test_runs_that_were_told_of_at_once_are_told_apart():
    one, two = [epoch(n, run="a") for n in (1, 2, 3)], [epoch(n, run="b") for n in (1, 2, 3)]
    assert runs_of([event for pair in zip(one, two) for event in pair]) == [one, two]


def test_a_run_that_goes_back_by_itself_is_one_and_loses_what_it_went_back_behind():
    events = [epoch(n, run="a", loss=1.0) for n in (1, 2, 3)] + [epoch(n, run="a", loss=2.0) for n in (2, 3)]
    (run,) = runs_of(events)
    assert points(run, None, "loss") == [(1, 1.0), (2, 2.0), (3, 2.0)]


def test_a_twin_stands_beside_the_run_that_it_branched_off():
    one, two = [epoch(n, run="a") for n in (1, 2, 3, 4)], [epoch(n, run="b") for n in (3, 4)]
    assert runs_of([*one[:2], two[0], one[2], two[1], one[3]]) == [one, one[:2] + two]


def test_a_baseline_belongs_to_the_run_that_it_follows():
    first, second = [epoch(1, run="a"), epoch(2, run="a")], [epoch(1, run="b")]
    baseline = [{"event": "baseline", "epoch": n} for n in (1, 2)]
    assert runs_of(first + baseline + second + baseline) == [first + baseline, second + baseline]
    assert runs_of(first + baseline + second) == [first + baseline, second]
    resumed = [epoch(2, run="b")]
    assert runs_of(first + baseline + resumed) == [first[:1] + baseline + resumed]
    nameless = [epoch(1), epoch(2), epoch(1)]
    assert [len(run) for run in runs_of(nameless + baseline)] == [2, 3]


def test_a_baseline_that_comes_first_belongs_to_the_first_run():
    baseline, run = [{"event": "baseline", "epoch": 1}], [epoch(1, run="a")]
    assert runs_of(baseline + run) == [baseline + run]
    assert runs_of(baseline) == [baseline]


def test_bands_curves_limits_and_passes():
    check = {"question": "blend_gain", "limit": 4.0, "passed": False}
    gate = {"event": "gate", "seed": "a", "gate": "G2", "passed": False, "blend_gain_t": 1.0}
    events = [
        {"event": "stage", "seed": "a", "epoch": 1, "target": "TRAINING"},
        epoch(2, "a", ratio=0.5), epoch(3, "a", ratio=None), epoch(3, "b", ratio=9.0),
        {**gate, "epoch": 2, "checks": [check]},
        {**gate, "epoch": 3, "checks": [{**check, "limit": 0.0, "passed": True}], "passed": True},
        {**gate, "epoch": 4, "checks": [{**check, "passed": None}]},
        {**gate, "gate": "G1", "epoch": 0, "checks": [], "passed": True},
        {"event": "stage", "seed": "a", "epoch": 3, "target": "BLENDING"},
    ]  # fmt: skip
    assert stage_bands(events, 9) == {"a": [(Stage.TRAINING, 1, 3), (Stage.BLENDING, 3, 9)]}
    assert points(events, "a", "ratio") == [(2, 0.5)]
    assert limits(events, "a", "blend_gain") == [(2, 4.0, "G2"), (3, 0.0, "G2")]
    assert [event["epoch"] for event in passes(events, "a")] == [3]
    assert json.dumps(events)
