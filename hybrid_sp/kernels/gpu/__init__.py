"""The kernels for CUDA devices. They are imported only after a backend that needs them has been chosen
(`backends.py`).
"""
