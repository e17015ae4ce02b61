"""``python -m seedtriton``."""

import sys

from .cli import main

sys.exit(main())
