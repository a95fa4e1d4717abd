"""The readers: cost model, tables, plots and reports, made from run folders. Nothing here trains or needs a GPU."""
