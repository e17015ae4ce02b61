"""What a result was measured with: the header of every raw output."""

import datetime
import os
import platform
import subprocess

import torch


def commit():
    """The commit that runs, with a plus behind it where files differ, but for raw output.

    A copy of the files without the repository is told by the variable BENCH_COMMIT.
    """
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    status = [*git, "status", "--porcelain", "-uno", "--", ":/", ":!/bench/results"]
    changed = subprocess.run(status, capture_output=True, text=True, check=False)
    return os.environ.get("BENCH_COMMIT") or head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def header(command):
    """Command, versions, commit and machine, as plain values."""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "commit": commit(),
    }
