"""The emulator runs compiled code, so it needs real JIT functions, as the compiler lane does."""

import os

collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") else []
