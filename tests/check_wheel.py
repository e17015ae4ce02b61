"""Build sdist -> wheel, install it into an empty environment and import it there, every wing and the kernels included.

A wheel without kernels builds green with most build recipes; only importing the installed one tells. Then a script of
a user is type-checked against it, by mypy and pyright. Exits with 1 and says why when anything is missing.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
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


LARGEST = 400_000  # bytes of the wheel
# Pyright's own sense of "basic"; what is ignored below has to be wrong, or it is an error.
PYRIGHT = {
    "typeCheckingMode": "basic",
    "enableTypeIgnoreComments": True,
    "reportUnnecessaryTypeIgnoreComment": "error",
}
TOOLS = pathlib.Path(sys.executable).parent


def run(*command: str, **options) -> None:
    subprocess.run(command, check=True, **options)


def build(folder: pathlib.Path) -> pathlib.Path:
    """The wheel, made from the sdist as for users of pip; both are looked at."""
    run(sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT), stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    size = wheel.stat().st_size
    if size > LARGEST:
        sys.exit(f"the wheel has {size} bytes, at most {LARGEST}")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    missing = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "docs/quickstart.md", "seedtriton/py.typed"} - {*names}
    unwanted = [name for name in names if name.startswith(("bench/", "tests/")) or name.endswith((".json", ".png"))]
    if missing or unwanted:
        sys.exit(f"the sdist lacks {sorted(missing)} and has {unwanted[:10]}, which nobody needs to build it")
    print(f"wheel of {size} bytes, sdist of {sdist.stat().st_size} with {len(names)} entries")
    return wheel


def check_types(folder: pathlib.Path, python: pathlib.Path) -> None:
    """A user's script under mypy --strict and pyright, where no source of ours lies beside it."""
    shutil.copy(ROOT / "tests" / "typed_user.py", folder)
    (folder / "pyrightconfig.json").write_text(json.dumps(PYRIGHT), "utf-8")
    cache = ["--cache-dir", str(folder / "cache")]
    run(str(TOOLS / "mypy"), "--strict", *cache, "--python-executable", str(python), "typed_user.py", cwd=folder)
    run(str(TOOLS / "basedpyright"), "--pythonpath", str(python), "typed_user.py", cwd=folder)


def main() -> None:
    kernels = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
    modules = sorted(name for name in house.files() if name and name != "__main__")
    if not kernels or not modules:
        sys.exit("there are no modules to look for")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        wheel = build(folder / "dist")
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        run(str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel))
        # torch is shared through a path file, not by --system-site-packages: that would show the editable install.
        home = "import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)"
        shared = subprocess.check_output([sys.executable, "-c", home], text=True)
        site = "import sysconfig; print(sysconfig.get_path('purelib'), end='')"
        packages = pathlib.Path(subprocess.check_output([str(python), "-c", site], text=True))
        (packages / "shared.pth").write_text(shared, "utf-8")
        given = f"import importlib, sys\nKERNELS, MODULES = {kernels!r}, {modules!r}\n"
        run(str(python), "-I", "-c", given + CHECK, cwd=folder)
        run(str(python), "-I", "-m", "seedtriton", "doctor", cwd=folder)
        check_types(folder, python)


if __name__ == "__main__":
    main()
