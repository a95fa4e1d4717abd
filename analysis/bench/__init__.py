"""Speed tables of the README: `python -m analysis.bench`."""
