"""Every message of every error, read from the source: the list of Troubleshooting, written when the site is built."""

from __future__ import annotations

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
ERRORS = ("ConfigurationError", "WiringError", "TransitionError", "StateDictError")


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


def messages() -> dict[str, dict[str, list[str]]]:
    """By class of error and file, the message of every place that makes one, in the order of the file."""
    found: dict[str, dict[str, list[str]]] = {name: {} for name in ERRORS}
    for path in sorted((ROOT / "seedtriton").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS):
                continue
            if node.args and (words := words_of(node.args[0])) is not None:
                place = path.relative_to(ROOT / "seedtriton").as_posix()
                found[node.func.id].setdefault(place, []).append(" ".join(words.split()))
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
