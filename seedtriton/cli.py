"""``python -m seedtriton demo | doctor | plot | report``. What went wrong is said on stderr, with exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import __version__
from .core.errors import SeedtritonError
from .demo import run
from .demo_tasks import TASKS
from .doctor import doctor
from .report.events import Event
from .report.page import write_page
from .report.plots import check_path, lifecycle_figure
from .report.runs import read_events, runs_of

FAILED, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of these ``arguments``, those of the process unless told.

    Returns:
        0; 1 when the demo or the doctor found that something is not as it should be; 2 for an error, which is printed
        to stderr; 130 after Ctrl-C.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code = _run(options)
        sys.stdout.flush()  # here, where a closed pipe can still be caught
        return code
    except BrokenPipeError:
        # Whoever read has seen enough. Python flushes again at its end, and must find somebody there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (SeedtritonError, OSError, ImportError, ValueError) as error:
        print(f"{parser.prog} {options.command}: {_in_words(error)}", file=sys.stderr)
        return FAILED


def _run(options: argparse.Namespace) -> int:
    if options.command == "demo":
        return run(options.folder, options.seed, options.task)
    if options.command == "plot":
        check_path(options.picture)
        events = read_events(options.events)
        lifecycle_figure(events, options.picture, options.title, dark=options.dark)
        print(f"wrote {options.picture}{_of_runs(events)}")
        return 0
    if options.command == "report":
        print(f"wrote {write_page(options.run, options.page, options.title)}")
        return 0
    return doctor()


def _of_runs(events: list[Event]) -> str:
    count = len(runs_of(events))
    return "" if count == 1 else f", of the last of {count} runs in the file"


def _in_words(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{error}; pip install 'seedtriton[demo]' has what pictures and the demo need"
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.strerror}: {error.filename}"
    return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m seedtriton", description="Grow a network while it trains.")
    parser.add_argument("--version", action="version", version=f"seedtriton {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a host grows on real data; one of two seeds is sabotaged")
    demo.add_argument(
        "--task", choices=tuple(TASKS), default="digits",
        help="handwritten digits, or a language model of characters, without accuracy (default: %(default)s)",
    )  # fmt: skip
    demo.add_argument("--folder", default="runs/demo", help="where events and picture go (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    commands.add_parser("doctor", help="versions, device, backend and why; checks one operation against fp64")
    plot = commands.add_parser("plot", help="draw the life of the seeds from a file of events")
    plot.add_argument("events", help="JSON lines written by JsonLinesSink")
    plot.add_argument("picture", help="a .png, .svg or .pdf to write")
    plot.add_argument("--title", default="", help="above the picture")
    plot.add_argument("--dark", action="store_true", help="light on dark")
    report = commands.add_parser("report", help="write one HTML page of a run: lives, verdicts, curves, tensors")
    report.add_argument("run", help="a folder with an events.jsonl, or such a file")
    report.add_argument("page", nargs="?", help="where the page goes (default: report.html beside the events)")
    report.add_argument("--title", default="", help="of the page")
    return parser
