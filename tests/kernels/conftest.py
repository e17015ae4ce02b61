"""Makes ``kernel_cases`` importable: the cases that the interpreter lane and the GPU lane share."""

import sys
from pathlib import Path

import pytest

# Appended, not inserted: the folders beside this file must not hide anybody's package.
sys.path.append(str(Path(__file__).parent))
pytest.register_assert_rewrite("kernel_cases")
