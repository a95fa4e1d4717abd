"""Kernels for CUDA devices. Nothing here is imported before a backend that needs it has been chosen (`backends.py`)."""
