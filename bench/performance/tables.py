"""The raw output of run.py as tables, of a GPU or of a CPU."""

import re
import statistics

OURS = "seedtriton"
# What the README shows of it; the raw output has the rest.
SHOWN = {
    "norm": ("",),  # every shape
    "clip 1": ("ResNet-50", "GPT-2", "1000 x 1K"),
    "clip below 1": ("ResNet-50", "GPT-2", "1000 x 1K"),
    "telemetry": ("ResNet-50", "GPT-2", "1000 x 1K", "200M + 2000 x 1K"),
    "step": ("transformer",),
}
TITLES = {
    "norm": "Norm of all gradients",
    "clip 1": "Clipping that leaves the gradients as they are (coefficient 1)",
    "clip below 1": "Clipping that bites (coefficient 0.5)",
    "telemetry": "Sums by segment, ratio, flags, row of the window, clip coefficient",
    "step": "A training step",
}


def markdown(record, name):
    """One table for each task: our time, and everybody's over ours."""
    head, gpu = record["header"], is_of_gpu(record)
    copy = statistics.median(one["copy_bytes_per_second"] for one in record["anchors"].values())
    said = (
        f"{head['device']}, torch {head['torch']}, commit {head['commit']}; a copy moves {copy / 1e9:.0f} GB/s, read "
        "plus written. Medians; all took turns in random order, from cold caches, and each was within its tolerance "
        f"of float64 before it was timed ([raw output](bench/results/{name}), "
        f"`{head['command']}`). "
    )
    said += (
        "Cells of others are theirs / ours, GPU time and then CPU time until the call returns; *w*: eager wall time, "
        "where a CUDA graph cannot hold it."
        if gpu
        else "Cells of others are theirs / ours, and in brackets their relative error."
    )
    lines = [said, *_left_out({part: cases for part, cases in record.get("left_out", {}).items() if cases})]
    for task in SHOWN:
        rows = [row for row in record["rows"] if row["task"] == task and _shown(row, task)]
        if rows:
            lines += ["", f"{TITLES[task]}:", "", *_table(rows, gpu)]
    if record["fits"]:
        lines += ["", "Growth of time, its exponent over the larger half of the sizes:", "", *_growth(record, gpu)]
    return "\n".join([*lines, "", *(f"![{text}](docs/{file})" for text, file in files_of(record))])


def _left_out(by_part):
    """What a run with --seconds did not begin."""
    counted = ", ".join(f"{len(cases)} of {part}" for part, cases in by_part.items())
    return ["", f"Cases left out for lack of time: {counted}."] if counted else []


# What makes a row the same in two files.
KEY = ("task", "shape", "dtype", "contender")
# What the docs show of the predictions; the raw file has every row of the GPU report.
PREDICTED = {
    "norm": ("ResNet-50", "GPT-2", "Llama-3-8B / 8", "1000 x 64", "200M + 2000 x 1K", "one 1B"),
    "telemetry": ("ResNet-50, 2", "GPT-2, 2 segments 100:1", "Llama-3-8B / 8", "1000 x 64"),
    "clip 1": ("ResNet-50", "GPT-2", "Llama-3-8B / 8"),
    "clip below 1": ("ResNet-50", "GPT-2", "Llama-3-8B / 8"),
}


def predictions(record, name, measured=None):
    """What the model of model.py says of a GPU, with the measured times beside it once there are any."""
    head, cards = record["header"], record["header"]["cards"]
    names = [card["name"] for card in cards]
    seen = {}
    if measured:
        seen = {tuple(row[key] for key in KEY): row["gpu_us_median"] for row in measured["rows"]}
    titles = [*names, *([f"{measured['header']['device']}, measured"] if measured else [])]
    lines = [
        f"Predictions of a model, not measurements, at commit {head['commit']} ([raw output](bench/results/{name}), "
        "[model.py](bench/performance/model.py)), committed before any GPU was seen. GPU µs of one call; in brackets, "
        "the time in which a copy is taken to move as many bytes as have to move, over it.",
        "",
        f"| task | gradients | dtype | {' | '.join(titles)} |",
        "|---" * (3 + len(titles)) + "|",
    ]
    for row in record["rows"]:
        shown = row["shape"].startswith(PREDICTED.get(row["task"], ("-",))) and row["dtype"] in ("fp32", "bf16")
        if row["contender"] == OURS and shown:
            times = [(row[card["name"]], row["bytes"] / card["bandwidth"] / card["copy"] * 1e6) for card in cards]
            cells = [f"{time:.0f} ({least / time:.0%})" for time, least in times]
            if measured:
                found = seen.get(tuple(row[key] for key in KEY))
                cells.append("-" if found is None else f"{found:.0f}")
            lines.append(f"| {row['task']} | {row['shape']} | {row['dtype']} | {' | '.join(cells)} |")
    lines += ["", "The worst case of every goal of [NOTES.md](bench/NOTES.md), theirs over ours, as predicted:", ""]
    lines += [f"| task | against | gradients | dtype | goal | {' | '.join(titles)} |", "|---" * (5 + len(titles)) + "|"]
    for goal in record["goals"]:
        what = [goal["task"], goal["peer"], ", ".join(goal["shapes"]), ", ".join(goal["dtypes"]), str(goal["goal"])]
        cells = [f"{goal[card]:.2f}" for card in names]
        if measured:
            found = reached(goal, measured)
            cells.append("-" if found is None else f"{found:.2f}" if found >= goal["goal"] else f"**{found:.2f}**")
        lines.append("| " + " | ".join([*what, *cells]) + " |")
    if measured:
        lines += ["", "In bold: missed. What was left out for lack of time is in no cell."]
    return "\n".join(lines)


