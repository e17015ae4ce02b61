"""The page of a run: whole by itself, right, and with names as text. It is parsed as XML, which forgives nothing."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from networks import Residual
from scripts import Script

from seedtriton import ConfigurationError, Stage
from seedtriton.cli import main
from seedtriton.report.page import page, write_page
from seedtriton.report.runs import read_events
from seedtriton.report.sinks import JsonLinesSink
from seedtriton.report.svg import Mark, Scale, Series, chart

TRICKY = "<script>alert('a & b')</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with a seed that is let in, and one that is in no optimizer and pruned."""
    folder = tmp_path_factory.mktemp("run")
    script = Script()
    script.growth.telemetry.sinks.append(JsonLinesSink(folder / "events.jsonl"))
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    script.growth.germinate("late", Residual(6), add_to_optimizer=False)
    script.epochs(4)
    script.growth.prune("late", TRICKY)
    script.epoch()
    assert script.growth.slots["early"].stage is Stage.BLENDING
    return folder


@pytest.fixture
def tree(folder):
    return ElementTree.fromstring(page(read_events(folder / "events.jsonl"), "A run of <mine>"))


def words(element):
    return " ".join("".join(element.itertext()).split())


def section(tree, title):
    """The elements between one heading of the second rank and the next."""
    body = list(tree.find("body"))
    begin = next(i for i, element in enumerate(body) if element.tag == "h2" and element.text == title)
    after = [i for i, element in enumerate(body) if element.tag == "h2" and i > begin]
    return body[begin + 1 : after[0] if after else None]


def test_it_needs_nothing_from_elsewhere(folder):
    text = page(read_events(folder / "events.jsonl"), "A run")
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<img|<iframe|\bon\w+=", text)
    assert not re.search(r"\b(src|href|srcset)=", text)


def test_title_facts_and_lives(tree):
    assert tree.find("head/title").text == tree.find("body/h1").text == "A run of <mine>"
    assert words(tree.find("body/p")) == "5 epochs, 80 optimizer steps, 2 seeds"
    drawing, told = section(tree, "Lives")
    stretches = [(rect.get("class"), rect.find("title").text) for rect in drawing.iter("rect")]
    assert ("training", "TRAINING, epochs 0 to 3") in stretches
    assert ("blending", "BLENDING, epochs 3 to 5") in stretches
    assert ("training", "TRAINING, epochs 0 to 4") in stretches
    assert [text.text for text in drawing.iter("text")][:1] == ["early"]
    assert f"late: pruned, {TRICKY}" in words(told), "names and reasons are text"


def test_curves_are_those_of_the_events_and_limits_those_of_the_verdicts(tree, folder):
    events = read_events(folder / "events.jsonl")
    drawn = {element.get("aria-label"): element for element in section(tree, "Curves") if element.tag == "svg"}
    assert set(drawn) == {
        "t of the blend gain, and what the gates asked for", "Gradient ratio, seed / host", "Alpha",
        "Validation accuracy",
    }  # fmt: skip
    for svg, field in zip(drawn.values(), ("blend_gain_t", "ratio", "alpha")):
        curves = {line.find("title").text: line.get("points").split() for line in svg.iter("polyline")}
        for seed in ("early", "late"):
            known = [e for e in events if e["event"] == "epoch" and e["seed"] == seed and e[field] is not None]
            assert len(curves[seed]) == len(known), (field, seed)
    limits = [
        line.find("title").text for line in next(iter(drawn.values())).iter("line") if line.find("title") is not None
    ]
    assert "G2 asked late for at least 4" in limits
    (accuracy,) = drawn["Validation accuracy"].iter("polyline")
    heights = [float(point.split(",")[1]) for point in accuracy.get("points").split()]
    values = [event["accuracy"] for event in events if event["event"] == "epoch" and event["seed"] is None]
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert [heights[i] for i in order] == sorted(heights, reverse=True), "higher on the page is more"


