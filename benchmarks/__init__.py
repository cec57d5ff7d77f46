"""Benchmarks, run by ``pytest benchmarks``; the part that is installed is fastdiff/bench/."""
