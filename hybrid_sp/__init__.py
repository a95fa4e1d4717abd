"""The engine of sequence parallelism for hybrid language models: LASP-2 for linear attention, AllGather-KV for softmax.

Tensors are [batch, tokens on this rank, heads, dim]. Names of tensors and comments use one legend:

    B  batch                      P  ranks of the sequence axis     K  key dim
    T  tokens on this rank        N  chunks                         V  value dim
    L  tokens in the sequence     C  tokens in a chunk              D  model dim, or head dim of softmax attention
    H  heads                      G  key (and softmax value) heads  S  a state [B,H,K,V]
    s  spans of this rank         n  spans of the sequence          z  the normaliser's state [B,H,K]

An `axis` belongs to a mesh, a `dim` to a tensor. A rank owns spans of the sequence; a span is cut into chunks.
"""

from .comm.ledger import ledger
from .gradients import sum_gradients
from .mesh import init_mesh
from .ops.delta_rule import delta_rule
from .ops.latent_attention import latent_attention
from .ops.linear_attention import linear_attention
from .ops.short_conv import short_conv, token_shift
from .ops.softmax_attention import softmax_attention
from .recompute import checkpoint_contexts
from .shard import SequenceParallel, Shard

__version__ = "0.1.0"  # pyproject.toml reads the package's version here

__all__ = [
    "SequenceParallel",
    "Shard",
    "checkpoint_contexts",
    "delta_rule",
    "init_mesh",
    "latent_attention",
    "ledger",
    "linear_attention",
    "short_conv",
    "softmax_attention",
    "sum_gradients",
    "token_shift",
]
