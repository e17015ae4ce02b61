"""Scripts of a new user, who has read the documentation and nothing else, run as they stand."""

import ast
import json
import runpy
import warnings

import pytest
import torch
from written import ROOT, TEXT

from seedtriton import Stage

SCRIPTS = sorted((ROOT / "tests" / "new_user").glob("*.py"))


def ran(name, tmp_path, monkeypatch):
    """What a script has left in its names, run in an empty folder on one thread: two are slower on so little."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return runpy.run_path(str(ROOT / "tests" / "new_user" / f"{name}.py"))
    finally:
        torch.set_num_threads(threads)


def test_a_cnn_with_two_slots(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    names = ran("cnn_with_slots", tmp_path, monkeypatch)
    stages = {name: slot.stage for name, slot in names["growth"].slots.items()}
    assert stages["early"] is Stage.FOSSILIZED
    assert Stage.TRAINING <= stages["late"] <= Stage.FOSSILIZED
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text("utf-8").splitlines()]
    assert [event["event"] for event in lines] == [event["event"] for event in names["events"]]
    assert [event["seed"] for event in lines if event["event"] == "germinated"] == ["early", "late"]
    assert "G2 passed 'early' for BLENDING" in capsys.readouterr().out
    assert names["share"] > 0.6, "chance is 0.1"


def test_a_model_of_characters_with_lora_seeds(tmp_path, monkeypatch, capsys):
    names = ran("characters_with_lora", tmp_path, monkeypatch)
    growth, optimizer = names["growth"], names["optimizer"]
    assert growth.step == names["EPOCHS"] * names["STEPS"], "two parts make one step"
    assert all(slot.stage >= Stage.BLENDING for slot in growth.slots.values())
    assert names["copied"] == names["stages"]
    assert names["now"] < 3.0, "the uniform guess is at 4.85"
    # A seed's rate has its own peak, and the scheduler has brought all down together.
    peaks = [group["max_lr"] for group in optimizer.param_groups]
    assert peaks == [5e-3, 1e-2, 1e-2]
    assert all(group["lr"] < group["max_lr"] / 100 for group in optimizer.param_groups)
    assert capsys.readouterr().out.count("G1 passed") == 2


def test_a_gan_whose_generator_grows(tmp_path, monkeypatch, capsys):
    names = ran("gan", tmp_path, monkeypatch)
    growth = names["growth"]
    assert growth.slots["slot"].stage >= Stage.HOLDING
    assert growth.step == names["EPOCHS"] * names["STEPS"], "the discriminator's steps make no sample"
    assert "G2 passed 'slot' for BLENDING" in capsys.readouterr().out


def test_fine_tuning_with_a_monitor(tmp_path, monkeypatch, capsys):
    names = ran("fine_tuning", tmp_path, monkeypatch)
    first, second = names["first"], names["second"]
    assert (first.in_optimizer, first.displacement) == (False, 0.0)
    assert first.ratio > 0.05, "the ratio alone would have let it pass"
    assert second.in_optimizer
    assert second.displacement > 0.01
    assert second.optimizer_steps == second.samples == 40
    assert "adapter" in capsys.readouterr().out


def words_used(source):
    """What a script uses of seedtriton: names that it imports, attributes and arguments of its objects."""
    tree, found = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "seedtriton":
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {node.attr} if node.value.id in ("growth", "monitor", "first", "second", "reading") else set()
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("GrowthController", "GradientMonitor"):
            found |= {keyword.arg for keyword in node.keywords}
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_all_that_a_script_uses_is_explained_in_the_documentation(path):
    used = words_used(path.read_text("utf-8"))
    assert {word for word in used if word not in TEXT} == set()
    assert len(used) >= 6


def test_that_search_can_fail():
    assert words_used("from seedtriton import X\ngrowth.hidden()\nGrowthController(m, o, a=1)") == {"X", "hidden", "a"}
