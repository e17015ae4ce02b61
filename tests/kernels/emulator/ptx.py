"""PTX as text -> functions of instructions. What the text holds beyond that is refused, never skipped."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Directives inside a function that change nothing here. Local memory, say, is not among them.
_HARMLESS = (".loc", ".reg", ".param", ".pragma", ".reqntid", ".maxntid", ".minnctapersm", ".maxnreg")
_HEADER = re.compile(
    r"\.(entry|func)\s*(?:\((?P<returns>[^)]*)\))?\s*(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)[^;{]*(?P<end>[;{])"
)
_PARAMETER = re.compile(r"\.param\s+\.([bsuf]\d+).*?([\w$]+)\s*(?:,|$)", re.DOTALL)


class UnknownInstruction(Exception):
    """Something in the PTX that the emulator has no meaning for."""


@dataclass(frozen=True)
class Instruction:
    """``@!%p1 ld.global.cg.b64 {%rd1}, [%rd2 + 8]`` -> predicate, negated, parts of the name, operands."""

    text: str
    predicate: str | None
    negated: bool
    parts: tuple[str, ...]
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Function:
    """One .func or .entry; ``parameters`` are (name, bits)."""

    name: str
    parameters: tuple[tuple[str, int], ...]
    body: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(text: str) -> dict[str, Function]:
    """All functions that have a body, by name."""
    text = re.sub(r"//[^\n]*", "", text)
    found = {}
    for header in _HEADER.finditer(text):
        if header["end"] == "{":
            parameters = tuple((name, int(kind[1:])) for kind, name in _PARAMETER.findall(header["parameters"]))
            body, labels = _body(text[header.end() :])
            found[header["name"]] = Function(header["name"], parameters, body, labels)
    return found


def _body(text: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    """What stands before the brace that closes the function; blocks inside it are of calls."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    depth, begun = 1, ""
    for line in map(str.strip, text.splitlines()):
        label = re.fullmatch(r"([\w$]+):", line)
        if line in ("{", "}") and not begun:
            depth += 1 if line == "{" else -1
            if not depth:
                return tuple(instructions), labels
        elif label:
            labels[label[1]] = len(instructions)
        elif line.startswith(".") and not begun:
            if line.split()[0].rstrip(";") not in _HARMLESS:
                raise UnknownInstruction(line)
        elif line:
            begun = f"{begun} {line}"
            if line.endswith(";"):
                instructions.append(_instruction(begun.strip(" ;")))
                begun = ""
    raise UnknownInstruction("a function without an end")


def _instruction(text: str) -> Instruction:
    guard, name, rest = re.fullmatch(r"(@!?%\w+)?\s*(\S+)\s*(.*)", text, re.DOTALL).groups()
    operands = tuple(part.strip() for part in re.split(r",(?![^{(\[]*[})\]])", rest)) if rest else ()
    return Instruction(text, guard and guard.strip("@!"), "!" in (guard or ""), tuple(name.split(".")), operands)


def listed(operand: str) -> list[str]:
    """``{ %r1, %r2 }`` or ``(param0)`` -> its parts; a bare operand is the only one."""
    inside = operand.strip("{}() ")
    return [part.strip() for part in inside.split(",")] if inside else []


def address(operand: str) -> tuple[str, int]:
    """``[ %rd1 + 16 ]`` -> register or symbol, and offset."""
    base, offset = re.fullmatch(r"\[\s*([\w%$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()
    return base, int(offset or "0", 0)
