"""Every example runs as a user would run it, and checks itself; and its step leaves the host alone."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest
import torch
from same import same

from seedtriton.testing import assert_isolated

# Those of several processes are run by tests/parallel/test_examples_of_ranks.py.
OF_RANKS = {"ddp", "fsdp2"}
EXAMPLES = sorted(
    path
    for path in (pathlib.Path(__file__).resolve().parent.parent / "examples").glob("*.py")
    if path.stem not in OF_RANKS
)

# By example, a batch for its step number i.
BATCHES = {
    "amp_accumulation": lambda example, i: torch.arange(1024, device=example.device).view(-1, 4, 16)[i],
    "compiled_step": lambda example, i: torch.arange(1024, device=example.device).view(-1, 64)[i],
}
# Those that have nothing behind their host, and why.
NOTHING_BEHIND = {"raw_loop": "two groups of parameters without a slot: the adapter is in the forward pass"}


def imported(name):
    path = next(path for path in EXAMPLES if path.stem == name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_examples():
    assert len(EXAMPLES) >= 3
    assert {path.stem for path in EXAMPLES} == BATCHES.keys() | NOTHING_BEHIND.keys()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path):
    result = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout


@pytest.mark.parametrize("name", BATCHES)
def test_its_step_leaves_the_host_as_it_would_be_without_the_seed(name):
    example = imported(name)
    others = [example.scaler] if hasattr(example, "scaler") else []
    assert_isolated(lambda i: example.step(BATCHES[name](example, i)), example.growth, *others)


@pytest.mark.parametrize("name", NOTHING_BEHIND)
def test_without_a_slot_measuring_changes_nothing(name, monkeypatch):
    ends = []
    for measures in (True, False):
        example = imported(name)
        assert not hasattr(example, "growth")
        if not measures:
            monkeypatch.setattr(example.monitor, "measure", lambda: None)
        for number in range(10):
            example.step(torch.arange(512).view(-1, 32)[number])
        ends.append([example.optimizer.state_dict(), *(p.detach() for p in example.adapter.parameters())])
    assert same(*ends)
