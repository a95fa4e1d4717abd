"""The local kernels. They run on one device and never communicate: shapes, dtypes and spans go in, tensors come out."""
