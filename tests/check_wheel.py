"""Build sdist -> wheel, install it into an empty environment and import it there, every wing and the kernels included.

A wheel without kernels builds green with most build recipes; only importing the installed one tells.
Exits with 1 and says why when anything is missing.
"""

import pathlib
import subprocess
import sys
import tempfile
import venv

import house

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHECK = """
import importlib.util, pathlib, sys
import seedtriton
import torch
place = pathlib.Path(seedtriton.__file__).resolve()
assert "site-packages" in place.parts and str(place).startswith(sys.prefix), f"imported from {place}"
assert "triton" not in sys.modules, "importing seedtriton imported triton"
assert (place.parent / "py.typed").is_file(), "py.typed is missing"
kernels = place.parent / "kernels"
assert not kernels.is_symlink(), "kernels is a link in the wheel"
for name in KERNELS:
    assert (kernels / name).is_file(), f"{name} is missing from the wheel"
    importlib.import_module(f"seedtriton.kernels.{name[:-3]}")
for name in MODULES:
    module = importlib.import_module(f"seedtriton.{name}")
    assert pathlib.Path(module.__file__).is_relative_to(place.parent), f"{name} was imported from {module.__file__}"
print("wheel ok:", place.parent.name, seedtriton.__version__, "with", len(MODULES), "modules and", *KERNELS)
"""


def run(*command: str, **options) -> None:
    subprocess.run(command, check=True, **options)


def main() -> None:
    kernels = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
    modules = sorted(name for name in house.files() if name and name != "__main__")
    if not kernels or not modules:
        sys.exit("there are no modules to look for")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        quiet = {"stdout": subprocess.DEVNULL}
        # Without --wheel or --sdist, build makes the wheel from the sdist: what users of pip get.
        run(sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(ROOT), **quiet)
        (wheel,) = (folder / "dist").glob("*.whl")
        # torch is shared through a path file, not by --system-site-packages: that would show the editable install.
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        run(str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel))
        torch_home = subprocess.check_output(
            [sys.executable, "-c", "import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)"],
            text=True,
        ).strip()
        given = f"import importlib, sys\nsys.path.append({torch_home!r})\nKERNELS, MODULES = {kernels!r}, {modules!r}\n"
        run(str(python), "-I", "-c", given + CHECK, cwd=folder)


if __name__ == "__main__":
    main()
