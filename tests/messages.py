"""Every message of every error and warning, read from the source: the list that Troubleshooting has in the site."""

from __future__ import annotations

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
ERRORS = ("ConfigurationError", "WiringError", "TransitionError", "StateDictError")
WARNINGS = "Warnings in the log"  # of the logger "seedtriton"


def words_of(node: ast.expr) -> str | None:
    """A string of the source as a reader meets it: what is filled in by its name, or as "…"; None: no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(words_of(part) or "" for part in node.values)
    if isinstance(node, ast.FormattedValue):
        name = getattr(node.value, "id", getattr(node.value, "attr", ""))
        return f"<{name}>" if len(name) > 2 else "…"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = words_of(node.left), words_of(node.right)
        return None if left is None or right is None else left + right
    return None


def kind_of(node: ast.AST) -> str | None:
    """The class of error that a call makes, or that it warns; None for every other node."""
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Name) and node.func.id in ERRORS:
        return node.func.id
    logs = isinstance(node.func, ast.Attribute) and node.func.attr in ("warning", "error", "exception")
    return WARNINGS if logs and isinstance(node.func.value, ast.Name) and node.func.value.id == "logger" else None


def messages() -> dict[str, dict[str, list[str]]]:
    """By class of error and file, the message of every place that makes one, in the order of the file; and warnings."""
    found: dict[str, dict[str, list[str]]] = {name: {} for name in (*ERRORS, WARNINGS)}
    for path in sorted((ROOT / "seedtriton").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            kind = kind_of(node)
            if kind is not None and node.args and (words := words_of(node.args[0])) is not None:
                place = path.relative_to(ROOT / "seedtriton").as_posix()
                words = re.sub(r"%[rsd]", "…", words) if kind == WARNINGS else words
                if len(re.findall(r"[A-Za-z]{2,}", re.sub(r"<\w+>", "", words))) > 2:  # else all of it is filled in
                    found[kind].setdefault(place, []).append(" ".join(words.split()))
    return found


def as_markdown() -> str:
    """Every message of every error, by the class and the file that raises it."""
    parts = []
    for name, places in messages().items():
        if places:
            parts.append(f"### {name}")
        for place, texts in places.items():
            parts.append(f"`{place}`\n\n" + "\n".join(f"- {escaped(text)}" for text in dict.fromkeys(texts)))
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Words of a message as Markdown shows them."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", text)
