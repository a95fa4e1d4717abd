"""The mixers, one a file. This list is what makes them known to the registry."""

from layers.mixers import gla, lightning, linear, retention, softmax

__all__ = ["gla", "lightning", "linear", "retention", "softmax"]
