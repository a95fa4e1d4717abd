"""Local kernels: one device, no communication. Shapes, dtypes and spans in; tensors out."""
