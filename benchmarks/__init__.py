"""The benchmark suite: `python -m benchmarks` from the root of the repository.

ops/            one file an op: its sizes, its providers, its bytes and FLOPs
cases.py        what those files are made of: cases, providers, modes
accuracy.py     is each provider right, checked before it is timed
measure.py      how a number is taken: timers, graphs, intervals, memory, ceilings
suite.py        the interleaved run, which turns cases into results
environment.py  where it was run
report.py       results files and tables
compare.py      two results: what got better or worse
plots.py        speedup, memory, roofline
gpu_check.py    `make gpu-check`: everything that needs a GPU, in one command
test_cases.py   the same cases under pytest-benchmark: `pytest benchmarks/`
"""
