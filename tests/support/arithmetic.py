"""How torch computes in a run of the tests: by how many threads, and in which order it sums matrix products.

Libraries sum in another order on another chip, and so do more threads. The options of pytest make such orders here, so
that a test which believes in one of them fails on this machine already.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The operators of torch that are matrix products, and the place of the left matrix among their arguments.
PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """`permute` is a seed: the inner dim of every matrix product on a CPU is summed in an order drawn by it."""

    threads: int = 1
    permute: int | None = None

    def apply(self) -> None:
        """Make this process compute so."""
        import torch

        torch.set_num_threads(self.threads)
        if self.permute is not None:
            _permute_products(self.permute)


@functools.cache
def _permute_products(seed: int) -> Any:
    """Replace torch's CPU kernels by ones that permute and then call them; the registration lives in the cache."""
    import torch

    @functools.cache
    def order(inner: int) -> torch.Tensor:  # of seed and size alone: equal products stay bit-equal
        return torch.randperm(inner, generator=torch.Generator().manual_seed(seed))

    def permuted(name: str, left: int) -> Callable[..., Any]:
        kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

        def product(keys: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
            a, b = args[left], args[left + 1]
            inner = order(a.shape[-1])
            pair = a.index_select(-1, inner), b.index_select(-2 if b.ndim > 1 else -1, inner)
            return kernel.call_boxed(keys, *args[:left], *pair, *args[left + 2 :], **kwargs)

        return product

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced is the purpose
        for product, left in PRODUCTS.items():
            for name in (product, f"{product}.out", *([f"{product}_"] if left else [])):
                library.impl(name, permuted(name, left), "CPU", with_keyset=True, allow_override=True)
    return library
