"""The growth benchmark's raw output as tables and as a picture."""

import math
import statistics

# Colour-blind safe (Okabe and Ito, two of Tol's), in the order in which strategies appear.
COLOURS = (
    "#999999", "#E69F00", "#D55E00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#000000", "#882255", "#44AA99",
    "#F0E442", "#332288",
)  # fmt: skip


def over(run, since="loss_at_germination"):
    """Worst validation loss while blending over an earlier one; None where nothing was blended."""
    worst = run["worst_while_blending"]
    return None if worst is None else worst / run[since]


CLOSE = 0.02  # of a final loss: two lives that end this close together end alike


def close_to(runs, ours, other):
    """How many lives end more than ``CLOSE`` above the same life by another strategy, and of how many.

    ``ours`` is a strategy, or some of the runs.
    """
    ends = {(run["task"], run["random_seed"]): run["final_loss"] for run in runs if run["strategy"] == other}
    chosen = [run for run in runs if run["strategy"] == ours] if isinstance(ours, str) else ours
    same = [(run, ends.get((run["task"], run["random_seed"]))) for run in chosen]
    pairs = [(run["final_loss"], end) for run, end in same if end is not None]
    return sum(not one <= two * (1 + CLOSE) for one, two in pairs), len(pairs)


def permanent(run):
    """Whether the seed of a life that the gates decided about is part of the host for good."""
    return run["ended"]["stage"] == "FOSSILIZED"


WORST = ("worst while blending\n/ at germination", over)
FINAL = ("final loss", lambda run: run["final_loss"])


FIRST = "AdamW"  # the optimizer of the large tables and of the picture


TUNED = "on five tasks with a host that is too small"
UNTUNED = (
    "on tasks that the limits and rules were never tuned on but for one, the converged regression "
    "([what they are](bench/new_tasks.py))"
)


def markdown(record, name, new=None, new_name=""):
    """How far the loss rose while blending, and where it ended: median and worst over the random seeds.

    Then the same in short for the other optimizers, and what the gates would know of the seeds behind the host;
    and all that once more for ``new``, the raw output of tasks that nothing was tuned on.
    """
    tables = _tables(record, name, "python -m bench.growth", TUNED)
    if new is None:
        return tables
    return "\n\n".join([tables, _tables(new, new_name, "python -m bench.growth --tasks new", UNTUNED)])


def _tables(record, name, command, tasks):
    head, optimizers = record["header"], dict.fromkeys(map(_optimizer, record["runs"]))
    runs = _sound(_of(record, FIRST))
    seeds = len({run["random_seed"] for run in runs})
    phases = head["phases"]
    said = (
        f"Validation loss {tasks}, median / worst of {seeds} random seeds; "
        f"{phases['training']} steps behind the host, {phases['ramp']['steps']} of blending, {phases['after']} more, "
        f"the same batches in every row; torch {head['torch']} on a CPU "
        f"([raw output](bench/results/{name}), `{command}`)."
    )
    if "gates" in head:
        said += f" Where the gates decide, of {head['gates']['date']}, commit {head['gates']['commit']}."
    safe = (
        "Highest loss while blending, as a multiple of the loss at germination; for no growth what the host alone "
        "did in the same steps:"
    )
    lines = [said, "", safe, "", *_table(runs, WORST[1], "{:.2f}"), "", "Loss in the end:", ""]
    lines += [*_table(runs, FINAL[1], "{:.3f}"), "", "The host improves while a seed trains. Of all runs:", ""]
    lines += _summary(runs)
    for optimizer in optimizers:
        if optimizer != FIRST:
            lines += ["", *_in_short(_of(record, optimizer), f"{optimizer} at {head['rates'][optimizer]}")]
    lines += ["", *_lives(record["runs"])]
    return "\n".join([*lines, "", *_behind(record["runs"])])


SABOTAGED = "sabotaged: "


