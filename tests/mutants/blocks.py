"""Ways to break what is believed of blocks: patterns, experts and their balance, mixers side by side, and dry runs."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

PATTERN = "tests/layers/test_pattern.py"
MOE = "tests/layers/test_moe.py"
RANKS = f"{MOE}::test_losses_and_balance_are_those_of_all_tokens[2]"
EXPERTS = "tests/recipes/test_experts.py"
DRY = "tests/recipes/test_dry_run.py"

BLOCK_MUTANTS = [
    Mutant(
        name="a tail that ends before the depth",
        file="layers/pattern.py",
        old="repeats = -(-depth // len(tile)) if cut else depth // len(tile)",
        new="repeats = depth // len(tile)",
        test=f"{PATTERN}::test_words_of_a_pattern",
    ),
    Mutant(
        name="words in parentheses once",
        file="layers/pattern.py",
        old="' '.join([group[2]] * _count(group[1]))",
        new="' '.join([group[2]])",
        test=f"{PATTERN}::test_words_of_a_pattern",
    ),
    Mutant(
        name="options of a layer that replace those of the model",
        file="layers/config.py",
        old="**config.mixers.get(name, {}) | dict(layer.options)",
        new="**(dict(layer.options) or config.mixers.get(name, {}))",
        test=f"{PATTERN}::test_options_of_one_layer_come_before_those_of_the_model",
    ),
    Mutant(
        name="a block without a mixer forgets the tokens that it has read",
        file="layers/block.py",
        old="            cache = cache.extended(x_BTD.shape[1])\n",
        new="            pass\n",
        test=f"{PATTERN}::test_blocks_of_one_part_have_that_part_alone",
    ),
    Mutant(
        name="idle experts counted as active",
        file="layers/moe.py",
        old="Cost(matmul_params=-idle, idle_params=idle)",
        new="Cost()",
        test=f"{MOE}::test_what_a_token_costs_is_its_own_experts",
    ),
    Mutant(
        name="outputs of experts in the order of experts",
        file="layers/moe.py",
        old="y_MD.index_select(0, order_M.argsort())",
        new="y_MD.index_select(0, order_M)",
        test=f"{MOE}::test_experts_by_hand",
    ),
    Mutant(
        name="the bias weighs experts",
        file="layers/moe.py",
        old="weights_NK = scores_NE.gather(-1, experts_NK)",
        new="weights_NK = biased_NE.gather(-1, experts_NK)",
        test=f"{MOE}::test_experts_by_hand",
    ),
    Mutant(
        name="weights of experts divided by the sum of all scores",
        file="layers/moe.py",
        old="weights_NK / weights_NK.sum(-1, keepdim=True)",
        new="weights_NK / scores_NE.sum(-1, keepdim=True)",
        test=f"{MOE}::test_experts_by_hand",
    ),
    Mutant(
        name="the host counts the tokens of experts on a device",
        file="layers/moe.py",
        old='if x_MD.device.type != "cpu":',
        new='if x_MD.device.type == "none":',
        test=f"{EXPERTS}::test_the_host_waits_for_no_expert",
    ),
    Mutant(
        name="a load balanced by the counts of this rank",
        file="layers/balance.py",
        old="counts_LE, m = message[:-1].view_as(local_LE), message[-1].double()",
        new="counts_LE, m = local_LE, message[-1].double()",
        test=RANKS,
    ),
    Mutant(
        name="an auxiliary loss weighed by the labels of this rank",
        file="layers/balance.py",
        old="message[-1].double()",
        new="valid.double()",
        test=RANKS,
    ),
    Mutant(
        name="biases moved by the counts of the last pass",
        file="layers/balance.py",
        old="counts_LE if self.counts_LE is None else self.counts_LE + counts_LE",
        new="counts_LE",
        test=RANKS,
    ),
    Mutant(
        name="biases that raise the load of busy experts",
        file="layers/balance.py",
        old="one.bias -= ",
        new="one.bias += ",
        test=f"{MOE}::test_biases_even_out_the_load",
    ),
    Mutant(
        name="a bias of experts rounded with the model",
        file="layers/precision.py",
        old="itertools.chain(module.named_parameters(), module.named_buffers())",
        new="itertools.chain(module.named_parameters())",
        test=f"{MOE}::test_the_bias_stays_wide_and_is_no_parameter",
    ),
    Mutant(
        name="biases of experts not saved",
        file="recipes/optim.py",
        old="{**self.masters, **self.buffers}.items()",
        new="self.masters.items()",
        test=f"{EXPERTS}::test_biases_are_saved_with_the_weights",
    ),
    Mutant(
        name="a training without the auxiliary loss",
        file="recipes/train.py",
        old="(loss if routing is None else loss + self.balance.loss(routing, count)).backward()",
        new="(loss if routing is None else loss + self.balance.loss(routing, count).detach()).backward()",
        test=f"{EXPERTS}::test_the_auxiliary_loss_is_part_of_the_training",
    ),
    Mutant(
        name="outputs side by side joined without a norm",
        file="layers/side_by_side.py",
        old="norm(y_BTD) / len(outputs)",
        new="y_BTD / len(outputs)",
        test=f"{MOE}::test_mixers_side_by_side_by_hand",
    ),
    Mutant(
        name="mixers side by side that wait before the next one sends",
        file="layers/side_by_side.py",
        old="start_mixer(mixer, x_BTD, shard) for mixer",
        new="(lambda y: lambda: y)(mixer(x_BTD, shard)[0]) for mixer",
        test=f"{MOE}::test_every_exchange_side_by_side_is_sent_before_any_is_waited_for",
    ),
    Mutant(
        name="a mixer side by side that reads the cache of the first",
        file="layers/side_by_side.py",
        old="            first = last\n",
        new="",
        test=f"{MOE}::test_decoding_is_the_parallel_forward",
    ),
    Mutant(
        name="a dry run that imports what checkpoints need",
        file="recipes/train.py",
        old="from recipes import config, data, optim, record, tracker\n",
        new="from recipes import checkpoint as _, config, data, optim, record, tracker\n",
        test=f"{DRY}::test_a_dry_run_takes_no_module_of_checkpoints",
    ),
    Mutant(
        name="a norm that no part has",
        file="layers/config.py",
        old="head, norms = config.vocab * config.dim, 1",
        new="head, norms = config.vocab * config.dim, 2",
        test=f"{PATTERN}::test_parameters_by_kind_and_what_is_counted",
    ),
]
