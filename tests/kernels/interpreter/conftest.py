"""The interpreter lane: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreter``.

Triton reads the variable when a kernel is decorated, so the lane needs a process of its own.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") else ["test_*.py"]
