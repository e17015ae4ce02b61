"""What the README says is what the code does."""

import importlib.util
import pathlib
import re

import seedtriton
from seedtriton import Stage
from seedtriton.core.lifecycle import diagram

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_diagram_is_the_table_of_transitions():
    assert [block.strip() for block in blocks("mermaid")] == [diagram()]


def test_every_stage_is_in_the_table_and_no_other():
    rows = re.findall(r"^\| `([A-Z]+)` \|", README, flags=re.MULTILINE)
    assert rows == [str(stage) for stage in Stage]


def test_code_stands_within_the_first_ten_lines():
    assert any(line.startswith("```python") for line in README.splitlines()[:10])


def test_the_examples_in_the_readme_are_the_examples_in_the_folder():
    for block in blocks("python"):
        compile(block, "README.md", "exec")
    linked = re.findall(r"\(examples/(\w+\.py)\)", README)
    assert sorted(linked) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))
    assert len(linked) == 3


def test_every_public_name_is_explained():
    public = [name for name in vars(seedtriton) if name[0].isupper()]
    missing = [name for name in public if name not in README]
    assert not missing


def test_the_readmes_first_loop_runs():
    """Run the first block as it stands, on a small model."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    code = blocks("python")[0]
    model = nn.Sequential(nn.Linear(4, 4), seedtriton.SeedSlot(), nn.Linear(4, 2))
    data = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(3)]
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "Adapter": lambda width: nn.Linear(width, width),
        "width": 4,
        "slot_name": "1",
        "loader": data,
        "loss_of": lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        "validate": lambda: 0.5,
        "epochs": 2,
    }
    exec(compile(code, "README.md", "exec"), names)
    assert names["growth"].epoch == 2
    assert names["growth"].evidence()["1"].samples == 6


def test_the_figures_are_those_of_the_newest_raw_output():
    spec = importlib.util.spec_from_file_location("report", ROOT / "bench" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    assert report.with_tables(README) == README
    assert {"growth", "bench"} <= report.TABLES.keys()
