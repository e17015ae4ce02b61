"""What README and docs say is what the code does."""

import importlib.util
import re
import textwrap

import pytest
from written import BLOCKS, PAGES, ROOT, TEXT, blocks, names_of_a_script, run

import seedtriton
from seedtriton import Stage
from seedtriton.core.lifecycle import diagram
from seedtriton.testing import assert_isolated

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_diagram_is_the_table_of_transitions():
    assert [block.strip() for block in blocks("mermaid")] == [diagram()]


def test_every_stage_is_in_the_table_and_no_other():
    rows = re.findall(r"^\| `([A-Z]+)` \|", TEXT, flags=re.MULTILINE)
    assert rows == [str(stage) for stage in Stage]


def test_code_stands_within_the_first_ten_lines():
    assert any(line.startswith("```python") for line in README.splitlines()[:10])


def test_the_readme_is_read_in_one_go():
    assert README.count("\n") <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """To a file, and to a heading in it."""
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    assert links
    for link in links:
        target, _, heading = link.partition("#")
        path = (page.parent / target) if target else page
        assert path.exists(), link
        if heading:
            found = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in found], link


def test_the_examples_in_the_readme_are_the_examples_in_the_folder():
    for block in blocks("python"):
        compile(block, "README.md", "exec")
    linked = re.findall(r"\(examples/(\w+\.py)\)", README)
    assert sorted(linked) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))
    assert len(linked) == 5


def test_every_public_name_is_explained():
    public = [name for name in vars(seedtriton) if name[0].isupper()]
    missing = [name for name in public if name not in TEXT]
    assert not missing


def test_the_readmes_first_loop_runs():
    """Run the first block as it stands, on a small model."""
    names = names_of_a_script()
    run(blocks("python")[0], names)
    assert names["growth"].epoch == 2
    assert names["growth"].evidence()["1"].samples == 6


def test_the_readmes_list_of_tensors_runs(capsys):
    names = names_of_a_script()
    run(blocks("python")[0], names)
    capsys.readouterr()
    [block] = [block for block in blocks("python") if "in growth.monitor.tensors()" in block]
    run(block, names)
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == 3
    assert dict(names["model"].named_parameters()).keys() >= {*printed}


SETUP, LOOP = blocks("python")[0].split("for epoch in range(epochs):\n")
FIRST_STEP = textwrap.dedent(LOOP.partition("for batch in loader:\n")[2].partition("    for verdict in")[0])
CLIPPED = [block for block in blocks("python") if "clip_grad_norm_(max_norm)" in block]


def test_every_loop_with_a_seed_behind_its_host_is_among_those_that_are_checked():
    # tests/test_docs.py has those of EMA and GAN; whole scripts and the live table have the first one's.
    elsewhere = {"Averages of the weights (EMA)", "Several losses in one step (GAN)", "Seeing where the seeds are"}
    loops = [block for block in BLOCKS if block.runs and "growth.measure(" in block.code]
    loops = [block for block in loops if block.page != "quickstart.md" and block.section not in elsewhere]
    assert [block.code for block in loops] == [blocks("python")[0], *CLIPPED]
    assert ["unscale_" in block for block in CLIPPED] == [False, True, False]
    assert ["for part in batch" in block for block in CLIPPED] == [False, False, True]


def script_of(step):
    names = names_of_a_script()
    run(SETUP, names)
    data = names["loader"]
    whole = (lambda i: data) if "for part in batch" in step else (lambda i: data[i % 3])
    return names, lambda i: run(step, names | {"batch": whole(i)})


@pytest.mark.parametrize("step", [FIRST_STEP, *CLIPPED], ids=["first", "plain", "scaler", "accumulation"])
def test_the_readmes_loops_leave_the_host_as_it_would_be_without_the_seed(step):
    names, one_step = script_of(step)
    assert_isolated(one_step, names["growth"], names["scaler"])


@pytest.mark.parametrize("step", CLIPPED, ids=["plain", "scaler", "accumulation"])
def test_the_line_that_the_readme_replaces_couples_host_and_seed(step):
    ours, theirs = re.search(r"(growth\.clip.*?) +# instead of (.*)", step).groups()
    names, one_step = script_of(step.replace(ours, theirs))
    with pytest.raises(AssertionError, match="host and seed are clipped together"):
        assert_isolated(one_step, names["growth"], names["scaler"])


def test_the_readmes_call_of_the_check_runs_and_its_message_is_worded_as_shown():
    [block] = [block for block in blocks("python") if "import assert_isolated" in block]
    names, one_step = script_of(FIRST_STEP)
    run(block, names | {"batches": range(10), "train_step": one_step})
    ours, theirs = re.search(r"(growth\.clip.*?) +# instead of (.*)", CLIPPED[0]).groups()
    names, one_step = script_of(CLIPPED[0].replace(ours, theirs))
    with pytest.raises(AssertionError) as caught:
        run(block, names | {"batches": range(10), "train_step": one_step})
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
    [shown] = [text for language, text in fenced if not language and "after step" in text]
    number = r"\b[\d.]+\b"
    assert re.sub(number, "#", " ".join(shown.split())) == re.sub(number, "#", str(caught.value))


def test_the_figures_are_those_of_the_newest_raw_output():
    spec = importlib.util.spec_from_file_location("report", ROOT / "bench" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    for page in report.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert report.with_tables(page, text) == text
    assert {"growth", "bench", "parallel"} <= report.TABLES.keys()
