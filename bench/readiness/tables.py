"""The readiness benchmark's raw output as a table and as a picture."""

from bench.growth.tables import UNTUNED

JUDGES = ("original", "esper-lite", "G2 without probe", "G2, sum of losses alone", "G2")
WAITS = "probe_not_due"
DEAD = 1e-5  # ratios below it are all the same in the picture
HEADS = (
    "ratio >= 0.05", "RMS ratio >= 0.10 (esper-lite)", "G2, gradients alone", "G2, mean loss alone", "G2 with probe",
)  # fmt: skip


FIRST = "AdamW"  # the optimizer of the large table


def markdown(record, name, fresh=None, fresh_name="", new=None, new_name=""):
    """What was run, how often each judge was wrong, and about what.

    ``fresh`` is of random seeds not looked at, ``new`` of tasks not looked at.
    """
    runs, others = _by_optimizer(record["runs"])
    tasks, seeds = ({run[key] for run in runs} for key in ("task", "random_seed"))
    scenarios = {run["scenario"] for run in runs}
    ready = [run for run in runs if _judged(run) and run["verdicts"]["G2 with improvement"]["truth"] == "ready"]
    refused = sum(not run["verdicts"]["G2 with improvement"]["passed"] for run in ready)
    said = (
        f"{len(runs)} seeds: {len(scenarios)} scenarios, {len(tasks)} tasks, {len(seeds)} random seeds, one set of "
        f"limits, {FIRST}; torch {record['torch']} on a CPU "
        f"([raw output](bench/results/{name}), `python -m bench.readiness`). The truth is measured: what blending at "
        "alpha 0.1 and 1 does to the loss of samples that no gate has seen. *p*: let a seed pass that was not ready; "
        "*r*: refused one that was. Either is right within the noise, and for a seed that helps no more than it did "
        "before it was trained. Where measuring is broken, only a refusal is."
    )
    said_of_accuracy = (
        f"Asked as well for the rise of the accuracy by one point that the original gate had, ours would have refused "
        f"{refused} of {len(ready)} seeds that were ready."
    )
    lines = [said, "", table(runs), "", _said_of_units(record["runs"]), said_of_accuracy]
    if others:
        lines += ["", *_other_optimizers(others)]
    settled = "The limits were settled by looking at runs of those random seeds."
    if fresh is None:
        lines += ["", settled]
    else:
        again, others_again = _by_optimizer(fresh["runs"])
        counts = ", ".join(f"{head}: {_wrong(again, judge)}" for judge, head in zip(JUDGES, HEADS))
        for by, rest in others_again.items():
            counts += f"; of {len(rest)} by {by}, G2 with probe: {_wrong(rest, 'G2')}"
        lines += [
            "",
            f"{settled} On others, by the gate of commit {fresh['commit']}, {len(again)} runs by {FIRST} "
            f"([raw output](bench/results/{fresh_name})) had these wrong verdicts: {counts}.",
        ]
    lucky = [_lucky_refusals(_by_optimizer(one["runs"])[0]) for one in (record, fresh) if one is not None]
    lines += [
        "",
        "That luck is no readiness was decided when an earlier run had shown it. Counted as ready, it would add "
        f"{' and '.join(map(str, lucky))} refusals to G2 with probe.",
    ]
    if new is not None:
        lines += ["", *_untuned(new, new_name)]
    return "\n".join(lines)


def _said_of_units(runs):
    """How often the same loss written otherwise had another verdict, and when."""
    same = [run["verdicts"]["G2"] for run in runs], [run["verdicts"]["G2, 1000 loss + 100"] for run in runs]
    differ = sum((one["passed"], one["epoch"]) != (two["passed"], two["epoch"]) for one, two in zip(*same))
    return (
        f"The loss has no unit and no zero: with 1000 times each sample's loss plus 100 the verdict, or its epoch, was "
        f"another in {differ} of {len(runs)} seeds. *Mean loss alone* has only the sum over the validation set."
    )


def _untuned(record, name):
    """The same two tables of the tasks of new_tasks.py."""
    runs, others = _by_optimizer(record["runs"])
    tasks, seeds = ({run[key] for run in runs} for key in ("task", "random_seed"))
    lines = [
        f"The same {UNTUNED}: "
        f"{len(runs)} seeds, {len(tasks)} tasks, {len(seeds)} random seeds, {FIRST} "
        f"([raw output](bench/results/{name}), `python -m bench.readiness --tasks new`).",
        "",
        table(runs),
    ]
    return [*lines, "", *_other_optimizers(others)] if others else lines


def _by_optimizer(runs):
    """The runs of the first optimizer, which was the only one at first, and those of each of the others by its name."""
    named = [(run.get("optimizer", FIRST), run) for run in runs]
    found = {name: [run for by, run in named if by == name] for name in dict.fromkeys(by for by, _ in named)}
    return found.pop(FIRST, []), found


