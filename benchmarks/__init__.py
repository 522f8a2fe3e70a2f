"""The benchmark suite: `python -m benchmarks` from the root of the repository.

cases.py        what is run: sizes, providers, modes
accuracy.py     is each provider right, checked before it is timed
measure.py      how a number is taken: timers, intervals, memory
suite.py        the interleaved run, which turns cases into results
environment.py  where it was run
report.py       results files, tables and plots
"""
