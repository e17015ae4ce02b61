"""``python -m bench.growth``; what it does is in run.py."""

import sys

from bench.growth.run import main

if __name__ == "__main__":
    sys.exit(main())
