"""`fastdiff.bench.repeats` with one op a tenth slower, for `benchmarks.trust`."""

import sys

from benchmarks.trust import PLANTED, SLOWER, slowed
from fastdiff.bench.repeats import main

if __name__ == "__main__":
    with slowed(PLANTED, SLOWER):
        main(sys.argv[1:])
