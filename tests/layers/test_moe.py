"""The mixture of experts and mixers side by side: by hand, over ranks with the balance of the load, and in decoding."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.comm import collectives, groups
from hybrid_sp.shard import LAYOUTS
from layers.balance import Balance
from layers.config import ModelConfig
from layers.model import HybridLM
from layers.moe import MoE, MoEConfig, Routing
from tests.support.oracle import assert_close
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

DIM, LENGTH, VOCAB = 12, 30, 16
OPTIONS = [
    {"experts": 5, "active": 2, "dim": 6},
    {"experts": 4, "active": 3, "dim": 5, "normalize": False, "scale": 0.7, "shared": 7},
    {"experts": 6, "active": 2, "router": "sigmoid", "scale": 2.5, "bias_rate": 0.1, "shared": 4, "shared_gate": True},
    {"experts": 3, "active": 1, "router": "sigmoid", "normalize": False},
]


def experts(seed: int = 0, **options: Any) -> MoE:
    """Experts whose weights make every part of them count."""
    made = MoE(MoEConfig(**options), DIM, 8, 1).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in [*made.parameters(), *made.buffers()]:
            weight.copy_(0.4 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return made


def stream(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def swiglu(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    gate, up = (first @ x).chunk(2)
    return second @ (gate * torch.sigmoid(gate) * up)


def by_hand(made: MoE, x_D: Tensor) -> tuple[Tensor, list[int], Tensor]:
    """One token: its output, its experts, and its shares of the scores."""
    config = made.config
    logits = made.router.weight @ x_D
    scores = torch.exp(logits) / torch.exp(logits).sum() if config.router == "softmax" else 1 / (1 + torch.exp(-logits))
    preferred = scores + made.bias if config.bias_rate else scores
    chosen = sorted(range(config.experts), key=lambda e: -preferred[e].item())[: config.active]
    total = sum(scores[e] for e in chosen) if config.normalize else 1.0
    y = torch.zeros_like(x_D)
    for e in chosen:
        y = y + config.scale * scores[e] / total * swiglu(x_D, made.experts.input[e], made.experts.output[e])
    if config.shared:
        always = swiglu(x_D, made.shared.input.weight, made.shared.output.weight)
        y = y + (torch.sigmoid(made.shared_gate.weight[0] @ x_D) * always if config.shared_gate else always)
    return y, chosen, scores / scores.sum()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.get("router", "softmax"))
def test_experts_by_hand(options: dict[str, Any]) -> None:
    """Outputs, statistics, and the gradients of the input and of every weight."""
    made, x, dy = experts(**options), stream(2, 7, DIM).requires_grad_(), stream(2, 7, DIM, seed=2)
    y, routing = made(x)
    tokens = [by_hand(made, one) for one in x.flatten(0, 1)]
    want = torch.stack([token for token, _, _ in tokens]).view_as(y)
    assert_close("y", y, want, 1e-12)
    numbers = torch.tensor([number for _, chosen, _ in tokens for number in chosen])
    assert routing.counts_E.tolist() == torch.bincount(numbers, minlength=made.config.experts).tolist()
    assert_close("probabilities", routing.probabilities_E, sum(shares for _, _, shares in tokens), 1e-12)
    leaves = [x, *made.parameters()]
    names = ["x", *dict(made.named_parameters())]
    grads, wanted = (torch.autograd.grad((one * dy).sum(), leaves) for one in (y, want))
    for name, got, true in zip(names, grads, wanted, strict=True):
        assert_close(f"gradient of {name}", got, true, 1e-10)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, None), (torch.float32, 2), (torch.bfloat16, 2)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.get("router", "softmax"))
def test_two_halves_are_the_whole(options: dict[str, Any], dtype: torch.dtype, bound: float | None) -> None:
    """Outputs, the input's gradient, and the gradients of all weights together; narrow ones round no more than twice
    as much as the whole does, whose routers choose alike."""
    rounded = experts(**options).to(dtype)
    x, dy = (stream(1, 40, DIM, seed=seed).to(dtype) for seed in (1, 2))

    def measured(wide: torch.dtype, cuts: list[int]) -> list[Tensor]:
        made, found = copy.deepcopy(rounded).to(wide), []
        for part, d_part in zip(x.to(wide).split(cuts, 1), dy.to(wide).split(cuts, 1), strict=True):
            leaf = part.clone().requires_grad_()
            y, _ = made(leaf)
            y.backward(d_part)
            found.append((y.detach(), leaf.grad))
        weights = torch.cat([weight.grad.flatten() for weight in made.parameters()])
        return [*(torch.cat(tensors, 1).double() for tensors in zip(*found, strict=True)), weights.double()]

    truth, whole, halves = measured(torch.float64, [40]), measured(dtype, [40]), measured(dtype, [17, 23])
    for name, want, one, two in zip(("y", "dx", "weights"), truth, whole, halves, strict=True):
        if bound is None:
            assert_close(name, two, want, 1e-12)
        else:
            assert (two - want).norm() <= bound * (one - want).norm(), name


def test_no_token_is_dropped_and_experts_without_one_have_a_gradient_of_zeros() -> None:
    made = experts(experts=4, active=1, bias_rate=0.1)
    made.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
    x = stream(1, 64, DIM)
    y, routing = made(x)
    assert routing.counts_E.tolist() == [0, 0, 64, 0]
    assert_close("y", y, torch.stack([by_hand(made, one)[0] for one in x[0]])[None], 1e-12)
    y.sum().backward()
    for weight in made.experts.parameters():
        assert weight.grad is not None
        assert [bool(gradient.any()) for gradient in weight.grad] == [False, False, True, False]


def test_the_bias_stays_wide_and_is_no_parameter() -> None:
    model = HybridLM(replace(CONFIG, moe=MoEConfig(bias_rate=0.1))).to(torch.bfloat16)
    biases = {name: buffer for name, buffer in model.state_dict().items() if name.endswith("mlp.bias")}
    assert [bias.dtype for bias in biases.values()] == [torch.float32] * 2
    assert not set(biases) & set(dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "moe.experts is 0; it must be at least 1"),
        ({"active": 9}, "moe.active is 9; it must be at most moe.experts, which is 8"),
        ({"dim": 0}, "moe.dim is 0"),
        ({"auxiliary": -1.0}, "moe.auxiliary is -1.0; it must be at least 0"),
        ({"shared_gate": True}, "moe.shared_gate needs a shared expert"),
        ({"router": "argmax"}, "moe.router is 'argmax'; it must be softmax or sigmoid"),
    ],
)
def test_errors_say_what_to_change(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HybridLM(replace(CONFIG, moe=MoEConfig(**options)))


# The model over ranks.

CONFIG = ModelConfig(
    vocab=VOCAB,
    dim=16,
    depth=4,
    heads=2,
    kv_heads=1,
    mlp_dim=12,
    pattern="gla/mlp gated_delta_net+softmax mamba2+softmax/none none",
    side_by_side="mean",
    mixers={"mamba2": {"state": 8}},
    moe=MoEConfig(experts=5, dim=6, shared=4, auxiliary=0.3, bias_rate=0.02),
)
CONFIGS = [
    CONFIG,
    replace(CONFIG, side_by_side="sum", moe=MoEConfig(experts=4, active=3, router="sigmoid", scale=2.0, auxiliary=1.0)),
]
DOCUMENTS = (0, 1, 6, 7, LENGTH)


def text(passes: int = 2) -> Tensor:
    """Tokens of several passes, each of two sequences."""
    return torch.randint(VOCAB, (passes, 2, LENGTH), generator=torch.Generator().manual_seed(4))


def one_device(config: ModelConfig, packed: bool) -> dict[str, Tensor]:
    """The gradients of the loss as `layers/balance.py` states it, from the routers' logits, and the new biases.

    Every pass is a batch of two sequences; packed, documents are read alone.
    """
    model = HybridLM(config).double()
    routers = [block.mlp for block in model.blocks if isinstance(block.mlp, MoE)]
    logits: list[list[Tensor]] = [[] for _ in routers]
    for router, kept in zip(routers, logits, strict=True):
        router.router.register_forward_hook(lambda _, __, y, kept=kept: kept.append(y))
    total, labels_of_all, counts_LE = torch.zeros((), dtype=torch.float64), 0, 0
    for tokens in text():
        pieces = itertools.pairwise(DOCUMENTS if packed else (0, LENGTH))
        m, losses = 0, []
        for begin, end in pieces:
            labels = F.pad(tokens[:, begin + 1 : end], (0, 1), value=-100)
            losses.append(F.cross_entropy(model(tokens[:, begin:end]).flatten(0, 1), labels.flatten(), reduction="sum"))
            m += int((labels >= 0).sum())
        moe, counts = config.moe, []
        assert moe is not None
        auxiliary = torch.zeros((), dtype=torch.float64)
        for kept, router in zip(logits, routers, strict=True):
            z = torch.cat([one.reshape(-1, moe.experts) for one in kept])
            kept.clear()
            scores = z.softmax(-1) if moe.router == "softmax" else z.sigmoid()
            preferred = scores + router.bias if moe.bias_rate else scores
            counts.append(F.one_hot(preferred.topk(moe.active).indices, moe.experts).sum((0, 1)))
            share = (scores / scores.sum(-1, keepdim=True)).mean(0)
            auxiliary = auxiliary + moe.experts * (counts[-1].double() / counts[-1].sum() * share).sum()
        counts_LE = counts_LE + torch.stack(counts)
        total = total + sum(losses) + m * moe.auxiliary * auxiliary
        labels_of_all += m
    (total / labels_of_all).backward()
    biases = torch.sign(counts_LE.double().mean(-1, keepdim=True) - counts_LE) * moe.bias_rate
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return gradients | {"biases": biases, "busiest": (counts_LE / counts_LE.double().mean(-1, keepdim=True)).max()}


def on_ranks(group: Any, config: ModelConfig, layout: str, packed: bool, dp: int, recompute: bool) -> dict[str, Tensor]:
    """The same of this rank's tokens: gradients summed over ranks and passes, and biases after the step."""
    sp, rows = group, slice(0, 2)
    if dp > 1:
        mesh = hsp.init_mesh(dp=dp, sp=groups.size(group) // dp)
        sp, rank = mesh["sp"].get_group(), mesh["dp"].get_local_rank()
        rows = slice(rank, rank + 1)
    model = HybridLM(config, range(config.depth) if recompute else ()).double()
    balance, valid = Balance(model, group), 0
    for tokens in text():
        tokens, bounds = tokens[rows], None
        if packed:
            bounds = [row * LENGTH + bound for row in range(len(tokens)) for bound in DOCUMENTS[:-1]] + [tokens.numel()]
            tokens = tokens.reshape(1, -1)
        shard = hsp.SequenceParallel(sp, layout=layout, check="calls").shard(tokens.shape[1], bounds)
        routing: list[Routing] = []
        loss, count = model.loss(shard.take(tokens), shard.labels(tokens), shard, routing)
        (loss + balance.loss(routing, count)).backward()
        valid += int(count)
    hsp.sum_gradients(model.parameters(), group, valid)
    busiest = balance.busiest()
    balance.step()
    bias = [block.mlp.bias for block in model.blocks if config.moe.bias_rate and isinstance(block.mlp, MoE)]
    found = {name: weight.grad for name, weight in model.named_parameters()}
    return found | {"busiest": busiest} | ({"biases": torch.stack(bias)} if bias else {})


def compare(group: Any, cases: list[Any]) -> None:
    for want, config, layout, packed, dp, recompute in cases:
        got = on_ranks(group, config, layout, packed, dp, recompute)
        where = f"{layout}, packed {packed}, dp {dp}, rank {groups.rank(group)} of {groups.size(group)}"
        for name, value in got.items():
            assert_close(f"{where}: {name}", value, want[name], 1e-10)


@pytest.mark.parametrize("ranks", tiered([1, 2, 3, 4], []))
def test_losses_and_balance_are_those_of_all_tokens(ranks: int) -> None:
    """Dense and packed, in both layouts, two passes, with an expert that some rank's tokens never reach."""
    wants = {
        (number, packed): one_device(config, packed)
        for number, config in enumerate(CONFIGS)
        for packed in (False, True)
    }
    turns = [(0, "contiguous", False, 1, False), (1, "zigzag", True, 1, True)]
    if ranks in (2, 4):
        turns += [(1, "contiguous", False, 2, False), (0, "zigzag", True, ranks // 2, True)]
    if ranks == 3:
        turns += [(1, "zigzag", False, 1, False), (0, "contiguous", True, 1, False)]
    run_ranks(
        compare, ranks, [(wants[n, packed], CONFIGS[n], layout, packed, *rest) for n, layout, packed, *rest in turns]
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_losses_and_balance_are_those_of_all_tokens_in_every_case(ranks: int) -> None:
    cases = [
        (one_device(config, packed), config, layout, packed, dp, recompute)
        for config, layout, packed, dp, recompute in itertools.product(
            CONFIGS, LAYOUTS, (False, True), (1, 2) if ranks % 2 == 0 else (1,), (False, True)
        )
    ]
    run_ranks(compare, ranks, cases, deadline=300.0)


def test_two_passes_send_one_message_of_counts_each() -> None:
    run_ranks(count_messages, 2)


def count_messages(group: Any) -> None:
    for config, messages in ((CONFIG, 1), (replace(CONFIG, moe=MoEConfig()), 0)):
        model = HybridLM(config)
        balance = Balance(model, group)
        assert balance.needed == bool(messages)
        with hsp.ledger() as book:
            if balance.needed:
                routing: list[Routing] = []
                loss, count = model.loss(text()[0], text()[1], None, routing)
                balance.loss(routing, count)
        assert [row.bytes for row in book.select(tag="routing")] == [8 * (2 * 5 + 1)] * messages


@pytest.mark.parametrize("config", CONFIGS, ids=["mean", "sum"])
def test_decoding_is_the_parallel_forward(config: ModelConfig) -> None:
    model = HybridLM(config).double()
    tokens = text()[0]
    want = model(tokens)
    cache = start = model.init_cache(2)
    for t in range(LENGTH):
        got, cache = model.step(tokens[:, t], cache)
        assert_close(f"token {t}", got, want[:, t], 1e-10)
    again, _ = model.step(tokens[:, 0], start)
    assert_close("the cache given stays as it is", again, want[:, 0], 1e-10)
    got, cache = model.prefill(tokens[:, :11])
    assert_close("a prompt at once", got, want[:, 10], 1e-10)
    got, _ = model.step(tokens[:, 11], cache)
    assert_close("the token after it", got, want[:, 11], 1e-10)


@pytest.mark.parametrize("join", ["sum", "mean"])
def test_mixers_side_by_side_by_hand(join: str) -> None:
    config = replace(CONFIG, side_by_side=join, pattern="gla+softmax/none", depth=1)
    block = HybridLM(config).double().blocks[0]
    x = stream(2, 9, 16)
    normed = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    outputs = [mixer(normed)[0] for mixer in block.mixer.mixers.values()]
    if join == "mean":
        outputs = [y / (y.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() / 2 for y in outputs]
    assert_close("y", block(x)[0], x + outputs[0] + outputs[1], 1e-12)


SIDE_BY_SIDE = ["mamba2+softmax", "kda+mla+gla", "softmax+sliding_window", "gated_delta_product+retention"]


def test_every_exchange_side_by_side_is_sent_before_any_is_waited_for() -> None:
    run_ranks(watch_exchanges, 2)


def watch_exchanges(group: Any) -> None:
    """Forward and backward, and with the block computed again; convolutions, which come before, are left out."""
    for pattern, recompute in itertools.product(SIDE_BY_SIDE, ((), (0,))):
        config = replace(CONFIG, pattern=f"{pattern}/none", depth=1, kv_heads=2)
        model = HybridLM(config, recompute)
        shard = hsp.SequenceParallel(group, layout="zigzag").shard(LENGTH)
        with hsp.ledger() as book:
            loss, _ = model.loss(shard.take(text()[0]), shard.take(text()[1]), shard)
            loss.backward()
        for direction in ("forward", "backward"):
            sent = [row.launched for row in book.select(direction=direction) if row.tag in ("linear", "softmax")]
            waits = [one.begin for one in book.waits if one.direction == direction and one.tag in ("linear", "softmax")]
            where = f"{pattern}, {direction}, recompute {recompute}"
            assert len(sent) == len(waits) == 1 + pattern.count("+"), where
            assert max(sent) < min(waits), where


def mixed(group: Any) -> None:
    """Outputs and gradients of each, over the ranks in either layout, are those of one device."""
    for pattern, layout in itertools.product(SIDE_BY_SIDE, LAYOUTS):
        config = replace(CONFIG, pattern=f"{pattern}/none", depth=1, kv_heads=2, side_by_side="sum")
        block = HybridLM(config).double().blocks[0]
        shard = hsp.SequenceParallel(group, layout=layout, check="calls").shard(LENGTH, DOCUMENTS)
        x, dy = stream(1, LENGTH, 16).requires_grad_(), stream(1, LENGTH, 16, seed=2)
        whole = hsp.SequenceParallel(None).shard(LENGTH, DOCUMENTS)
        want = torch.autograd.grad(y := block(x, whole)[0], [x, *block.parameters()], dy)
        x_T = shard.take(x.detach()).requires_grad_()
        got = torch.autograd.grad(y_T := block(x_T, shard)[0], [x_T, *block.parameters()], shard.take(dy))
        where = f"{pattern}, {layout}, rank {groups.rank(group)}"
        assert_close(f"{where}: y", y_T, shard.take(y), 1e-10)
        assert_close(f"{where}: dx", got[0], shard.take(want[0]), 1e-10)
        for (name, _), mine, all_of in zip(block.named_parameters(), got[1:], want[1:], strict=True):
            total = collectives.all_reduce(mine.clone(), group, tag="gradients")
            assert_close(f"{where}: gradient of {name}", total, all_of, 1e-10)


@pytest.mark.parametrize("ranks", tiered([3], [1, 2, 4]))
def test_mixers_side_by_side_agree_with_one_device(ranks: int) -> None:
    run_ranks(mixed, ranks, deadline=120.0)


def test_an_unknown_join_lists_the_known() -> None:
    with pytest.raises(ValueError, match="side_by_side is 'concat'; it must be one of sum, mean"):
        HybridLM(replace(CONFIG, side_by_side="concat"))


def test_biases_even_out_the_load() -> None:
    """A router that prefers two of five experts for almost every token: the bias alone spreads them."""
    made = experts(experts=5, active=2, bias_rate=0.003)
    made.bias.zero_()
    with torch.no_grad():
        made.router.weight[:2] += 0.4
    x = stream(1, 400, DIM) + 0.3
    model = HybridLM(replace(CONFIG, pattern="none", depth=1))
    model.blocks[0].mlp = made
    balance, loads = Balance(model, None), []
    for _ in range(200):
        _, routing = made(x)
        balance.loss([routing], torch.tensor(1))
        loads.append(balance.busiest().item())
        balance.step()
    assert loads[0] > 1.4 and loads[-1] < 1.05, loads


def test_what_a_token_costs_is_its_own_experts() -> None:
    made = experts(experts=6, active=2, dim=5, shared=4)
    cost, every = made.cost(), sum(weight.numel() for weight in made.parameters())
    assert cost.parameters == every and cost.idle_params == 4 * (3 * 5 * DIM)
    assert cost.flops(10) == 2 * 10 * (every - cost.idle_params)