def test_verdicts_have_their_reasons_and_what_to_do_and_repeated_ones_are_one_line(tree):
    headings = [element.text for element in section(tree, "Verdicts") if element.tag == "h3"]
    assert headings == ["early", "late"]
    body = [row for table in section(tree, "Verdicts") for row in table.iter("tr") if row.find("td") is not None]
    rows = [[words(cell) for cell in row.iter("td")] for row in body]
    assert ["3", "G2 passed", ""] in rows
    (late,) = [row for row in rows if row[0] == "3 to 4" and row[1] == "G2 refused"]
    assert "seed_in_no_optimizer: parameters of the seed are in no optimizer" in late[2]
    assert "Leave add_to_optimizer=True in germinate" in late[2]


def test_tensors_are_those_of_the_last_epoch_largest_first(tree):
    (table,) = section(tree, "Gradient tensors by norm")
    rows = [[words(cell) for cell in row.iter("td")] for row in table.iter("tr")][1:]
    assert {row[0] for row in rows} >= {"first.weight", "early.seed.expand.weight"}
    norms = [float(row[2]) for row in rows if row[2] != "-"]
    assert norms == sorted(norms, reverse=True)
    widths = [div.get("style") for div in table.iter("div")]
    assert widths[0] == "width: 100.0%"
    assert "epoch 5" in words(table.find("caption"))


def test_the_command_writes_it_beside_the_events_and_says_so(folder, tmp_path, capsys):
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'report.html'}\n"
    ElementTree.parse(folder / "report.html")
    elsewhere = tmp_path / "page.html"
    assert main(["report", str(folder / "events.jsonl"), str(elsewhere), "--title", "Mine"]) == 0
    assert ElementTree.parse(elsewhere).find("head/title").text == "Mine"
    for run, said in ((tmp_path, "No such file"), (folder / "report.html", "no event")):
        assert main(["report", str(run)]) == 2
        assert said in capsys.readouterr().err


def test_a_browser_shows_every_drawing_and_row_and_fetches_nothing(folder, tree):
    if importlib.util.find_spec("PyQt6.QtWebEngineWidgets" if importlib.util.find_spec("PyQt6") else "PyQt6") is None:
        pytest.skip("needs a browser, and none is there: pip install PyQt6 PyQt6-WebEngine has Chromium")
    path = write_page(folder, folder / "shown.html", "A run")
    script = pathlib.Path(__file__).with_name("browser.py")
    done = subprocess.run([sys.executable, script, path], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen == {
        "title": "A run", "drawings": len(list(tree.iter("svg"))), "curves": len(list(tree.iter("polyline"))),
        "rows": sum(row.find("td") is not None for row in tree.iter("tr")), "fetched": [], "wider": False, "said": [],
    }  # fmt: skip


def test_a_run_without_seeds_numbers_or_events(tmp_path):
    tree = ElementTree.fromstring(page([{"event": "epoch", "epoch": 1, "seed": None, "loss": None}], "empty"))
    assert "No seed has germinated." in words(tree)
    assert list(tree.iter("svg")) == []
    with pytest.raises(ConfigurationError, match="no events to tell of"):
        page([], "none")
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": "epoch", "epoch": 1}))
    assert write_page(tmp_path) == str(tmp_path / "report.html")


def test_a_scale_has_round_ticks_and_keeps_to_its_borders():
    assert Scale(0, 60, 0, 1).ticks() == [0, 20, 40, 60]
    assert Scale(0.01, 700, 0, 1, log=True).ticks() == [0.01, 0.1, 1, 10, 100, 1000]
    assert Scale(2, 2, 0, 1).at(2) == 0.5
    assert (Scale(0, 1, 10, 20).at(-5), Scale(0, 1, 10, 20).at(0.25), Scale(0, 1, 10, 20).at(9)) == (10, 12.5, 20)
    assert chart("none", [Series("a", "s0", [(1, float("nan"))])], 3, [Mark(0, 1, 1, "s0", "limit")]) == ""
    assert chart("log", [Series("a", "s0", [(1, 0.0), (2, 1.0)])], 3, log=True).count(",") == 1
