"""``python -m bench.performance``; what it does is in run.py."""

import sys

from bench.performance.run import main

if __name__ == "__main__":
    sys.exit(main())