def reached(goal, measured):
    """The worst ratio that was measured for a goal: theirs over ours, or the fraction of the copy; None: none was."""
    cases = {}
    for row in measured["rows"]:
        named = row["shape"].split(", ")[0] in goal["shapes"] and row["dtype"] in goal["dtypes"]
        if named and row["task"] == goal["task"]:
            cases.setdefault((row["shape"], row["dtype"]), {})[row["contender"]] = row
    if goal["peer"] == "copy":
        found = [each[OURS]["copy_bandwidth_fraction"] for each in cases.values()]
    else:
        found = [ratio(each[OURS], each[goal["peer"]])[0] for each in cases.values() if goal["peer"] in each]
    return min((one for one in found if one is not None), default=None)


def variants(record, name):
    """What the kernels could have been, as the change of GPU time against what they were."""
    head, cells, first = record["header"], {}, {}
    for row in record["rows"]:
        column = f"{row['shape'].split(', 2 segments')[0]} {row['dtype']}"
        taken = row["gpu_us_median"]
        if column not in first:
            first[column] = taken
            cells.setdefault(f"{row['contender']}, µs", {})[column] = "-" if taken is None else f"{taken:.1f}"
        elif taken and first[column]:
            cells.setdefault(row["contender"], {})[column] = f"{taken / first[column] - 1:+.1%}"
    lines = [
        f"{head['device']}, torch {head['torch']}, Triton {head['triton']}, commit {head['commit']}: GPU time of "
        f"`measure()` with one thing changed ([raw output](bench/results/{name}), `{head['command']}`).",
        "",
        f"| | {' | '.join(first)} |",
        "|---" * (1 + len(first)) + "|",
    ]
    for said, found in cells.items():
        lines.append(f"| {said} | " + " | ".join(found.get(column, "-") for column in first) + " |")
    return "\n".join(lines)


def is_of_gpu(record):
    """Whether it was measured on a GPU."""
    return record["header"].get("cuda") is not None


def _shown(row, task):
    return any(row["shape"].startswith(name) for name in SHOWN[task])


def _table(rows, gpu):
    cases = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))
    found = {(row["shape"], row["dtype"], row["contender"]): row for row in rows}
    # In the order of the list of contenders, and only those that somewhere have a time.
    base = OURS
    names = dict.fromkeys(row["contender"] for row in rows if row["wall_us_median"] and row["contender"] != base)
    own = ["GPU µs", "of copy", "CPU µs", "kernels / syncs / allocations"] if gpu else ["ms"]
    lines = ["| gradients | dtype | " + " | ".join([f"seedtriton {own[0]}", *own[1:], "error", *names]) + " |"]
    lines.append("|---" * (3 + len(own) + len(names)) + "|")
    for shape, dtype in cases:
        ours = found.get((shape, dtype, base))
        if ours is None or not ours["wall_us_median"]:
            said = ours["note"] if ours else "not run"
            lines.append(f"| {_name(shape, ours)} | {dtype} | {said} |" + " |" * (len(own) + len(names)))
            continue
        cells = [*_own(ours, gpu), f"{ours['rel_error']:.0e}"]
        cells += [_cell(ours, found.get((shape, dtype, name)), gpu) for name in names]
        lines.append(f"| {_name(shape, ours)} | {dtype} | " + " | ".join(cells) + " |")
    return lines


def _growth(record, gpu):
    """Exponents: 1 is time in proportion to size, 0 is none at all."""
    exponents = {
        (fit["axis"], fit["contender"]): fit["slope"]
        for fit in record["fits"]
        if fit["time"] == ("gpu_us_median" if gpu else "cpu_us_median") and fit["slope"] is not None
    }
    axes, names = (list(dict.fromkeys(key[place] for key in exponents)) for place in (0, 1))
    lines = ["| in the number of | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for axis in axes:
        cells = [f"{exponents[axis, name]:.2f}" if (axis, name) in exponents else "-" for name in names]
        lines.append(f"| {axis} | " + " | ".join(cells) + " |")
    return lines


def _name(shape, row):
    scale = re.search(r"scaled by ([\d.e-]+)", row["note"]) if row else None
    return shape + (f", scaled by {scale[1]}" if scale else "")


def _own(row, gpu):
    if not gpu:
        return [f"{row['wall_us_median'] / 1e3:.2f}"]
    cells = ["-" if row["gpu_us_median"] is None else f"{row['gpu_us_median']:.1f}"]
    cells.append("-" if row["copy_bandwidth_fraction"] is None else f"{row['copy_bandwidth_fraction']:.0%}")
    return [*cells, f"{row['cpu_us_median']:.0f}", f"{row['kernels']} / {row['syncs']} / {row['allocations']}"]


def ratio(ours, theirs):
    """(their time over ours, what was compared): GPU time if both have it, else eager wall time."""
    field = "gpu_us_median" if ours["gpu_us_median"] and theirs["gpu_us_median"] else "wall_us_median"
    if not theirs[field] or not ours[field]:
        return None, field
    return theirs[field] / ours[field], field


def _cell(ours, theirs, gpu):
    found, field = (None, "") if theirs is None else ratio(ours, theirs)
    if found is None:
        return "-"
    if not gpu:
        return f"{found:.2f} ({theirs['rel_error']:.0e})"
    wall = " w" if field == "wall_us_median" else ""
    return f"{found:.2f}{wall} / {theirs['cpu_us_median'] / ours['cpu_us_median']:.1f}"


def files_of(record):
    """What each picture shows, and its file."""
    kind = "gpu" if is_of_gpu(record) else "cpu"
    return [
        (f"Achieved bandwidth against size, {kind.upper()}", f"bandwidth-{kind}.png"),
        (f"Everybody's time over ours, {kind.upper()}", f"ratios-{kind}.png"),
    ]
