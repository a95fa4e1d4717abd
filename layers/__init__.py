"""The model: a registry of mixers, the blocks they stand in, and the hybrid language model made of them."""

from layers.config import ModelConfig, expand_pattern, model_facts, pattern_letters
from layers.model import HybridLM
from layers.registry import MIXERS, mixer_spec

__all__ = ["MIXERS", "HybridLM", "ModelConfig", "expand_pattern", "mixer_spec", "model_facts", "pattern_letters"]
