"""What imports what in seedtriton/ and kernels/, whether it may, and the picture of it in CONTRIBUTING.md.

    python tests/house.py [--write]

prints the picture, or puts it into its place. The rule is the table below; tests/test_house.py applies it.
"""

from __future__ import annotations

import ast
import pathlib
import re
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "seedtriton"

# Wing: the wings that it may import. Nothing else is a wing, and nobody imports what is not in its line.
WINGS = {
    "core": (),
    "gradients": ("core",),
    "parallel": ("core", "gradients"),
    "report": ("core",),
    "growth": ("core", "gradients", "parallel", "report"),
    "integrations": ("core", "gradients", "parallel", "report", "growth"),
}
DOES = {
    "core": "decides", "gradients": "measures", "parallel": "many ranks", "report": "tells", "growth": "acts",
    "integrations": "meets clients", "kernels": "GPU code",
}  # fmt: skip
# Beside the standard library, at the top of a file; "kernels" and everything else that is large only inside functions.
OUTSIDE = {"core": set(), "gradients": {"torch"}, "parallel": {"torch"}, "report": set(), "growth": {"torch"}}
# Wings and files at the top that may import any library inside a function.
SHOWING = ("report", "integrations", "")
KERNELS_FOR = "gradients.ops"
# What a measurement is given, by name: for their annotations alone the kernels look up to it.
TYPES_FOR_KERNELS = "seedtriton.gradients.row."


class Import(NamedTuple):
    """One name that a file imports, in full; whether only when a function runs, and whether only for its types."""

    name: str
    inside: bool
    typing: bool


def imports(source: str, package: str) -> list[Import]:
    """Every import of a file in ``package``, "seedtriton.core" say; relative ones in full."""
    found: list[Import] = []

    def walk(node: ast.AST, inside: bool, typing: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend(Import(alias.name, inside, typing) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parts = package.split(".")
                    above = ".".join(parts[: len(parts) - child.level + 1])
                    base = f"{above}.{base}" if base else above
                # ``from .core import gates`` may name a module or something in it: both are looked up.
                found.extend(Import(f"{base}.{alias.name}", inside, typing) for alias in child.names)
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            types = isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"
            walk(child, inside or function, typing or types)

    walk(ast.parse(source), False, False)
    return found


def files() -> dict[str, pathlib.Path]:
    """Every module of seedtriton/ by its name below the package: "core.gates", "cli", "core" for an ``__init__``."""
    found = {}
    for path in sorted((ROOT / PACKAGE).glob("**/*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        if parts[0] != "kernels":
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def kernels() -> list[pathlib.Path]:
    """The files of kernels/."""
    return sorted((ROOT / "kernels").glob("*.py"))


def wing_of(module: str) -> str:
    """The wing of "core.gates" or "core"; "" for what lies at the top, and for the package itself."""
    first = module.partition(".")[0]
    return first if first in WINGS else ""


def package_of(module: str, is_init: bool) -> str:
    """The package against which the relative imports of a module are read."""
    parent = module if is_init else module.rpartition(".")[0]
    return f"{PACKAGE}.{parent}" if parent else PACKAGE


def violations(module: str, source: str, *, is_init: bool = False) -> list[str]:
    """The imports of a file of seedtriton/ that the rule does not allow, in words."""
    wing, bad = wing_of(module), []
    for name, inside, _ in imports(source, package_of(module, is_init)):
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if root in sys.stdlib_module_names:
            continue
        if root == PACKAGE and target == "kernels":
            fine = inside and module == KERNELS_FOR
        elif root == PACKAGE:
            # What lies at the top (the command line, the demo, the helpers for tests) stands above every wing.
            fine = not wing or target == wing or target in WINGS[wing]
        else:
            fine = root in OUTSIDE.get(wing, {"torch"}) or (inside and wing in SHOWING and root != "kernels")
        if not fine:
            bad.append(f"{module or PACKAGE} imports {name}")
    return bad


def kernel_violations(source: str) -> list[str]:
    """Kernels import torch, triton and each other, by the full name."""
    relative = [node.lineno for node in ast.walk(ast.parse(source)) if getattr(node, "level", 0)]
    if relative:
        return [f"a relative import in line {line}" for line in relative]
    return [
        name
        for name, _, typing in imports(source, f"{PACKAGE}.kernels")
        if name.partition(".")[0] not in {"torch", "triton", *sys.stdlib_module_names}
        and not (name + ".").startswith(f"{PACKAGE}.kernels.")
        and not (typing and name.startswith(TYPES_FOR_KERNELS))
    ]


def graph(modules: dict[str, pathlib.Path] | None = None) -> dict[str, set[str]]:
    """Module: the modules of seedtriton/ that it imports, wherever in the file."""
    modules = files() if modules is None else modules
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        found[module] = set()
        for name, *_ in imports(path.read_text("utf-8"), package_of(module, path.name == "__init__.py")):
            inner = name.removeprefix(f"{PACKAGE}.")
            while inner and inner != PACKAGE and inner not in modules:
                inner = inner.rpartition(".")[0]
            if name.startswith(f"{PACKAGE}.") and inner and inner != module:
                found[module].add(inner)
    return found


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; empty when there is none."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for following in sorted(arrows.get(module, ())):
                ring = search(following, [*path, module])
                if ring:
                    return ring
            done.add(module)
        return []

    return next(filter(None, (search(module, []) for module in sorted(arrows))), [])


def picture() -> str:
    """The house as a mermaid flowchart: a box per wing with its files, an arrow where one imports another."""
    modules = files()
    wings = [wing for wing in WINGS if wing in modules]
    lines = ["flowchart BT"]
    for wing in wings:
        rooms = " ".join(module.partition(".")[2] for module in modules if module.startswith(f"{wing}."))
        lines.append(f'    {wing}["<b>{wing}</b>: {DOES[wing]}<br/>{rooms}"]')
    lines.append(f'    kernels["<b>kernels</b>: {DOES["kernels"]}<br/>{" ".join(path.stem for path in kernels())}"]')
    arrows = {(wing_of(a), wing_of(b)) for a, targets in graph(modules).items() for b in targets}
    for wing in sorted(wings):
        below = sorted(b for a, b in arrows if a == wing and b and b != wing)
        lines += [f"    {wing} --> {' & '.join(below)}"] if below else []
    lines.append("    gradients -. inside functions of ops .-> kernels")
    return "\n".join(lines)


MARKS = "<!-- house: generated by tests/house.py -->\n```mermaid\n", "\n```\n<!-- end of house -->"
BLOCK = re.compile(f"(?<={MARKS[0]}).*?(?={MARKS[1]})", re.DOTALL)


def with_picture(text: str) -> str:
    """CONTRIBUTING.md with the picture of the house as it is."""
    return BLOCK.sub(lambda _: picture(), text)


def main() -> None:
    """Print the picture, or write it into CONTRIBUTING.md."""
    path = ROOT / "CONTRIBUTING.md"
    if sys.argv[1:] == ["--write"]:
        path.write_text(with_picture(path.read_text("utf-8")), "utf-8")
    else:
        print(picture())


if __name__ == "__main__":
    main()
