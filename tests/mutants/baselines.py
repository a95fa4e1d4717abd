"""Ways to break the baselines: heads that are cut instead of tokens, and blocks that travel around the ranks."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

BASELINES = "tests/hybrid_sp/baselines/test_baselines.py"
RING = "tests/hybrid_sp/baselines/test_ring.py"
QUADRATIC = "tests/hybrid_sp/baselines/test_left_product.py"

BASELINE_MUTANTS = [
    Mutant(
        name="another rank's heads of a gather",
        file="hybrid_sp/baselines/head_parallel.py",
        old="return slice(shard.sp.rank * own, (shard.sp.rank + 1) * own)",
        new="return slice(0, own)",
        test=f"{BASELINES}::test_cutting_heads[megatron-4-zigzag]",
    ),
    Mutant(
        name="padding between tokens of heads",
        file="hybrid_sp/baselines/head_parallel.py",
        old="rearrange(received[:, :, : self.shard.tokens],",
        new="rearrange(received[:, :, -self.shard.tokens :],",
        test=f"{BASELINES}::test_cutting_heads[ulysses-2-contiguous]",
    ),
    Mutant(
        name="heads and ranks in the wrong order",
        file="hybrid_sp/baselines/head_parallel.py",
        old='"B T (P h) ... -> P B T h ..."',
        new='"B T (h P) ... -> P B T h ..."',
        test=f"{BASELINES}::test_cutting_heads[ulysses-2-zigzag]",
    ),
    Mutant(
        name="gradients of final states not summed over ranks",
        file="hybrid_sp/baselines/head_parallel.py",
        old="return collectives.start_reduce_scatter(x_P, self.shard.sp.group, header)",
        new="return Pending(lambda: x_P[self.shard.sp.rank])",
        test=f"{BASELINES}::test_cutting_heads[ulysses-2-contiguous]",
    ),
    Mutant(
        name="documents of heads forgotten",
        file="hybrid_sp/baselines/head_parallel.py",
        old="shard.length, shard.cu_seqlens, shard.calls",
        new="shard.length, None, shard.calls",
        test=f"{BASELINES}::test_cutting_heads[ulysses-2-contiguous]",
    ),
    Mutant(
        name="heads that ranks do not divide",
        file="hybrid_sp/baselines/head_parallel.py",
        old="require(x.shape[2] % ranks == 0,",
        new="require(True,",
        test=f"{BASELINES}::test_what_a_baseline_cannot_do_is_refused_by_name[3]",
    ),
    Mutant(
        name="blocks travel against the ring",
        file="hybrid_sp/baselines/ring_attention.py",
        old="visit((self.rank - hop) % self.size, block)",
        new="visit((self.rank + hop) % self.size, block)",
        test=f"{BASELINES}::test_rings[ring-4-contiguous]",
    ),
    Mutant(
        name="a hop that is not waited for",
        file="hybrid_sp/comm/messages.py",
        old="        for work in self._works:\n            work.wait()\n",
        new="        pass\n",
        test=f"{BASELINES}::test_rings[ring-4-contiguous]",
    ),
    Mutant(
        name="the next hop launched too late",
        file="hybrid_sp/baselines/ring_attention.py",
        old="        if self.call.sp.overlaps(self.call.tag):\n            return pending\n",
        new="",
        test=f"{RING}::test_the_next_hop_is_in_flight_while_the_present_block_is_visited",
    ),
    Mutant(
        name="sums of gradients dropped on the way",
        file="hybrid_sp/baselines/ring_attention.py",
        old="                part += earlier\n",
        new="                pass\n",
        test=f"{BASELINES}::test_rings[ring-3-zigzag]",
    ),
    Mutant(
        name="sums of gradients one hop short of home",
        file="hybrid_sp/baselines/ring_attention.py",
        old="sums = self._shift((part,))",
        new="sums = self._shift((part,)) if (source - self.rank - 1) % self.size else Pending(lambda: (part,))",
        test=f"{BASELINES}::test_rings[ring-2-contiguous]",
    ),
    Mutant(
        name="sums left in flight by a failure",
        file="hybrid_sp/baselines/ring_attention.py",
        old="                sums.drain()\n",
        new="",
        test=f"{RING}::test_an_exception_on_the_way_leaves_nothing_in_flight",
    ),
    Mutant(
        name="queries that are fresh merged with what memory held",
        file="hybrid_sp/exchange/visible.py",
        old="                    found += _before(",
        new="                    found[:0] = _before(",
        test=f"{BASELINES}::test_rings[ring-2-zigzag]",
    ),
    Mutant(
        name="decay of the spans between left out",
        file="hybrid_sp/baselines/linear_ring_attention.py",
        old="self.totals[_spans_between(self.shard, part, source)].sum(0).unsqueeze(-1)",
        new="self.totals[:0].sum(0).unsqueeze(-1)",
        test=f"{BASELINES}::test_rings[ring_attention-3-zigzag]",
    ),
    Mutant(
        name="gradient of the spans between left out",
        file="hybrid_sp/baselines/linear_ring_attention.py",
        old="            part += d_total.unsqueeze(-1)\n",
        new="            pass\n",
        test=f"{BASELINES}::test_rings[ring_attention-3-zigzag]",
    ),
    Mutant(
        name="gradient of known decays left out",
        file="hybrid_sp/baselines/linear_ring_attention.py",
        old="        self.d_fixed += dg.sum((0, 2))\n",
        new="",
        test=f"{BASELINES}::test_rings[ring_attention-2-contiguous]",
    ),
    Mutant(
        name="second span taken for the first",
        file="hybrid_sp/baselines/linear_ring_attention.py",
        old="bisect.bisect_right(_lengths(shard, rank)[:-1], token)",
        new="0 * bisect.bisect_right(_lengths(shard, rank)[:-1], token)",
        test=f"{BASELINES}::test_rings[ring_attention-2-zigzag]",
    ),
    Mutant(
        name="a key's own decay counted after it",
        file="hybrid_sp/baselines/left_product.py",
        old="return F.pad(g[..., 1:], (0, 1)).flip(-1)",
        new="return g.flip(-1)",
        test=f"{QUADRATIC}::test_a_run_over_itself",
    ),
    Mutant(
        name="gradient of decays before a tile left out",
        file="hybrid_sp/baselines/left_product.py",
        old="        dg[:, :, past] += after_backward(d_written)\n",
        new="",
        test=f"{QUADRATIC}::test_a_run_over_itself",
    ),
]
