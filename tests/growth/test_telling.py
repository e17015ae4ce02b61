"""What a controller says of itself: in a terminal, in a notebook, as records; never by asking a device or a rank."""

import copy
import html.parser
import io
import json
import sys
import types

import pytest
import torch
from networks import Residual
from scripts import Script

from seedtriton import ConfigurationError, GradientMonitor, Stage
from seedtriton.growth.telling import Teller
from seedtriton.report import Summary, live
from seedtriton.report.history import COLUMNS, record_of


@pytest.fixture
def script():
    """One seed that has just been let into BLENDING, and one that is in no optimizer."""
    script = Script(total_epochs=10)
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    script.growth.germinate("late", Residual(6), add_to_optimizer=False)
    script.epochs(3)
    assert script.growth.slots["early"].stage is Stage.BLENDING
    return script


def test_a_new_controller_says_that_its_slots_are_empty():
    growth = Script().growth
    assert repr(growth) == "GrowthController(epoch 0, step 0)\n  early: DORMANT\n  late: DORMANT"
    assert "The slot is empty: growth.germinate('early', seed)" in growth.why("early")
    assert growth.history() == []
    assert growth.summary().rows[0] == {
        "slot": "early", "stage": "DORMANT", "alpha": None, "epochs": 0, "samples": None, "ratio": None, "t": None,
        "last verdict": None,
    }  # fmt: skip


def test_the_controller_says_stage_alpha_samples_and_last_verdict_of_every_slot(script):
    head, early, late = repr(script.growth).splitlines()
    assert head == "GrowthController(epoch 3, step 48)"
    assert early == "  early: BLENDING, alpha 0, 48 samples, G2 passed"
    assert late.startswith("  late: TRAINING, alpha 0, 48 samples, G2 refused: seed_in_no_optimizer, weights_not_moved")


def test_the_parts_say_what_they_know(script):
    growth = script.growth
    verdict = growth.advance("late")
    assert repr(verdict).startswith(
        "Verdict(G2 refused 'late' for BLENDING: seed_in_no_optimizer, weights_not_moved_0."
    )
    known = repr(growth.evidence()["late"])
    assert known.startswith("SeedEvidence('late', 48 samples, measured: ratio ")
    assert "t of the blend gain" in known
    assert known.endswith("displacement 0; in no optimizer)")
    lifecycle = growth.slots["early"].lifecycle
    assert repr(lifecycle) == "Lifecycle(BLENDING, 0 epochs there, 3 in all; G2 passed 'early' for BLENDING)"
    assert repr(growth.monitor) == "GradientMonitor(seeds=['early', 'late'], window=128, measured=48)"
    assert "BLENDING, alpha=0" in repr(growth.slots["early"])
    assert "never_measured" in repr(GradientMonitor(torch.nn.Linear(2, 2), {"a": torch.nn.Linear(2, 2)}).read()["a"])


