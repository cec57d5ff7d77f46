"""``python -m benchmarks.resources``: see table.py."""

from __future__ import annotations

import sys

from benchmarks.resources.table import run

sys.exit(run(sys.argv[1:]))
