"""The model: a registry of mixers, the blocks that hold them, and the hybrid language model that stacks blocks."""

from layers.config import ModelConfig, expand_pattern, model_facts, pattern_letters
from layers.model import HybridLM
from layers.registry import MIXERS, mixer_spec

__all__ = ["MIXERS", "HybridLM", "ModelConfig", "expand_pattern", "mixer_spec", "model_facts", "pattern_letters"]
