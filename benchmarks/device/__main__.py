"""Entry point of ``python -m benchmarks.device``."""

import sys

from benchmarks.device.command import main

if __name__ == "__main__":
    sys.exit(main())