def test_looking_asks_no_device_and_no_other_rank(script, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("it waited")

    for name in ("item", "tolist", "cpu", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    growth = script.growth
    monkeypatch.setattr(growth.monitor, "_pack", refuse)
    assert repr(growth)
    assert str(growth.summary())
    assert growth.why("late")
    assert growth.history()
    assert growth._repr_html_()
    assert repr(growth.monitor)
    assert repr(growth.slots["early"])


def test_the_summary_is_a_table_with_rich_and_without(script, monkeypatch):
    summary = script.growth.summary()
    assert summary.title == "Growth, epoch 3, step 48, 30% of the training"
    assert summary.rows[0]["samples"] == 48
    plain = summary.plain().splitlines()
    assert plain[0] == summary.title
    assert plain[1].split()[:3] == ["slot", "stage", "alpha"]
    assert len(plain) == 4
    pytest.importorskip("rich", reason="the table in a box needs rich")
    drawn = str(summary)
    assert "┃" in drawn
    assert all(word in drawn for word in ("early", "BLENDING", "G2 passed", "30%"))
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    assert str(summary) == summary.plain()


class Balanced(html.parser.HTMLParser):
    """Notes cells, and fails on a tag that is not closed in its turn."""

    def __init__(self):
        super().__init__()
        self.open, self.cells = [], []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] == "td":
            self.cells.append(data)


def test_a_notebook_shows_a_table_in_which_names_are_text(script):
    page = Balanced()
    page.feed(script.growth._repr_html_())
    assert page.open == []
    assert page.cells[:3] == ["early", "BLENDING", "0"]
    tricky = Summary("1 < 2", [{"slot": "<b>", "t": None}])
    page = Balanced()
    page.feed(tricky._repr_html_())
    assert page.cells == ["<b>", "-"]
    assert "1 &lt; 2" in tricky._repr_html_()
    assert "[b]" in str(Summary("", [{"slot": "[b]"}]))


def test_the_history_is_a_table_of_plain_values(script):
    records = script.growth.history()
    assert {tuple(record) for record in records} == {COLUMNS}
    kinds = {str, int, float, bool, type(None)}
    assert {type(value) for record in records for value in record.values()} <= kinds
    json.dumps(records, allow_nan=False)
    assert [r["stage"] for r in records if r["event"] == "stage" and r["slot"] == "early"] == ["TRAINING", "BLENDING"]
    epochs = [r for r in records if r["event"] == "epoch" and r["slot"] == "early"]
    assert [r["epoch"] for r in epochs] == [1, 2, 3]
    assert epochs[-1]["samples"] == 48
    assert epochs[-1]["accuracy"] > 0.2
    (passed,) = [r for r in records if r["gate"] == "G2" and r["passed"]]
    assert passed["slot"] == "early"
    assert [r["reason"] for r in records if r["gate"] == "G2" and r["slot"] == "late"][-1].startswith("seed_in_no_")
    records[0]["event"] = "mine"
    assert script.growth.history()[0]["event"] != "mine"


def test_what_is_no_number_is_none_in_the_history():
    assert record_of({"event": "epoch", "seed": None, "loss": float("nan")})["loss"] is None


def test_the_history_forgets_the_oldest_first(monkeypatch):
    monkeypatch.setattr("seedtriton.report.history.KEPT", 3)
    script = Script()
    script.epochs(5)
    assert [record["epoch"] for record in script.growth.history()] == [3, 4, 5]


def test_why_says_what_was_found_and_what_to_do(script):
    words = script.growth.why("late")
    assert words.startswith("late: TRAINING, alpha 0, 3 epochs there.")
    assert "of epoch 3: G2 refused the seed in 'late' for BLENDING, for these" in words
    assert "- seed_in_no_optimizer: parameters of the seed are in no optimizer" in words
    assert "What to do: Leave add_to_optimizer=True in germinate" in words
    assert script.growth.why("early").endswith("G2 let the seed in 'early' pass for BLENDING.")
    script.growth.prune("late", "it cannot learn", initiator="policy")
    script.epochs(3)
    assert script.growth.summary().rows[1]["last verdict"] is None, "the slot is empty"
    assert "Its last seed was pruned by policy: it cannot learn." in script.growth.why("late")
    with pytest.raises(ConfigurationError, match="no slot 'lat'"):
        script.growth.why("lat")


def test_why_warns_of_a_seed_that_replaces_the_host_though_it_passed():
    script = Script()
    script.growth.germinate("early", torch.nn.Linear(6, 6), probe=torch.randn(4, 6))
    words = script.growth.why("early")
    assert "G1 let the seed in 'early' pass" in words
    assert "What to do: Return x + f(x)" in words


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_live_table_is_drawn_in_a_terminal_and_nowhere_else(monkeypatch):
    pytest.importorskip("rich", reason="drawing in a terminal needs rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(live, "PERIOD", 0.0)
    script, screen, pipe = Script(), Terminal(), io.StringIO()
    script.growth.germinate("early", Residual(6))
    with script.growth.live(screen), script.growth.live(pipe):
        script.epochs(2)
    assert "epoch 1, step" in screen.getvalue()
    assert "epoch 2, step 32" in screen.getvalue()
    assert pipe.getvalue() == ""
    seen = len(screen.getvalue())
    script.epoch()
    assert len(screen.getvalue()) == seen, "it ends with its block"


def test_the_live_table_is_not_drawn_more_often_than_people_can_see(monkeypatch):
    pytest.importorskip("rich", reason="drawing in a terminal needs rich")
    monkeypatch.setattr(live, "monotonic", lambda: 7.0)
    calls, screen = [], Terminal()
    script = Script()
    table = live.LiveTable(lambda: calls.append(1) or script.growth.summary(), screen)
    with table:
        for _ in range(100):
            table.refresh()
    assert len(calls) == 3, "at the beginning, once in the time, and at the end"


def test_the_live_table_leaves_the_controller_as_it_was_when_the_loop_fails():
    script = Script()
    with pytest.raises(KeyError), script.growth.live(io.StringIO()):
        raise KeyError
    assert script.growth._position.told == []


class Gone(Terminal):
    """A terminal that is closed while the training runs."""

    closed_by_user = False

    def write(self, text):
        if self.closed_by_user:
            raise OSError("the terminal is gone")
        return super().write(text)


@pytest.mark.parametrize("broken", ["terminal", "table"])
def test_a_table_that_cannot_be_drawn_ends_and_the_training_goes_on(broken, monkeypatch, caplog):
    pytest.importorskip("rich", reason="drawing in a terminal needs rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(live, "PERIOD", 0.0)
    script, screen, out = Script(), Gone(), sys.stdout
    script.growth.germinate("early", Residual(6))
    with script.growth.live(screen):
        script.epoch()
        if broken == "terminal":
            screen.closed_by_user = True
        else:
            monkeypatch.setattr(Teller, "_row", lambda self, name: 1 / 0)
        script.epochs(2)
        assert sys.stdout is out, "what the script prints no longer goes through the table"
    assert script.growth.epoch == 3
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "growth.live() cannot draw, and has ended; training goes on"
    ]


def test_a_terminal_that_fails_from_the_beginning_is_no_error_either(monkeypatch, caplog):
    pytest.importorskip("rich", reason="drawing in a terminal needs rich")
    monkeypatch.setenv("TERM", "xterm")
    script, screen = Script(), Gone()
    screen.closed_by_user = True
    with script.growth.live(screen) as drawn:
        script.epoch()
    assert not drawn
    assert caplog.text.count("cannot draw") == 1


def test_a_copy_that_is_made_inside_the_block_does_not_draw(monkeypatch):
    pytest.importorskip("rich", reason="drawing in a terminal needs rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(live, "PERIOD", 0.0)
    script, screen = Script(), Terminal()
    script.growth.germinate("early", Residual(6))
    with script.growth.live(screen):
        twin = copy.deepcopy(script)
        seen = len(screen.getvalue())
        twin.epoch()
        assert len(screen.getvalue()) == seen
        script.epoch()
        assert len(screen.getvalue()) > seen


def test_the_block_says_whether_there_is_something_to_see(monkeypatch):
    pytest.importorskip("rich", reason="drawing in a terminal needs rich")
    monkeypatch.setenv("TERM", "xterm")
    growth = Script().growth
    for file in (Terminal(), io.StringIO()):
        with growth.live(file) as drawn:
            assert drawn is isinstance(file, Terminal)


def test_of_many_ranks_the_one_that_tells_draws(monkeypatch):
    pytest.importorskip("rich", reason="drawing in a terminal needs rich")
    monkeypatch.setenv("TERM", "xterm")
    for tells in (True, False):
        growth, screen = Script().growth, Terminal()
        monkeypatch.setattr(growth._wiring, "ranks", types.SimpleNamespace(tells=tells))
        with growth.live(screen) as drawn:
            pass
        assert drawn is tells
        assert bool(screen.getvalue()) is tells
