"""The benchmarks of speed and memory: `python -m analysis.bench --help`."""
