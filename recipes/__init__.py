"""The programs, which are train, sweep and generate, and the recipe files that they read."""
