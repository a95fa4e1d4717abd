"""The programs train, sweep and generate, with the recipe files that they read."""
