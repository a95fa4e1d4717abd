"""Mutants of the GPU kernels, of the adapters of packages, and of the choice between them."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

KERNELS = "tests/hybrid_sp/kernels"
LINEAR = f"{KERNELS}/test_triton_linear.py"
ALONE = f"{LINEAR}::test_parity_fp32_on_one_device"
GATES = f"{KERNELS}/test_vector_decay.py"
FLA = f"{KERNELS}/test_fla_adapter.py"
TWO_SPANS = f"{FLA}::test_agrees_with_the_token_loop[half, on 2]"
FLASH = f"{KERNELS}/test_flash.py"
SOFTMAX = f"{KERNELS}/test_softmax_kernels.py"
BACKENDS = "tests/hybrid_sp/test_backends.py"
STRONG = "tests/hybrid_sp/ops/test_strong_decays.py"

KERNEL_MUTANTS = [
    # The scan over chunks.
    Mutant(
        name="scan: sign of what spans a chunk in the gradient of its decays",
        file="hybrid_sp/kernels/gpu/chunk_scan.py",
        old="(tl.cumsum(b_e, 0) - b_e) + spanning",
        new="(tl.cumsum(b_e, 0) - b_e) - spanning",
        test=f"{ALONE}[scalar]",
    ),
    Mutant(
        name="scan: what a token writes given to its own decay",
        file="hybrid_sp/kernels/gpu/chunk_scan.py",
        old="(tl.cumsum(b_e, 0) - b_e)",
        new="tl.cumsum(b_e, 0)",
        test=f"{ALONE}[scalar]",
    ),
    Mutant(
        name="scan: pairs within a chunk counted where they begin and where they end",
        file="hybrid_sp/kernels/gpu/chunk_scan.py",
        old="tl.cumsum(b_r - b_i, 0, reverse=True)",
        new="tl.cumsum(b_r, 0, reverse=True)",
        test=f"{ALONE}[scalar]",
    ),
    Mutant(
        name="scan: mask of pairs not reversed",
        file="hybrid_sp/kernels/gpu/chunk_scan.py",
        old="m_pairs = o_c[:, None] <= o_c[None, :]",
        new="m_pairs = o_c[:, None] >= o_c[None, :]",
        test=f"{ALONE}[none]",
    ),
    Mutant(
        name="scan: pairs with later tokens",
        file="hybrid_sp/kernels/gpu/chunk_scan.py",
        old="= factor(tl.where(m_pairs, b_pairs, 0.0), DTYPE)",
        new="= factor(b_pairs, DTYPE)",
        test=f"{LINEAR}::test_nothing_leaks_from_later_tokens[scalar]",
    ),
    Mutant(
        name="scan: decays of reading and writing exchanged",
        file="hybrid_sp/kernels/gpu/chunk_scan.py",
        old="    if REVERSE:\n        b_through, b_after = b_after, b_through",
        new="    if not REVERSE:\n        b_through, b_after = b_after, b_through",
        test=f"{ALONE}[scalar]",
    ),
    Mutant(
        name="scan: scale of writing dropped",
        file="hybrid_sp/kernels/gpu/chunk_scan.py",
        old="written = write * y_unit * z_unit",
        new="written = y_unit * z_unit",
        test=f"{ALONE}[scalar]",
    ),
    Mutant(
        name="scan: unit of an fp16 factor dropped where the state is written",
        file="hybrid_sp/kernels/gpu/chunk_scan.py",
        old="written = write * y_unit * z_unit",
        new="written = write * z_unit",
        test=f"{LINEAR}::test_what_cancels_in_a_normaliser_is_multiplied_exactly[fp16-scalar]",
    ),
    Mutant(
        name="scan: state of fp16 without its unit",
        file="hybrid_sp/kernels/gpu/chunk_scan.py",
        old="unit = tl.where(largest > 0.0, largest, 1.0)",
        new="pass",
        test=f"{LINEAR}::test_fp16_does_not_overflow_in_the_state",
    ),
    Mutant(
        name="scan: what rounding leaves over of x dropped in pairs",
        file="hybrid_sp/kernels/gpu/chunk_scan.py",
        old="b_pairs += tl.dot(b_x_rest, tl.trans(b_y), input_precision=PRECISION)",
        new="pass",
        test=f"{LINEAR}::test_what_cancels_in_a_normaliser_is_multiplied_exactly[bf16-scalar]",
    ),
    Mutant(
        name="scan: what rounding leaves over of y dropped in pairs",
        file="hybrid_sp/kernels/gpu/chunk_scan.py",
        old="b_pairs += tl.dot(b_x, tl.trans(b_y_rest), input_precision=PRECISION)",
        new="pass",
        test=f"{LINEAR}::test_what_cancels_in_a_normaliser_is_multiplied_exactly[bf16-scalar]",
    ),
    Mutant(
        name="scan: what rounding leaves over of the state dropped",
        file="hybrid_sp/kernels/gpu/chunk_scan.py",
        old="b_out += tl.dot(b_x, b_rest, input_precision=PRECISION)",
        new="pass",
        test=f"{LINEAR}::test_what_cancels_in_a_normaliser_is_multiplied_exactly[bf16-scalar]",
    ),
    Mutant(
        name="scan: key heads dealt out in turn",
        file="hybrid_sp/kernels/gpu/chunk_scan.py",
        old="p_y += i_b * s_yb + (i_h // R_xy) * s_yh",
        new="p_y += i_b * s_yb + (i_h % (H // R_xy)) * s_yh",
        test=f"{ALONE}[fixed]",
    ),
    Mutant(
        name="scan: dropped decay of a transposed state",
        file="hybrid_sp/kernels/gpu/chunk_scan.py",
        old="b_S *= tl.exp(tl.load(p_decay + n * s_c + o_w, mask=m_w, other=0.0))[None, :]",
        new="pass",
        test=f"{ALONE}[vector]",
    ),
    Mutant(
        name="scan: given pairs added with every piece",
        file="hybrid_sp/kernels/gpu/chunk_scan.py",
        old='"none" if z is None or (pairs == "given" and not first) else pairs',
        new='"none" if z is None else pairs',
        test=f"{LINEAR}::test_wide_dims_are_taken_in_pieces[vector]",
    ),
    Mutant(
        name="scan: pieces of a state that overwrite one another",
        file="hybrid_sp/kernels/gpu/chunk_scan.py",
        old="added = before if not first else None",
        new="added = None if not first else None",
        test=f"{LINEAR}::test_wide_dims_are_taken_in_pieces[scalar]",
    ),
    # States between segments.
    Mutant(
        name="summary: dropped decay",
        file="hybrid_sp/kernels/gpu/state_passing.py",
        old="            b_S *= decay\n            total +=",
        new="            total +=",
        test=f"{ALONE}[scalar]",
    ),
    Mutant(
        name="summary: dropped decay per key channel",
        file="hybrid_sp/kernels/gpu/state_passing.py",
        old="            b_S *= tl.exp(b_a)[:, None]\n",
        new="",
        test=f"{ALONE}[vector]",
    ),
    Mutant(
        name="fold: dropped decay of a segment",
        file="hybrid_sp/kernels/gpu/state_passing.py",
        old="b_S *= tl.exp(tl.load(p_total + i_s * BH + i_bh))",
        new="b_S *= 1.0",
        test=f"{ALONE}[scalar]",
    ),
    Mutant(
        name="fold: a gradient that goes back over the begin of a document",
        file="hybrid_sp/kernels/gpu/state_passing.py",
        old="        if REVERSE:\n            b_S = tl.where((flags & BEGINS)",
        new="        if False:\n            b_S = tl.where((flags & BEGINS)",
        test=f"{ALONE}[fixed]",
    ),
    Mutant(
        name="fold: what comes back to a span's end given to its start",
        file="hybrid_sp/kernels/gpu/state_passing.py",
        old="FROM=LAST if reverse else FIRST",
        new="FROM=FIRST",
        test=f"{ALONE}[scalar]",
    ),
    Mutant(
        name="segments: the begin of a document not flagged",
        file="hybrid_sp/kernels/gpu/segments.py",
        old=" | NEW * p.begins_document",
        new="",
        test=f"{ALONE}[fixed]",
    ),
    Mutant(
        name="carried: an entering state not cut at a document",
        file="hybrid_sp/kernels/gpu/linear.py",
        old="return S if cut_off is None else",
        new="return S if True else",
        test=f"{ALONE}[normalized]",
    ),
    Mutant(
        name="carried: a segment's own decay on the state that enters it",
        file="hybrid_sp/kernels/pieces.py",
        old="before[here.start + 1 : here.stop] = totals[here.start : here.stop - 1].cumsum(0)",
        new="before[here] = totals[here].cumsum(0)",
        test=f"{ALONE}[scalar]",
    ),
    Mutant(
        name="carried: no entering state in the gradient of queries",
        file="hybrid_sp/kernels/gpu/linear.py",
        old="S = (h if S_in is None else h +",
        new="S = (h if S_in is None else h + 0 *",
        test=f"{ALONE}[none]",
    ),
    Mutant(
        name="linear: gradients of the heads of a group dealt out in turn",
        file="hybrid_sp/kernels/heads.py",
        old="x_BTHK.unflatten(2, (groups, -1)).sum(3)",
        new="x_BTHK.unflatten(2, (-1, groups)).sum(2)",
        test=f"{ALONE}[fixed]",
    ),
    # Decays per key channel.
    Mutant(
        name="gates: sums of decays shifted by one",
        file="hybrid_sp/kernels/gpu/vector_decay.py",
        old="b_until = _decays(b_g, o_c + 1, o_end,",
        new="b_until = _decays(b_g, o_c, o_end,",
        test=f"{GATES}::test_strong_decays_cost_the_others_nothing[small-plain]",
    ),
    Mutant(
        name="gates: exclusive ignored",
        file="hybrid_sp/kernels/gpu/vector_decay.py",
        old="through = o_c if EXCLUSIVE else o_c + 1",
        new="through = o_c + 1",
        test=f"{GATES}::test_strong_decays_cost_the_others_nothing[small-bonus]",
    ),
    Mutant(
        name="gates: gradient of the bonus without keys",
        file="hybrid_sp/kernels/gpu/vector_decay.py",
        old="b_du = tl.sum(b_self[:, None] * b_q * b_k, 0)",
        new="b_du = tl.sum(b_self[:, None] * b_q, 0)",
        test=f"{GATES}::test_strong_decays_cost_the_others_nothing[small-bonus]",
    ),
    Mutant(
        name="gates: gradient of the bonus of one chunk",
        file="hybrid_sp/kernels/gpu/vector_decay.py",
        old="d_bonus.sum((0, 1))",
        new="d_bonus[0].sum(0)",
        test=f"{GATES}::test_spans_documents_heads_and_strides[1-4-True]",
    ),
    Mutant(
        name="gates: sign of what keys give to the gradient of decays",
        file="hybrid_sp/kernels/gpu/vector_decay.py",
        old="b_dg = _sums(b_q * b_dq - b_k * b_dk, o_c, o_end, C, DTYPE)",
        new="b_dg = _sums(b_q * b_dq + b_k * b_dk, o_c, o_end, C, DTYPE)",
        test=f"{GATES}::test_strong_decays_cost_the_others_nothing[small-plain]",
    ),
    Mutant(
        name="gates: gradient of a chunk's decay dropped",
        file="hybrid_sp/kernels/gpu/vector_decay.py",
        old="        b_dg += tl.load(p_d_totals + o_k, mask=o_k < K, other=0.0)[None, :]\n",
        new="",
        test=f"{GATES}::test_strong_decays_cost_the_others_nothing[small-plain]",
    ),
    Mutant(
        name="gates: gradients of scores without a unit in fp16",
        file="hybrid_sp/kernels/gpu/vector_decay.py",
        old="        b_dq *= unit\n",
        new="        pass\n",
        test=f"{GATES}::test_large_gradients_fit_into_fp16",
    ),
    Mutant(
        name="gates: one bf16 part where fp32 needs three",
        file="hybrid_sp/kernels/gpu/vector_decay.py",
        old="        sums += _dot(ones, rest - part, tl.bfloat16)\n",
        new="        pass\n",
        test=f"{GATES}::test_strong_decays_cost_the_others_nothing[small-plain]",
    ),
    # Strong decays.
    Mutant(
        name="floor: of log decays, left out",
        file="hybrid_sp/checks.py",
        old="return log_decay.clamp(min=FLOORS[dtype])",
        new="return log_decay",
        test=f"{STRONG}::test_what_follows_a_mask_decays_as_it_says[scalar--1e+30]",
    ),
    Mutant(
        name="floor: fp64 decays floor_decays where fp32 decays to zero",
        file="hybrid_sp/checks.py",
        old="torch.float64: -768.0",
        new="torch.float64: -104.0",
        test=f"{STRONG}::test_a_floor_decays_to_zero_and_is_a_number_of_every_dtype[torch.float64]",
    ),
    Mutant(
        name="floor: minus infinity taken",
        file="hybrid_sp/checks.py",
        old='lowest != float("-inf")',
        new="True",
        test=f"{STRONG}::test_minus_infinity_is_refused[(1, 6, 2, 4)]",
    ),
    Mutant(
        name="floor: values looked at on a device",
        file="hybrid_sp/checks.py",
        old='if log_decay.device.type == "cpu":',
        new="if True:",
        test=f"{STRONG}::test_no_value_is_looked_at_on_a_device",
    ),
    Mutant(
        name="floor: not of the delta rule",
        file="hybrid_sp/ops/delta_rule.py",
        old='    log_decay = floor_decays("delta_rule", log_decay, compute_dtype(q))\n',
        new="",
        test=f"{STRONG}::test_whole_chunks_agree_with_the_token_loop[64-delta-scalar]",
    ),
    Mutant(
        name="floor: not of linear attention",
        file="hybrid_sp/ops/linear_attention.py",
        old='    log_decay = floor_decays("linear_attention", log_decay, compute_dtype(q))\n',
        new="",
        test=f"{STRONG}::test_minus_infinity_is_refused_before_any_communication",
    ),
    # The passes of fla-core.
    Mutant(
        name="fla: transition of a span dropped",
        file="hybrid_sp/kernels/gpu/fla_delta.py",
        old="runs.leaving(final[..., width:])",
        new="torch.zeros_like(runs.leaving(final[..., width:]))",
        test=f"{FLA}::test_agrees_with_the_token_loop[kda on 2, zigzag, documents, states]",
    ),
    Mutant(
        name="fla: what comes back to the ends of spans dropped",
        file="hybrid_sp/kernels/gpu/fla_delta.py",
        old="dht=runs.leaving_backward(dS_out)",
        new="dht=None",
        test=TWO_SPANS,
    ),
    Mutant(
        name="fla: decays in natural units",
        file="hybrid_sp/kernels/gpu/fla_delta.py",
        old="scale=fla.RCP_LN2",
        new="scale=1.0",
        test=TWO_SPANS,
    ),
    Mutant(
        name="fla: states made again without those that enter",
        file="hybrid_sp/kernels/gpu/fla_delta.py",
        old="sums, runs.entering(S_in), final=False",
        new="sums, None, final=False",
        test=TWO_SPANS,
    ),
    Mutant(
        name="fla: a state that enters a document",
        file="hybrid_sp/kernels/gpu/fla_delta.py",
        old="if piece.begins_span and piece.reached]",
        new="if piece.begins_span]",
        test=f"{FLA}::test_runs_of_two_rows_with_documents_inside_and_at_the_edges_of_spans",
    ),
    Mutant(
        name="fla: decays per head where Triton miscompiles them",
        file="hybrid_sp/kernels/gpu/fla_delta.py",
        old="return g.unsqueeze(-1).expand(*g.shape, key)",
        new="return g",
        test=f"{FLA}::test_decays_per_head_become_vectors_where_triton_is_wrong[True-False]",
    ),
    # Kernels of softmax attention.
    Mutant(
        name="flash: lse of the wrong layout",
        file="hybrid_sp/kernels/softmax/flash_attn.py",
        old="lse.transpose(1, 2).contiguous()",
        new="lse.transpose(1, 2)",
        test=f"{FLASH}::test_blocks[flash-attn-4-64]",
    ),
    Mutant(
        name="flash: lse not asked for",
        file="hybrid_sp/kernels/softmax/flash_attn.py",
        old="causal=causal, return_lse=True)",
        new="causal=causal)",
        test=f"{FLASH}::test_blocks[flash-attn-4-64]",
    ),
    Mutant(
        name="flash: columns of zeros handed back",
        file="hybrid_sp/kernels/softmax/flash_attn.py",
        old="return dq[..., :dim], dk[..., :dim], dv[..., :dim]",
        new="return dq, dk, dv",
        test=f"{FLASH}::test_blocks[flash-attn-5]",
    ),
    Mutant(
        name="flash: an older version where the newer is installed too",
        file="hybrid_sp/kernels/softmax/flash_attn.py",
        old="reverse=(9, 0) <= chip < (12, 0)",
        new="reverse=False",
        test=f"{FLASH}::test_versions[(9, 0)-{{'flash-attn': '2.8.3.post2', 'flash-attn-4': '4.0.0b36'}}"
        "-flash-attn-4 4.0.0b36]",
    ),
    Mutant(
        name="CUDA softmax: rows of lse that are no rows count",
        file="hybrid_sp/kernels/softmax/aten.py",
        old='value=float("inf")',
        new="value=0.0",
        test=f"{SOFTMAX}::test_cuda_kernels_stood_in_for[EFFICIENT-37-50-8]",
    ),
    Mutant(
        name="CUDA softmax: lse as the flash kernel does not read it",
        file="hybrid_sp/kernels/softmax/aten.py",
        old="lse, random = lse.transpose(1, 2).contiguous()",
        new="lse, random = lse.transpose(1, 2)",
        test=f"{SOFTMAX}::test_cuda_kernels_stood_in_for[FLASH-37-50-8]",
    ),
    Mutant(
        name="CUDA softmax: fp32 by a kernel that rounds it",
        file="hybrid_sp/kernels/softmax/attend.py",
        old="FLASH if q.dtype != torch.float32 and",
        new="FLASH if",
        test=f"{SOFTMAX}::test_cuda_kernels_on_fake_tensors[torch.float32-64-efficient_attention]",
    ),
    # The choice of a backend.
    Mutant(
        name="backend: chosen by what can be imported",
        file="hybrid_sp/backends.py",
        old="why_not = only_torch or _unfit(other, x.device, x.dtype, max(widths))",
        new="why_not = only_torch or _unfit(other, x.device, x.dtype, max(widths))\n"
        '    why_not = why_not or ("" if sys.modules.get(other, 1) else "is not installed")',
        test=f"{BACKENDS}::test_the_choice_does_not_depend_on_what_is_installed",
    ),
    Mutant(
        name="backend: a package that nobody asked for",
        file="hybrid_sp/backends.py",
        old='"torch" if why_not or operator == "softmax_attention" else other',
        new='"torch" if why_not else other',
        test=f"{BACKENDS}::test_a_device_has_its_own[softmax_attention]",
    ),
    Mutant(
        name="backend: the interpreter chosen on a CPU",
        file="hybrid_sp/backends.py",
        old='(requested == "auto" and x.device.type == "cpu")',
        new='(requested == "auto" and x.device.type == "cpu" and not interpreted())',
        test=f"{BACKENDS}::test_a_cpu_has_torch[linear_attention-1]",
    ),
    Mutant(
        name="backend: said at every call",
        file="hybrid_sp/backends.py",
        old="@functools.cache\ndef _say",
        new="_cached = functools.cache\n\n\ndef _say",
        test=f"{BACKENDS}::test_every_choice_is_said_once",
    ),
    Mutant(
        name="entering states left out of the gradient of decays",
        file="hybrid_sp/kernels/reference/linear.py",
        old="tokens.writes_backward(kept.states[block.chunks], d_after)",
        new="tokens.writes_backward(0 * kept.states[block.chunks], d_after)",
        test="tests/hybrid_sp/ops/test_parity.py::test_parity_fp64[2-contiguous-linear]",
    ),
]
