"""The programs: train, sweep, generate and bench, and the recipe files that they read."""
