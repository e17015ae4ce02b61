"""What README and docs/ have written: pages, their blocks of code, and what these take for granted."""

import pathlib
import re
from typing import NamedTuple

import torch
from torch import nn

import seedtriton

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
NEW_PROCESS = "a new process"
FRAGMENT = "fragment: "


class Block(NamedTuple):
    """One block of Python: where it stands, its code, and what the comment right above it says of it."""

    page: str
    section: str
    code: str
    note: str

    @property
    def runs(self) -> bool:
        return not self.note.startswith(FRAGMENT)


def blocks_of(page: pathlib.Path) -> list[Block]:
    """The blocks of Python of a page, in order."""
    found = []
    for part in re.split(r"^(?=## )", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        section = part.partition("\n")[0].lstrip("# ")
        for note, code in re.findall(r"(?:<!-- ([^\n]*) -->\n)?```python\n(.*?)```", part, flags=re.DOTALL):
            found.append(Block(page.name, section, code, note))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def blocks(language: str) -> list[str]:
    """The code of every block that runs in one process and without a client."""
    if language == "python":
        return [block.code for block in BLOCKS if block.runs]
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def run(code: str, names: dict) -> None:
    exec(compile(code, "docs", "exec"), names)


def names_of_a_script() -> dict:
    """What the loops take for granted: a small model with a Dropout behind its slot, an optimizer, data."""
    model = nn.Sequential(nn.Linear(4, 4), seedtriton.SeedSlot(), nn.Dropout(0.2), nn.Linear(4, 2))
    return {
        "torch": torch,
        "nn": nn,
        "GrowthController": seedtriton.GrowthController,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "scaler": torch.amp.GradScaler("cpu", init_scale=1024.0),
        "Adapter": lambda width: nn.Linear(width, width),
        "width": 4,
        "slot_name": "1",
        "loader": [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(3)],
        "loss_of": lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        "validate": lambda: 0.5,
        "epochs": 2,
        "max_norm": 0.05,
    }
