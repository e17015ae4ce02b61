"""Every block of Python in README and docs/ runs, or says why not; pages that the code writes are up to date."""

import dataclasses
import importlib.util
import re
import textwrap

import messages
import pages
import pytest
import torch
import yaml
from test_house import PUBLIC
from torch import nn
from written import BLOCKS, FRAGMENT, NEW_PROCESS, PAGES, ROOT, names_of_a_script, run

from seedtriton import (
    TRANSITIONS,
    GateThresholds,
    GradientMonitor,
    GrowthController,
    SeedSlot,
    SeedtritonError,
    Stage,
    lifecycle,
)
from seedtriton.core.advice import ADVICE
from seedtriton.testing import assert_isolated

# --- blocks of code ---

SECTIONS = list(dict.fromkeys((block.page, block.section) for block in BLOCKS if block.runs))


def a_batch(names, tmp_path):
    """One step of a loop, in which one is within."""
    names["batch"] = names["loader"][0]


def a_batch_in_parts(names, tmp_path):
    names["batch"] = names["loader"]


def a_step_function(names, tmp_path):
    def train_step(batch):
        names["loss_of"](batch).backward()
        names["growth"].measure()
        names["optimizer"].step()
        names["optimizer"].zero_grad()

    names |= {"train_step": train_step, "batches": names["loader"] * 4}


def a_gan(names, tmp_path):
    generator = nn.Sequential()
    for name, layer in {"first": nn.Linear(2, 4), "slot": SeedSlot(), "last": nn.Linear(4, 3)}.items():
        generator.add_module(name, layer)
    discriminator = nn.Linear(3, 1)
    names |= {
        "generator": generator,
        "discriminator": discriminator,
        "generator_optimizer": torch.optim.Adam(generator.parameters()),
        "discriminator_optimizer": torch.optim.Adam(discriminator.parameters()),
        "loader": [torch.randn(8, 3) for _ in range(3)],
        "noise": lambda: torch.randn(8, 2),
        "discriminator_loss": lambda real, fake: (fake - real).mean(),
        "generator_loss": lambda fake: -fake.mean(),
    }


