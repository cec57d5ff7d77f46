"""Benchmarks: ``pytest benchmarks``; the installed part of them is fastdiff/bench/."""
