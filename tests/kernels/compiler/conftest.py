"""The compiler lane needs real JIT functions, which a process that interprets does not have."""

import os

collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") else []