def _lives(runs):
    """Single lives under the gates: against no growth and against chance, and what became of sabotaged seeds."""
    gated = [run for run in runs if run.get("ended")]
    if not gated:
        return []
    lines = [
        f"Single lives, by how many end more than {CLOSE:.0%} above another way; *chance* is blending at once with "
        "other first weights of the seed against itself:",
        "",
        "| optimizer, TRAINING by | above no growth | above blending at once | chance | permanent | faded out |",
        "|---|---|---|---|---|---|",
    ]
    for optimizer in _names(gated, "optimizer"):
        chosen = _of({"runs": runs}, optimizer)
        for strategy in _names(gated, "strategy"):
            found = [run for run in gated if (run["optimizer"], run["strategy"]) == (optimizer, strategy)]
            if not found or strategy.startswith(SABOTAGED):
                continue
            pairs = [(strategy, "no growth"), (strategy, "blending at once")]
            pairs.append(("blending at once, another seed", "blending at once"))
            counts = [close_to(chosen, *pair) for pair in pairs]
            cells = [f"{above} of {count}" if count else "-" for above, count in counts]
            ends = [sum(map(permanent, found)), sum(run["ended"]["stage"] == "PRUNED" for run in found)]
            lines.append(f"| {optimizer}, {strategy} | " + " | ".join([*cells, *map(str, ends)]) + " |")
    sabotaged = [run for run in gated if run["strategy"].startswith(SABOTAGED)]
    if sabotaged:
        lines += ["", "Sabotaged seeds under the gates with a probe:", ""]
        lines += [
            "| sabotage | lives | let into BLENDING | taken out, epochs later | permanent | and above no growth |",
            "|---|---|---|---|---|---|",
        ]
        for strategy in _names(sabotaged, "strategy"):
            found = [run for run in sabotaged if run["strategy"] == strategy]
            felt = sum(run["loss_before_blending"] is not None for run in found)
            later = [run["ended"]["epochs_felt"] for run in found if run["ended"]["epochs_felt"] is not None]
            out = sum(run["ended"]["stage"] == "PRUNED" for run in found)
            words = f"{out}, {min(later)} to {max(later)}" if later else str(out)
            kept = [run for run in found if permanent(run)]
            name, above = strategy.removeprefix(SABOTAGED), close_to(_of({"runs": runs}, FIRST), kept, "no growth")[0]
            # Of random labels no growth is another life, which nobody has run.
            cells = [name, len(found), felt, words, len(kept), "-" if name == "random labels" else above]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _of(record, optimizer):
    return [run for run in record["runs"] if _optimizer(run) == optimizer]


def _sound(runs):
    return [run for run in runs if not run["strategy"].startswith(SABOTAGED)]


def _optimizer(run):
    """Of the first raw output there was one only, and nobody looked behind the host."""
    return run.get("optimizer", FIRST)


def _in_short(runs, title):
    """Medians of both numbers in one table."""
    tasks, seeds = _names(runs, "task"), len({run["random_seed"] for run in runs})
    lines = [
        f"{title}, medians of {seeds}: highest loss while blending as a multiple of the loss at germination, loss in "
        "the end:",
        "",
        "| TRAINING by | " + " | ".join(task.replace("_", " ") for task in tasks) + " | ends below no growth |",
        "|---|" + "---|" * (len(tasks) + 1),
    ]
    for strategy in _names(runs, "strategy"):
        cells = []
        for task in tasks:
            worst, final = (_values(runs, task, strategy, value) for _, value in (WORST, FINAL))
            cells.append(f"{_median(worst, '{:.3g}')}, {_median(final, '{:.3g}')}")
        lines.append(f"| {strategy} | " + " | ".join(cells) + f" | {_below(runs, strategy)} |")
    return lines


def _behind(runs):
    """The rules behind the host at the end of TRAINING: t of the blend gain, and how far the weights went."""
    found = [run for run in runs if run.get("behind")]
    if not found:
        return []
    tasks, steps = _names(found, "task"), found[0]["behind"]["steps"]
    lines = [
        "At the end of TRAINING, median t of the blend gain and, in brackets, median gain; then the displacement of "
        f"the seeds' weights after {steps[0]} and {steps[-1]} steps, median and largest of all tasks:",
        "",
        "| optimizer, TRAINING by | "
        + " | ".join(task.replace("_", " ") for task in tasks)
        + f" | moved, {steps[0]} steps | moved, {steps[-1]} steps |",
        "|---|" + "---|" * (len(tasks) + 2),
    ]
    for optimizer in _names(found, "optimizer"):
        for strategy in _names(found, "strategy"):
            chosen = [run for run in found if (run["optimizer"], run["strategy"]) == (optimizer, strategy)]
            cells = []
            for task in tasks:
                of = [run["behind"] for run in chosen if run["task"] == task]
                t, gain = ([one[name][-1] for one in of if one[name][-1] is not None] for name in ("t", "gain"))
                cells.append(f"{_median(t, '{:.1f}')} ({_median(gain, '{:.2g}')})")
            for look in (0, -1):
                moved = [_finite(run["behind"]["displacement"][look]) for run in chosen]
                cells.append(f"{_median(moved, '{:.2g}')}, {max(moved, default=math.nan):.2g}")
            if chosen:
                lines.append(f"| {optimizer}, {strategy} | " + " | ".join(cells) + " |")
    return lines


