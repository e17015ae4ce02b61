"""Lanes under the versions of torch and Triton that people have: python -m bench.versions [TORCH[+TRITON] ...].

Each pair has an environment of its own in .venv-versions/, made where it is missing: gigabytes, for most builds of
torch bring CUDA. Not in CI. The raw output is written after every pair, so that a run may be ended.
"""

import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import venv

from bench import machine

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv-versions"
# torch, and Triton where it is another one than torch's own.
PAIRS = ("2.6.0", "2.8.0", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.14.1+3.9.0")
# Tools for the lanes.
TOOLS = ("numpy", "pytest", "hypothesis", "setuptools")
# Before Triton 3.7, which came with torch 2.12, its interpreter does not run under numpy 2.4.
OLD_NUMPY, OLD_TRITON = "numpy<2.4", (3, 7)
LANES = {
    "unit": (
        ["tests/gradients/test_reference.py", "tests/gradients/test_backend.py", "tests/kernels/test_plan.py"],
        {},
    ),
    "interpreter": (
        ["tests/kernels/interpreter/test_interpreted_kernels.py", "-k", "counters or zero_size or mixed or scratch"],
        {"TRITON_INTERPRET": "1"},
    ),
    "launcher": (["tests/kernels/launcher"], {}),
}
ASK = """
import json, numpy, torch
from seedtriton.gradients import backend
print(json.dumps([torch.__version__, backend.triton_version() or (), numpy.__version__,
                  backend._triton_missing()]))
"""


def python_of(pair):
    """The interpreter of a pair's environment, which is made first if need be."""
    folder = ENVIRONMENTS / pair
    binary, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.exists():
        torch, _, triton = pair.partition("+")
        venv.create(folder, with_pip=True)
        install = [binary, "-m", "pip", "install", "-q"]
        subprocess.run([*install, f"torch=={torch}", *TOOLS], check=True)
        if triton:  # torch names its own, so not by its leave
            subprocess.run([*install, "--no-deps", f"triton=={triton}"], check=True)
        if asked(binary)[1] < OLD_TRITON:
            subprocess.run([*install, OLD_NUMPY], check=True)
        stamp.touch()
    return binary


def asked(binary):
    """Versions of torch, Triton (as numbers) and numpy in an environment, and why there are no kernels."""
    answer = subprocess.run([binary, "-c", ASK], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    torch, triton, numpy, refused = json.loads(answer)
    return torch, tuple(triton), numpy, refused


def run(binary, arguments, variables):
    """Counts of one lane: {"passed": 3, "failed": 1} and the names of what failed."""
    command = [binary, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **variables}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False).stdout
    lines = found.strip().splitlines()
    last = "".join(lines[-1:])
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    if not counts.get("passed"):
        counts.setdefault("failed", 1)  # nothing ran
    return {**counts, "names": [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]}


def tried(pair):
    """One row: versions, whether the kernels are used at all, and the lanes."""
    binary = python_of(pair)
    torch, numbers, numpy, refused = asked(binary)
    triton = ".".join(map(str, numbers))
    # Where the package itself chooses eager torch there is no kernel to interpret or to launch.
    lanes = {name: run(binary, *lane) for name, lane in LANES.items() if not refused or name == "unit"}
    versions = {"torch": torch, "triton": triton, "numpy": numpy}
    return {"pair": pair, **versions, "commit": machine.commit(), "refused": refused, "lanes": lanes}


def said(counts):
    """A lane in a table's cell."""
    if counts is None:
        return ""
    bad = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    return f"**{bad} failed**, {counts.get('passed', 0)} passed" if bad else f"{counts.get('passed', 0)} passed"


def markdown(record, name):
    """The table of docs/releasing.md."""
    lines = [
        f"Python {record['python']}, {record['machine']}, without a GPU, {record['date']}; "
        f"raw output: [{name}](bench/results/{name}).",
        "",
        "| torch | Triton | numpy | commit | kernels | unit | interpreter | launcher |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        kernels = f"eager torch: {row['refused']}" if row["refused"] else "used"
        cells = [said(row["lanes"].get(lane)) for lane in LANES]
        versions = [row.get(name) or "-" for name in ("torch", "triton", "numpy", "commit")]
        lines.append("| " + " | ".join([*versions, kernels, *cells]) + " |")
    return "\n".join(lines)


def main():
    today = datetime.date.today().isoformat()
    path = ROOT / "bench" / "results" / f"versions-{today}.json"
    rows = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    for pair in sys.argv[1:] or PAIRS:
        row = tried(pair)
        print({**row, "lanes": {name: said(counts) for name, counts in row["lanes"].items()}}, flush=True)
        rows = sorted([other for other in rows if other["pair"] != pair] + [row], key=_order)
        record = {
            "date": today,
            "python": platform.python_version(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
            "rows": rows,
        }
        path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def _order(row):
    return [tuple(map(int, re.findall(r"\d+", row[name])[:3])) for name in ("torch", "triton")]


if __name__ == "__main__":
    main()
