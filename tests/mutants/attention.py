"""Mutants of softmax attention, of latent attention, and of operators that are started and finished apart."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

PARITY = "tests/hybrid_sp/ops/test_parity.py::test_parity_fp64"
SOFTMAX = "tests/hybrid_sp/ops/test_softmax_attention.py"
LATENT = "tests/hybrid_sp/ops/test_latent_attention.py"
STARTED = "tests/hybrid_sp/ops/test_started.py"

ATTENTION_MUTANTS = [
    Mutant(
        name="blocks merged without their log-sum-exp",
        file="hybrid_sp/kernels/softmax/attend.py",
        old="share_b = torch.sigmoid(lse_b - lse_a).unsqueeze(-1)",
        new="share_b = torch.sigmoid(torch.zeros_like(lse_b)).unsqueeze(-1)",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="triangle of a window written in the order of its keys",
        file="hybrid_sp/kernels/softmax/tiled.py",
        old='(x.flip(1) if tile.kind == "flipped" else x).unflatten',
        new="x.unflatten",
        test=f"{PARITY}[1-contiguous-softmax]",
    ),
    Mutant(
        name="query heads counted like key heads",
        file="hybrid_sp/ops/softmax_attention.py",
        old="slice(a * readers, b * readers)",
        new="slice(a, b)",
        test=f"{SOFTMAX}::test_parity[2-contiguous]",
    ),
    Mutant(
        name="last key heads left out",
        file="hybrid_sp/ops/softmax_attention.py",
        old="for first in range(0, heads, size)]",
        new="for first in range(0, heads - size + 1, size)]",
        test=f"{SOFTMAX}::test_parity[2-contiguous]",
    ),
    Mutant(
        name="one group of key heads twice",
        file="hybrid_sp/ops/softmax_attention.py",
        old="self.send(i + 1, k, v)",
        new="self.send(i or 1, k, v)",
        test=f"{SOFTMAX}::test_parity[2-contiguous]",
    ),
    Mutant(
        name="the next key heads launched too late",
        file="hybrid_sp/ops/softmax_attention.py",
        old="        self.send(i + 1, k, v)\n        heads = self.groups[i].queries\n",
        new="        heads = self.groups[i].queries\n        attend_tiles = lambda *x: (globals()['attend_tiles'](*x), "
        "self.send(i + 1, k, v))\n",
        test=f"{SOFTMAX}::test_a_group_of_heads_is_attended_to_while_the_next_is_in_flight",
    ),
    Mutant(
        name="gradients of a group given to the one before",
        file="hybrid_sp/ops/softmax_attention.py",
        old="heads = self.groups[i].keys\n            self.mask.keys.add",
        new="heads = self.groups[i - 1].keys\n            self.mask.keys.add",
        test=f"{SOFTMAX}::test_parity[2-contiguous]",
    ),
    Mutant(
        name="gradients of the last group not added",
        file="hybrid_sp/ops/softmax_attention.py",
        old="self._add(len(self.groups) - 1, grads, shared)",
        new="self._add(-1, grads, shared)",
        test=f"{SOFTMAX}::test_parity[2-contiguous]",
    ),
    Mutant(
        name="own keys forgotten where the others are asked for again",
        file="hybrid_sp/ops/softmax_attention.py",
        old="v, again=True)\n                self._own_backward(grads, do, saved)\n",
        new="v, again=True)\n",
        test=f"{SOFTMAX}::test_parity[1-contiguous]",
    ),
    Mutant(
        name="kept keys not recorded for a recomputation",
        file="hybrid_sp/ops/softmax_attention.py",
        old="recorded(self._received) if self.keep",
        new="self._received() if self.keep",
        test=f"{SOFTMAX}::test_a_recomputed_forward_asks_nobody_again",
    ),
    Mutant(
        name="results not recorded where keys are not kept",
        file="hybrid_sp/ops/softmax_attention.py",
        old="o, lse, *kept = recorded(run)",
        new="o, lse, *kept = run()",
        test=f"{SOFTMAX}::test_a_recomputed_forward_asks_nobody_again",
    ),
    Mutant(
        name="gradients that nobody needs",
        file="hybrid_sp/ops/softmax_attention.py",
        old="any(ctx.needs_input_grad[2:])",
        new="True",
        test=f"{SOFTMAX}::test_gradients_that_nobody_needs_do_not_travel",
    ),
    Mutant(
        name="a sink merged into every block",
        file="hybrid_sp/kernels/softmax/attend.py",
        old="    sinks = sinks.to(lse.dtype)\n    o *=",
        new="    sinks = sinks.to(lse.dtype)\n    torch.logaddexp(lse, sinks, out=lse)\n    o *=",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="the gradient of a sink with the wrong sign",
        file="hybrid_sp/kernels/softmax/attend.py",
        old="    return -parts.sum(",
        new="    return parts.sum(",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="values cut to the width of keys",
        file="hybrid_sp/kernels/softmax/attend.py",
        old="dk[..., :key], dv[..., :value]",
        new="dk[..., :key], pad(dv[..., : min(key, value)], (0, max(0, value - key)))",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="the shared part of a latent key read by the last head alone",
        file="hybrid_sp/ops/latent_attention.py",
        old="dk[..., width:].sum(2)",
        new="dk[..., width:][:, :, -1]",
        test=f"{PARITY}[2-contiguous-latent]",
    ),
    Mutant(
        name="weights of values without the gradient of other ranks' tokens",
        file="hybrid_sp/ops/latent_attention.py",
        old="            grads.w.v[few] += d_both[:, width:]\n",
        new="            grads.w.v[few] = d_both[:, width:]\n",
        test=f"{PARITY}[2-contiguous-latent]",
    ),
    Mutant(
        name="gradients of latents that do not return",
        file="hybrid_sp/ops/latent_attention.py",
        old='            self.mask.keys.add((grads.rows,), self.call.result("backward"))\n',
        new='            self.call.result("backward")\n',
        test=f"{PARITY}[2-contiguous-latent]",
    ),
    Mutant(
        name="latents gathered in the order of heads",
        file="hybrid_sp/ops/latent_attention.py",
        old="shared.unsqueeze(2).expand(*k.shape[:3], -1)], -1), v",
        new="shared.unsqueeze(2).expand(*k.shape[:3], -1).flip(1)], -1), v",
        test=f"{PARITY}[2-contiguous-latent]",
    ),
    Mutant(
        name="all heads of latents expanded at once",
        file="hybrid_sp/ops/latent_attention.py",
        old="shard.sp.kv_heads_per_gather or HEADS",
        new="10**6",
        test=f"{LATENT}::test_heads_are_expanded_a_few_at_a_time_and_again_in_backward",
    ),
    Mutant(
        name="an operator that waits before it lets the next one start",
        file="hybrid_sp/ops/recurrence.py",
        old="        yield\n        # 3.",
        new="        if exchanged:\n            S_in, S_final = finish(call, exchange, token)\n"
        "        exchanged = False\n        yield\n        # 3.",
        test=f"{STARTED}::test_all_exchanges_start_before_any_is_finished_forward_and_backward[2]",
    ),
    Mutant(
        name="messages of one exchange between those of another",
        file="hybrid_sp/comm/messages.py",
        old="    if in_one_order(group):\n        return post\n",
        new="",
        test=f"{STARTED}::test_messages_of_two_exchanges_meet_in_order[pipeline]",
    ),
    Mutant(
        name="the way back of keys awaited at once",
        file="hybrid_sp/ops/softmax_attention.py",
        old="        self.handed[:] = [grads]\n\n    def take",
        new="        self.handed[:] = [grads]\n        self.call.drain()\n\n    def take",
        test=f"{STARTED}::test_all_exchanges_start_before_any_is_finished_forward_and_backward[2]",
    ),
]