def _other_optimizers(others):
    """How often our gate was wrong under the other optimizers, and about what."""
    cells = [f"{name}: ready / not / either | G2 with probe | G2 says" for name in others]
    seeds = max(len({run["random_seed"] for run in runs}) for runs in others.values())
    lines = [
        f"The same by other optimizers, {seeds} random seeds each (SGD with momentum 0.9 at 0.02; the Muon of "
        "[bench/optimizers.py](bench/optimizers.py) at 0.01):",
        "",
        "| scenario | " + " | ".join(cells) + " |",
        "|---|" + "---|---|---|" * len(others),
    ]
    for scenario in dict.fromkeys(run["scenario"] for runs in others.values() for run in runs):
        rows = [[run for run in runs if run["scenario"] == scenario] for runs in others.values()]
        cells = [f"{_truths(one)} | {_wrong(one, 'G2')} | {_says(one)}" for one in rows]
        lines.append(f"| {scenario} | " + " | ".join(cells) + " |")
    totals = [f"{_truths(runs)} | **{_wrong(runs, 'G2')}** | of {len(runs)}" for runs in others.values()]
    return [*lines, "| **all** | " + " | ".join(totals) + " |"]


def _lucky_refusals(runs):
    """Seeds that G2 refused although blending them helps, as much as before they were trained."""
    found = [run["verdicts"]["G2"] for run in runs if _judged(run)]
    return sum(verdict["truth"] == "luck" and not verdict["passed"] for verdict in found)


def _judged(run):
    return run["kind"] != "broken measurement"


def table(results):
    """Wrong verdicts per scenario and judge, with the reason that our gate gave most often."""
    lines = [
        "| scenario | ready / not / either | " + " | ".join(HEADS) + " | G2 says |",
        "|---|---|" + "---|" * (len(HEADS) + 1),
    ]
    for scenario in dict.fromkeys(result["scenario"] for result in results):
        rows = [result for result in results if result["scenario"] == scenario]
        cells = [_wrong(rows, judge) for judge in JUDGES]
        lines.append(f"| {scenario} | {_truths(rows)} | " + " | ".join(cells) + f" | {_says(rows)} |")
    cells = [f"**{_wrong(results, judge)}**" for judge in JUDGES]
    lines.append(f"| **all {len(results)} runs** | {_truths(results)} | " + " | ".join(cells) + " | |")
    return "\n".join(lines)


def _truths(rows):
    rows = [row for row in rows if _judged(row)]
    if not rows:
        return "not measurable"
    found = [row["verdicts"]["G2"]["truth"] for row in rows]
    ready, not_ready = found.count("ready"), found.count("not ready")
    return f"{ready} / {not_ready} / {len(found) - ready - not_ready}"


def _wrong(rows, judge):
    """False passes and false refusals, as "2 p, 1 r"; "0" where there is none."""
    wrong = [row["verdicts"][judge] for row in rows if row["verdicts"][judge]["right"] == "wrong"]
    passes = sum(verdict["passed"] for verdict in wrong)
    parts = [f"{count} {kind}" for count, kind in ((passes, "p"), (len(wrong) - passes, "r")) if count]
    return ", ".join(parts) or "0"


def refused_for(epochs):
    """Why a seed was refused at the end of these epochs; while the gate waits for a probe, why at the last one."""
    asked = [row["refused_for"] for row in epochs if WAITS not in row["refused_for"]]
    return asked[-1] if asked else epochs[-1]["refused_for"]


def _says(rows):
    """How often it passed, else the planted cause if it was named, else the first reason."""
    passed = sum(row["verdicts"]["G2"]["passed"] for row in rows)
    refused = [row for row in rows if not row["verdicts"]["G2"]["passed"]]
    reasons = {}
    for row in refused:
        names = refused_for(row["epochs"][: row["verdicts"]["G2"]["epoch"]])
        reason = next((name for name in names if name in row["causes"]), names[0])
        reasons[reason] = reasons.get(reason, 0) + 1
    parts = [f"passes {passed}"] if passed else []
    parts += [f"`{name}` {count}" for name, count in sorted(reasons.items(), key=lambda item: -item[1])]
    return ", ".join(parts)


def picture(results, path):
    """What the bare ratio and the t statistic see of every run at the end, against what blending would do."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"ready": "#1b9e77", "not ready": "#d95f02", "within noise": "#999999", "luck": "#7570b3"}
    panels = (
        ("ratio", f"ratio of gradient norms, seed / host (below {DEAD:g} drawn there)", 0.05, {"value": "log"}),
        ("t", "t of the blend gain", 4.0, {"value": "symlog", "linthresh": 10}),
    )
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for axis, (field, label, limit, scale) in zip(axes, panels):
        for truth, colour in colours.items():
            points = [_point(result, field) for result in results if _judged(result)]
            chosen = [(x, y) for x, y, found in points if found == truth and x is not None and y is not None]
            axis.scatter(*zip(*chosen or [((), ())]), s=14, alpha=0.7, c=colour, label=truth, edgecolors="none")
        axis.axvline(limit, color="black", linewidth=1)
        axis.annotate(f"threshold {limit:g}", (limit, 0.02), xycoords=("data", "axes fraction"), fontsize=8)
        axis.set_xscale(**scale)
        axis.set_yscale("symlog", linthresh=1e-2)
        axis.axhline(0.0, color="black", linewidth=0.5)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("relative change of held-out loss at full blend")
    axes[0].legend(loc="upper left", fontsize=8)
    figure.suptitle(f"{len(results)} seeds at the end of their training behind the host; below zero blending helps")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _point(result, field):
    row = result["epochs"][-1]
    # A loss that was not finite stands as null in the raw output, and has no place in the picture.
    change = row["changes"][-1]
    x = row[field] if field == "t" or row[field] is None else max(row[field], DEAD)
    return x, None if change is None else change / abs(row["loss"]), row["truth"]