def layers_without_a_slot(names, tmp_path):
    names["model"] = nn.Sequential()
    names["model"].add_module("layers", nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    names["optimizer"] = torch.optim.SGD(names["model"].parameters(), lr=0.1)


def a_file(names, tmp_path):
    names["path"] = tmp_path / "run.pt"


def weights_of_a_fossil(names, tmp_path):
    grown = names_of_a_script()
    grown["model"][1].germinate(nn.Linear(4, 4))
    grown["model"][1].set_alpha(1.0)
    names["saved"] = {"model": grown["model"].state_dict()}


def two_groups(names, tmp_path):
    model = names["model"]
    model.backbone, model.adapter = nn.Linear(4, 4), nn.Linear(4, 4)
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    names["loss"] = model.adapter(model.backbone(torch.randn(8, 4))).square().mean()


def one_measurement(names, tmp_path):
    names["loss_of"](names["loader"][0]).backward()
    names["growth"].measure()


# What a section takes for granted beyond ``names_of_a_script``; made anew for a block of a new process.
GIVEN = {
    "Clipping": a_batch,
    "Loss scaling (AMP)": a_batch,
    "Accumulation": a_batch_in_parts,
    "A test for your loop": a_step_function,
    "Several losses in one step (GAN)": a_gan,
    "Checkpoints: stop and resume": a_file,
    "Deployment": weights_of_a_fossil,
    "A model whose code is not yours": layers_without_a_slot,
    "Without slots": two_groups,
    "Which tensor": one_measurement,
}


def names_for(section, code, tmp_path):
    """A script in whose middle this code stands: with a controller and a seed, unless it makes its own."""
    torch.manual_seed(0)
    names = names_of_a_script()
    if "GrowthController(" not in code:
        names["growth"] = GrowthController(names["model"], names["optimizer"])
        if ".germinate(" not in code and "load_" not in code:
            names["growth"].germinate("1", nn.Linear(4, 4))
    if section in GIVEN:
        GIVEN[section](names, tmp_path)
    return names


@pytest.mark.parametrize("page, section", SECTIONS, ids=lambda text: text)
def test_the_blocks_of_a_section_run_one_after_the_other(page, section, tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = [block for block in BLOCKS if (block.page, block.section) == (page, section) and block.runs]
    try:
        names = None
        for block in found:
            if names is None or block.note == NEW_PROCESS:
                names = names_for(section, block.code, tmp_path)
            run(block.code, names)
    finally:
        torch.set_num_threads(threads)
    code = "".join(block.code for block in found)
    if "growth." in code and ".backward()" in code and "optimizer.step()" in code:
        measured = [known.samples for known in names["growth"].evidence().values()]
        stages = [slot.stage for slot in names["growth"].slots.values()]
        assert all(samples > 0 for samples in measured), "a loop that measures nothing"
        assert measured or Stage.FOSSILIZED in stages
    if shown := shown_in(page, section):
        assert_printed(shown, capsys.readouterr().out)


def shown_in(page, section):
    """The lines that a section shows of what its script prints."""
    [text] = [path.read_text("utf-8") for path in PAGES if path.name == page]
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    [part] = [part for part in parts if part.partition("\n")[0].lstrip("# ") == section]
    return re.findall(r"^```\n(epoch 1:.*?)```", part, flags=re.DOTALL | re.MULTILINE)


def assert_printed(shown, printed):
    """Each line that is shown was printed, but for its numbers and what follows "..."."""
    number = r"-?\b\d+\.\d+"
    lines = [re.sub(number, "#", line) for line in printed.splitlines()]
    wanted = [re.sub(number, "#", line).removesuffix(" ...") for block in shown for line in block.splitlines()]
    assert [line for line in wanted if not any(other.startswith(line) for other in lines)] == []


def test_the_quickstart_shows_what_its_first_script_prints():
    sections = [section for page, section in SECTIONS if page == "quickstart.md"]
    assert [bool(shown_in("quickstart.md", section)) for section in sections] == [True, False, False]
    with pytest.raises(AssertionError):
        assert_printed(["epoch 1: G2 passed 'slot' ...\n"], "epoch 1: G2 refused 'slot' for BLENDING")
    assert_printed(["epoch 1: t 4.2 passed ...\n"], "epoch 1: t -17.03 passed and more")


@pytest.mark.parametrize("section", ["Averages of the weights (EMA)", "Several losses in one step (GAN)"])
def test_the_loops_of_recipes_leave_the_host_as_it_would_be_without_the_seed(section, tmp_path):
    [block] = [block for block in BLOCKS if (block.page, block.section) == ("recipes.md", section)]
    loop = re.compile(r"(.*?)^for (\w+) in loader:\n(.*)", re.DOTALL | re.MULTILINE)
    setup, variable, body = loop.fullmatch(block.code).groups()
    names = names_for(section, block.code, tmp_path)
    run(setup, names)
    step, data = textwrap.dedent(body), names["loader"]
    others = [names[name] for name in ("ema", "discriminator", "discriminator_optimizer") if name in names]
    assert_isolated(lambda i: run(step, names | {variable: data[i % 3]}), names["growth"], *others)


def test_sections_that_are_given_something_exist_and_run():
    assert {section for _, section in SECTIONS} >= GIVEN.keys()
    assert len(SECTIONS) > 15


def test_a_block_that_does_not_run_says_why():
    fragments = [block for block in BLOCKS if not block.runs]
    assert all(len(block.note) > len(FRAGMENT) + 20 for block in fragments)
    assert {block.page for block in fragments} <= {"clients.md", "many-gpus.md", "recipes.md"}
    assert sum(block.page == "recipes.md" for block in fragments) == 1
    for block in fragments:
        compile(block.code, block.page, "exec")


def test_every_block_of_python_is_found():
    fences = [re.findall(r"^ *```(?:python|py)\b", page.read_text("utf-8"), flags=re.MULTILINE) for page in PAGES]
    assert sum(map(len, fences)) == len(BLOCKS)
    assert all(block.note in ("", NEW_PROCESS) or block.note.startswith(FRAGMENT) for block in BLOCKS)


# --- likely mistakes ---

TROUBLES = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
TABLE = TROUBLES.partition("## Likely mistakes")[2].partition("## Refusals")[0]
MISTAKES = re.findall(r"^\| (.*?) \| (.*?) \| .*? ?\|$", TABLE, flags=re.MULTILINE)[1:]
CODE = re.compile("`([^`]*)`")
RAISED = [(CODE.fullmatch(left)[1], CODE.fullmatch(right)[1]) for left, right in MISTAKES
          if CODE.fullmatch(left) and CODE.fullmatch(right)]  # fmt: skip


class Adapter(nn.Module):
    """A seed of a width that has to be told."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return x + self.layer(x)


@pytest.mark.parametrize("written, said", RAISED, ids=lambda text: text[:40])
def test_a_mistake_says_what_the_page_says(written, said, tmp_path):
    names = names_for("", "load_" if ".germinate(" in written else written, tmp_path)
    names |= {"Adapter": Adapter, "adapter": nn.Linear(4, 4), "GradientMonitor": GradientMonitor}
    with pytest.raises(SeedtritonError) as raised:
        run(written, names)
    words = ".*".join(map(re.escape, said.split("…")))
    assert re.search(words, str(raised.value)), raised.value


def test_what_no_error_says_is_worded_in_the_code_as_on_the_page():
    others = [said for written, said in MISTAKES if (written[1:-1], said[1:-1]) not in RAISED]
    quoted = [words for said in others for words in CODE.findall(said)]
    source = " ".join(path.read_text("utf-8") for path in (ROOT / "seedtriton").rglob("*.py"))
    source = re.sub(r'"\s+f?"', "", source)  # a string that goes over two lines
    assert len(RAISED) >= 8
    assert len(quoted) >= 5
    heads = [words.partition(":")[0].partition("'")[0] for words in quoted]
    assert [head for head in heads if head not in source] == []


# --- pages that the code writes ---


@pytest.mark.parametrize("page", pages.PAGES)
def test_what_the_code_writes_into_a_page_is_up_to_date(page):
    text = (ROOT / page).read_text("utf-8")
    assert pages.with_blocks(page, text) == text, "python tests/pages.py --write"


def test_every_limit_is_explained_with_its_default():
    table = pages.limits()
    for item in dataclasses.fields(GateThresholds):
        assert re.search(rf"^\| `{item.name}` \| .+ \| .{{15,}} \|$", table, flags=re.MULTILINE), item.name
    assert table.count("\n") == len(dataclasses.fields(GateThresholds)) + 1
    assert "| `min_samples` | `32` |" in table


def test_every_refusal_is_explained():
    table = pages.refusals()
    for name, known in ADVICE.items():
        assert f"| `{name}` | " in table
        assert known.cause.split()[0] in table
    assert table.count("\n") == len(ADVICE) + 1


@pytest.mark.parametrize(
    "text, marked",
    [
        ("Call growth.measure() in every step.", "Call `growth.measure()` in every step."),
        ("return x + f(x).", "return `x + f(x)`."),
        ("Model(..., a=...) or total_steps=....", "`Model(..., a=...)` or `total_steps=...`."),
        ("(on_harm=\"fade\"); wait", "(`on_harm=\"fade\"`); wait"),
        ("growth.optimizer.param_groups[-1]; a|b", "`growth.optimizer.param_groups[-1]`; a\\|b"),
        ("Train on; the gate (frozen) asks e.g. again.", "Train on; the gate (frozen) asks e.g. again."),
    ],
)
def test_calls_and_names_are_set_as_code(text, marked):
    assert pages.plain(text) == marked


def test_every_question_with_a_limit_names_it():
    table = pages.questions()
    switching = {item.name for item in dataclasses.fields(GateThresholds)} - {"ratio"}
    never_a_switch = {"min_probed_gain_t", "max_loss_rise", "max_pace", "harm_epochs", "lasting_harm_epochs"}
    assert switching - {*re.findall(r"\(`(\w+)`\)", table)} == never_a_switch
    assert [line[2:4] for line in table.splitlines()[2:]] == ["G0", "G1", "G2", "G3", "G5"]


def test_messages_are_read_as_a_reader_meets_them(tmp_path):
    found = messages.messages()
    assert "the model has no slot <slot>; its slots are …" in found["ConfigurationError"]["growth/wiring.py"] or any(
        "has no slot" in text for text in found["ConfigurationError"]["growth/wiring.py"]
    )
    assert sum(len(texts) for places in found.values() for texts in places.values()) > 250
    assert found.keys() == {"ConfigurationError", "WiringError", "TransitionError", "StateDictError", messages.WARNINGS}
    assert "telemetry sink … works again; it lost … events" in found[messages.WARNINGS]["report/sinks.py"]
    assert sum(map(len, found[messages.WARNINGS].values())) > 8
    assert not [text for places in found.values() for texts in places.values() for text in texts if len(text) < 12]
    shown = messages.as_markdown()
    assert "### WiringError" in shown
    assert "- cannot move" not in shown, "TransitionError words its message itself"
    assert messages.escaped("a_b <x> [1]") == r"a\_b \<x\> \[1\]"


# --- the site ---


SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))


def test_the_site_is_strict_and_needs_no_network():
    assert SITE["strict"] is True
    assert SITE["theme"]["font"] is False
    assert set(SITE["validation"].values()) == {"warn"}
    assert "http" not in (ROOT / "mkdocs.yml").read_text("utf-8")


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "html, count",
    [
        ('<script src="https://elsewhere/x.js"></script>', 1),
        ('<link rel="stylesheet" href="//elsewhere/x.css">', 1),
        ('<img alt="x" src=http://elsewhere/x.png>', 1),
        ('<script src="assets/x.js"></script><img src="growth.png"><link href="../x.css">', 0),
        ('<a href="https://elsewhere/">a link that a reader may follow</a>', 0),
    ],
)
def test_what_a_browser_would_fetch_from_elsewhere_is_found(hooks, html, count):
    assert len(hooks.FETCHED.findall(html)) == count


def test_a_link_out_of_the_folder_leads_to_a_copy_in_the_site(hooks):
    text = f"[a](../examples/ddp.py) and [b](quickstart.md)\n{hooks.ERRORS}\n"
    shown = hooks.on_page_markdown(text, None, None, None)
    assert "[a](examples/ddp.py) and [b](quickstart.md)" in shown
    assert "### WiringError" in shown
    assert hooks.ERRORS in (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")


def test_every_stage_and_every_move_is_drawn(hooks):
    picture = hooks.on_page_markdown(f"```mermaid\n{lifecycle.diagram()}\n```\n", None, None, None)
    assert picture.startswith("<div><svg ")
    assert picture.count("<line ") == sum(map(len, TRANSITIONS.values()))
    assert {*re.findall(r">([A-Z]+)</text>", picture)} == {stage.name for stage in Stage}
    # From the right edge of the first box to the left edge of the next, at the height of both.
    assert hooks.arrow("DORMANT", "GERMINATED", 0) == (128.0, 40.0, 172.0, 40.0)
    assert hooks.arrow("RESETTING", "DORMANT", 0) == (75.0, 133.0, 75.0, 57.0)
    there, back = hooks.arrow("BLENDING", "HOLDING", 8), hooks.arrow("HOLDING", "BLENDING", 8)
    assert there[1] - back[1] == 16.0, "two arrows between two boxes lie apart"


def test_every_page_is_in_the_menu():
    def listed(entries):
        for entry in entries:
            for target in entry.values():
                yield from listed(target) if isinstance(target, list) else [target]

    assert sorted(listed(SITE["nav"])) == sorted(page.name for page in PAGES if page.parent == ROOT / "docs")


def test_every_public_name_is_on_the_page_of_the_api():
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    listed = re.findall(r"^::: ([\w.]+)", text, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    shown = {name.rpartition(".")[2] for name in listed} | {*re.findall(r"`(?:[\w.]*\.)?(\w+)`", text)}
    modules = {"ops", "telemetry"}  # what is in them is listed
    assert {name for names in PUBLIC.values() for name in names.split()} - shown - modules == set()
