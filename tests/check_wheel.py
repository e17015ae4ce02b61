"""Build sdist -> wheel, install it into an empty environment and import it there, kernels included.

A wheel without kernels builds green with most build recipes; only importing the installed one tells.
Exits with 1 and says why when anything is missing.
"""

import pathlib
import subprocess
import sys
import tempfile
import venv

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
print("wheel ok:", place.parent.name, seedtriton.__version__, "with kernels", ", ".join(KERNELS))
"""


def run(*command: str, **options) -> None:
    subprocess.run(command, check=True, **options)


def main() -> None:
    modules = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
    if not modules:
        sys.exit("kernels/ has no modules to look for")
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
        code = f"import sys; sys.path.append({torch_home!r}); KERNELS = {modules!r}\nimport importlib\n" + CHECK
        run(str(python), "-I", "-c", code, cwd=folder)


if __name__ == "__main__":
    main()