def _finite(displacement):
    """Weights that are no number any more went furthest of all."""
    return math.inf if math.isnan(displacement) else displacement


def _median(values, form):
    return form.format(statistics.median(values)) if values else "-"


def _table(runs, value, form):
    tasks, strategies = _names(runs, "task"), _names(runs, "strategy")
    lines = [
        "| TRAINING by | " + " | ".join(task.replace("_", " ") for task in tasks) + " |",
        "|---|" + "---|" * len(tasks),
    ]
    for strategy in strategies:
        found = [_values(runs, task, strategy, value) for task in tasks]
        if any(found):
            cells = [f"{form} / {form}".format(statistics.median(one), max(one)) if one else "-" for one in found]
            lines.append(f"| {strategy} | " + " | ".join(cells) + " |")
    return lines


def _summary(runs):
    """Per strategy over all tasks: the largest rise once blending begins, and how often it ends below no growth."""
    lines = ["| TRAINING by | largest rise over the moment before blending | ends below no growth |", "|---|---|---|"]
    for strategy in _names(runs, "strategy"):
        found = [run for run in runs if run["strategy"] == strategy]
        blended = [over(run, "loss_before_blending") for run in found]
        rises = [times - 1 for times in blended if times is not None]
        rise = f"{max(rises):+.1%}" if rises else "-"
        lines.append(f"| {strategy} | {rise} | {_below(runs, strategy)} |")
    return lines


def _below(runs, strategy):
    """How many lives ended lower than the same host alone."""
    alone = {(run["task"], run["random_seed"]): run["final_loss"] for run in runs if run["strategy"] == "no growth"}
    found = [run for run in runs if run["strategy"] == strategy]
    lower = sum(run["final_loss"] < alone[run["task"], run["random_seed"]] for run in found)
    return "-" if strategy == "no growth" else f"{lower} of {len(found)}"


def _names(runs, key):
    return list(dict.fromkeys(run[key] for run in runs))


def _values(runs, task, strategy, value):
    chosen = (value(run) for run in runs if run["task"] == task and run["strategy"] == strategy)
    return [one for one in chosen if one is not None]


def figure(record, path):
    """One column per task; a dot per run and a line at the median. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = _sound(_of(record, FIRST))
    tasks, strategies = _names(runs, "task"), _names(runs, "strategy")
    plt.rcParams.update({"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False})
    panels, axes = plt.subplots(
        2, len(tasks), figsize=(2.6 * len(tasks) + 1.6, 7.2), sharey=True, squeeze=False, constrained_layout=True
    )
    for column, task in enumerate(tasks):
        for row, (label, value) in enumerate((WORST, FINAL)):
            panel = axes[row][column]
            for place, strategy in enumerate(strategies):
                _draw(panel, place, _values(runs, task, strategy, value), COLOURS[place % len(COLOURS)])
            panel.grid(axis="x", color="0.92")
            panel.set_axisbelow(True)
            panel.set_xlabel(label, fontsize=9.5)
        axes[0][column].axvline(1.0, color="0.35", lw=1, ls=":")
        axes[0][column].set_title(task.replace("_", " "), fontweight="bold")
    for row in axes:
        row[0].set_yticks(range(len(strategies)), strategies)
        for tick, strategy in zip(row[0].get_yticklabels(), strategies):
            if strategy == record["header"]["default"]:
                tick.set_fontweight("bold")
        for panel in row:
            panel.tick_params(axis="y", length=0)
    axes[0][0].invert_yaxis()  # shared: all of them
    _scale(axes[0])
    for panel in axes[1]:
        _scale([panel])
    panels.suptitle("What blending does to the host, and where growth ends (validation loss; left is better)")
    panels.savefig(path, dpi=110)
    plt.close(panels)


def _draw(panel, place, values, colour):
    if values:
        panel.scatter(values, [place] * len(values), s=26, color=colour, alpha=0.75, linewidths=0)
        panel.plot([statistics.median(values)] * 2, [place - 0.32, place + 0.32], color=colour, lw=2.5)


def _scale(panels):
    """The same range for all panels, logarithmic when it spans more than a factor of three; plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = (pick(panel.dataLim.intervalx[end] for panel in panels) for end, pick in ((0, min), (1, max)))
    for panel in panels:
        if high > 3 * low:
            panel.set_xscale("log")
            panel.set_xlim(low / 1.15, high * 1.15)
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,), numticks=6))
            panel.xaxis.set_minor_formatter(NullFormatter())
        else:
            panel.set_xlim(low - 0.06 * (high - low), high + 0.06 * (high - low))
            panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
