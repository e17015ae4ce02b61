"""The examples of several processes, as a user would run them."""

import pathlib
import subprocess
import sys

import pytest
from test_examples import OF_RANKS

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", sorted(OF_RANKS))
def test_example_runs(name, ranks):
    # Standalone: it takes a port that is free.
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(EXAMPLES / f"{name}.py")]
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("epoch")]
    assert any("G2 passed" in line for line in lines)
    assert "G5 passed '2' for FOSSILIZED" in lines[-1]
    # Once: the other rank has said nothing.
    assert len(lines) == len(set(lines))
