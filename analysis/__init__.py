"""The readers of run folders: reports, tables, figures and the cost model; and the benchmarks, in `bench`."""
