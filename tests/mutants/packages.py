"""Mutants of the adapters of packages, and of the choice between backends."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

KERNELS = "tests/hybrid_sp/kernels"
FLA = f"{KERNELS}/test_fla_adapter.py"
TWO_SPANS = f"{FLA}::test_agrees_with_the_token_loop[half, on 2]"
FLASH = f"{KERNELS}/test_flash.py"
SOFTMAX = f"{KERNELS}/test_softmax_kernels.py"
BACKENDS = "tests/hybrid_sp/test_backends.py"

PACKAGE_MUTANTS = [
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
        name="backend: a Triton that miscompiles on Hopper",
        file="hybrid_sp/ops/linear_attention.py",
        old="    check_triton(device)\n",
        new="",
        test=f"{BACKENDS}::test_a_triton_that_miscompiles_on_hopper_is_refused_there[3.6.0]",
    ),
    Mutant(
        name="backend: a package that nobody asked for",
        file="hybrid_sp/backends.py",
        old='"torch" if why_not or other == "flash_attn" else other',
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
]
