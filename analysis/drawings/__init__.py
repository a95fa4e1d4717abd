"""The drawings: the imports of the engine, and a hybrid model over ranks. `python -m analysis.drawings` makes both."""
