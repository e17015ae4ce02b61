"""The interpreter lane: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreter``.

Triton reads the variable when a kernel is decorated, so the lane needs a process of its own.
"""

import importlib.metadata
import os

import pytest

from seedtriton.gradients.backend import triton_version

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") else ["test_*.py"]

_NUMPY = importlib.metadata.version("numpy")
if not collect_ignore_glob and (triton_version() or (4,)) < (3, 7) and tuple(map(int, _NUMPY.split(".")[:2])) >= (2, 4):
    raise pytest.UsageError(
        f"Triton's interpreter runs under numpy {_NUMPY} since Triton 3.7 (before, 'only 0-dimensional arrays can be "
        "converted to Python scalars'): install numpy<2.4 beside an older Triton"
    )
