"""``python -m bench.readiness``; what it does is in run.py."""

import sys

from bench.readiness.run import main

if __name__ == "__main__":
    sys.exit(main())
