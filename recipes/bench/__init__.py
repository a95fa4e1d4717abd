"""Speed tables of the README: `python -m recipes.bench`."""
