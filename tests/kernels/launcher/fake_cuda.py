"""Triton's own CUDA driver over a libcuda that runs nothing: tensors on the CPU stand in for tensors on a GPU."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

HERE = Path(__file__).parent
_BYTES = {"i32": 4, "i64": 8, "fp64": 8}


def built(compiler: str, folder: Path) -> Path:
    """The fake driver, compiled into ``folder``."""
    library = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*command, str(HERE / "libcuda.c")], check=True)
    library.with_name("libcuda.so").symlink_to(library)  # the name by which Triton 3.4 links
    return library


class FakeCuda:
    """What the tests ask of it; made once per process, because Triton keeps its driver."""

    def __init__(self, library: Path) -> None:
        os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
        # Triton's launcher links to the name libcuda.so.1, and finds the one that is loaded.
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._library.fake_argument.restype = self._library.fake_stream.restype = ctypes.c_uint64
        self._library.fake_launches.restype = self._library.fake_modules.restype = ctypes.c_long
        self.stream = 0
        driver.set_active(self._driver())

    def _driver(self) -> Any:
        fake = self

        class Driver(nvidia.CudaDriver):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.get_current_device = lambda: 0
                self.set_current_device = lambda device: None
                self.get_current_stream = lambda device=0: fake.stream
                self.get_device_capability = lambda device=0: (9, 0)

            def get_current_target(self) -> GPUTarget:
                return GPUTarget("cuda", 90, 32)

        return Driver()

    def expect(self, kernel: Any) -> None:
        """From now on keep the run-time arguments of launches, which have to be of that kernel; None: of none."""
        kinds = [] if kernel is None else [_BYTES[p.annotation_type] for p in kernel.params if not p.is_constexpr]
        self._library.fake_expect(len(kinds), (ctypes.c_int * len(kinds))(*kinds))

    def fail(self, load: int = 0, launch: int = 0) -> None:
        """CUDA's error numbers from now on; 0: none."""
        self._library.fake_fail(load, launch)

    def capture(self, number: int, error: int = 0) -> None:
        """What the driver says of the capture of any stream."""
        self._library.fake_capture(ctypes.c_uint64(number), error)

    @property
    def launches(self) -> int:
        return int(self._library.fake_launches())

    @property
    def modules(self) -> int:
        return int(self._library.fake_modules())

    @property
    def grid(self) -> int:
        return int(self._library.fake_grid())

    @property
    def block(self) -> int:
        return int(self._library.fake_block())

    def arguments(self, kernel: Any) -> tuple[Any, ...]:
        """Run-time arguments of the last launch, as the kernel would see them."""
        kinds = [p.annotation_type for p in kernel.params if not p.is_constexpr]
        return tuple(_value(int(self._library.fake_argument(i)), kind) for i, kind in enumerate(kinds))


def _value(bits: int, kind: str) -> float:
    if kind == "fp64":
        return float(struct.unpack("<d", struct.pack("<Q", bits))[0])
    return bits
