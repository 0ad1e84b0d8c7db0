"""Plants faults, one at a time, and checks that the suite catches each.

    python tests/mutants.py [--list] [--check] [-j 2] [name ...]

Each mutant is one small change of one file, and names the tests that must fail with it. It is
applied to a temporary copy of the checkout, in which `lora` and its `kernels` are laid out as they
are installed, so that the copy is imported in the test process and in everything that it starts.
The checkout itself is never changed.

A mutant is caught if pytest exits with status 1, which is "some tests failed". If it exits with 0,
the fault has survived. Any other status (a test that is not there, a file that cannot be collected,
a run that takes too long) is an error of this list. That the tests pass without a mutant is not
checked here: run the suite first.

--check verifies, without running a test, that every text to be replaced occurs exactly once and
that the result can be parsed. Exit status 1 unless everything is as it should be.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds of one run of pytest
SKIPPED = (".git", ".venv", "venv*", "build", "dist", "__pycache__", ".*_cache", "*.egg-info")
IMPORTED_FROM = "import lora, lora.kernels; print(lora.__file__); print(lora.kernels.__file__)"


class Mutant(NamedTuple):
    """A fault: `old`, which occurs once in `file`, becomes `new`, and `tests` must catch it.

    tests: files or node ids; words such as NAME=VALUE among them are set in the environment.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


INTERPRETED = "TRITON_INTERPRET=1"  # as test_kernels_interpreter.py runs these files
FUSED = "tests/test_kernels_fused.py::"
PROCESSES = "tests/test_distributed.py::test_several_processes_are_one"

MUTANTS = [
    # kernels/
    Mutant(
        "branch-in-the-pipelined-loop",
        "kernels/triton_input_grads.py",
        "        if NEED_DX:\n            dx = tl.dot",
        "        if NEED_DX and tl.program_id(2) == 0:\n            dx = tl.dot",
        ("tests/test_ptx.py::test_the_compiled_kernels_are_right_and_break_no_rule",),
    ),
    Mutant(
        "second-derivative-without-scale",
        "kernels/ops.py",
        "grad_s if ds is None else grad_s + alpha * ds, 1.0",
        "grad_s if ds is None else grad_s + ds, 1.0",
        ("tests/test_kernels_lora_linear.py::test_a_loss_with_a_gradient_penalty",),
    ),
    Mutant(
        "any-format-version",
        "lora/adapter/storage.py",
        'if verified and facts.get("format") != _FORMAT:',
        'if verified and facts.get("format") is None:',
        ("tests/test_adapter_files.py::test_hostile_metadata_is_refused",),
    ),
    Mutant(
        "digest-without-dtype",
        "lora/adapter/storage.py",
        "{key}\\0{tensor.dtype}\\0{tuple(",
        "{key}\\0{tuple(",
        ("tests/test_adapter_files.py::test_the_digest_tells_names_dtypes_shapes_and_bytes_apart",),
    ),
    Mutant(
        "small-convolution-updates-rounded-away",
        "lora/conv.py",
        "half = self.weight.element_size() < 4 or",
        "half = self.weight.element_size() < 2 or",
        ("tests/test_conv.py::test_small_updates_are_not_rounded_away_in_half_precision",),
    ),
    Mutant(
        "transposed-dora-norms-of-the-rows",
        "lora/adapter/merge.py",
        "            if layer.transposed:\n                squares +=",
        "            if layer.shape[0] == layer.shape[1]:\n                squares +=",
        ("tests/test_adapter_merge.py::test_dora_has_the_norms_of_the_rows_of_out_in",),
    ),
    Mutant(
        "patterns-match-within-a-name",
        "lora/targets.py",
        'rf"(?:.*\\.)?(?:{key})"',
        'rf".*(?:{key})"',
        ("tests/test_patch.py::test_bad_options_are_named_and_touch_nothing",),
    ),
    Mutant(
        "one-mask-for-all-processes",
        "lora/tensor_parallel.py",
        "step = (self.rank * _SEED_STEP",
        "step = (0 * _SEED_STEP",
        (f"{PROCESSES}[2-layers_tensor_parallel]",),
    ),
    Mutant(
        "one-mask-for-all-steps",
        "lora/tensor_parallel.py",
        "device=device).random_(-(2**63), None)",
        "device=device).zero_()",
        (f"{PROCESSES}[2-layers_tensor_parallel]",),
    ),
    Mutant(
        "formula-without-keep-scale",
        "kernels/reference.py",
        "x * mask / (1 - p)",
        "x * mask",
        ("tests/test_kernels_lora_linear.py::test_error_is_at_most_twice_pytorchs",),
    ),
    Mutant(
        "rows-of-disabled-parts",
        "kernels/reference.py",
        "for size, stop, on in zip(splits, stops, enabled, strict=True) if on",
        "for size, stop, on in zip(splits, stops, enabled, strict=True)",
        ("tests/test_kernels_lora_linear.py::test_gradcheck_and_gradgradcheck",),
    ),
    Mutant(
        "dropped-bias-gradient",
        "kernels/ops.py",
        "    if ctx.needs_input_grad[2]:\n",
        "    if ctx.needs_input_grad[2] and x is not None:\n",
        ("tests/test_kernels_lora_linear.py::test_what_is_not_asked_for_is_not_computed",),
    ),
    Mutant(
        "input-gradient-without-mask",
        "kernels/ops.py",
        "dx = dx if bits is None else keep(dx, bits)",
        "dx = dx if bits is None else dx.clone()",
        ("tests/test_kernels_lora_linear.py::test_gradcheck_and_gradgradcheck",),
    ),
    Mutant(
        "b-gradient-without-scale",
        "kernels/ops.py",
        "grads = [_mm(dy_j.t(), s_j, alpha)",
        "grads = [_mm(dy_j.t(), s_j, 1.0)",
        ("tests/test_kernels_lora_linear.py::test_any_rank_and_any_number_of_rows",),
    ),
    Mutant(
        "lorafa-keeps-the-input",
        "kernels/ops.py",
        "x if needs_A or needs_weight else None,",
        "x,",
        (
            "tests/test_training_step.py::TestLongSequences::"
            "test_a_layer_keeps_x_S_and_mask_bits_for_every_token[0.0-dtype0-lorafa]",
        ),
    ),
    Mutant(
        "drop-level-unclamped",
        "kernels/dropout.py",
        "return min(round(p * _LEVELS), _LEVELS - 1)",
        "return round(p * _LEVELS)",
        ("tests/test_kernels_dropout.py::test_extreme_probabilities",),
    ),
    Mutant(
        "keep-gradient-without-mask",
        "kernels/dropout.py",
        "return keep(grad, *ctx.saved_tensors), None",
        "return grad.contiguous(), None",
        ("tests/test_kernels_lora_linear.py::test_gradcheck_and_gradgradcheck",),
    ),
    Mutant(
        "seed-truncated",
        "kernels/dropout.py",
        "(seed & _MASK32, seed >> 32 & _MASK32)",
        "(seed & _MASK32, zero)",
        (INTERPRETED, FUSED + "test_the_masks_are_the_references_bit_by_bit[5-16-0.5]"),
    ),
    Mutant(
        "one-mask-in-compiled-graphs",
        "kernels/dispatch.py",
        "draw_keep_bits(rows * columns, p, _own(x), device=x.device)",
        "draw_keep_bits(rows * columns, p, None, device=x.device)",
        ("tests/test_compile.py::test_every_draw_of_a_compiled_graph_is_one_of_its_own",),
    ),
    Mutant(
        "scale-of-the-asked-probability",
        "kernels/dispatch.py",
        "alpha *= keep_scale(dropout_p)",
        "alpha /= 1 - dropout_p",
        ("tests/test_kernels_lora_linear.py::test_output_and_gradients_equal_the_formula",),
    ),
    Mutant(
        "old-gpus-accepted",
        "kernels/dispatch.py",
        "get_device_capability(device) < (8, 0)",
        "get_device_capability(device) < (7, 0)",
        ("tests/test_kernels_dispatch.py::test_old_gpus_are_named",),
    ),
    Mutant(
        "autocast-of-fp32-inputs-alone",
        "kernels/dispatch.py",
        "x.is_floating_point() and x.dtype != torch.float64:",
        "x.dtype == torch.float32:",
        (
            "tests/test_training_step.py::TestAutocast::"
            "test_a_layers_output_and_input_gradient_have_the_formulas_dtypes",
        ),
    ),
    Mutant(
        "graph-break-at-the-choice-of-code",
        "kernels/dispatch.py",
        "_obstacle._dynamo_marked_constant = True",
        "_obstacle._dynamo_marked_constant = False",
        (
            "tests/test_training_step.py::TestCompiling::"
            "test_a_step_is_one_graph_with_eagers_numbers[plain-0.2-None]",
        ),
    ),
    Mutant(
        "dtensor-in-the-autograd-function",
        "kernels/dispatch.py",
        '    if "DTensor" in wrapped:\n',
        '    if "DTensor" in wrapped and impl == "triton":\n',
        (PROCESSES + "[2-layers_dtensor]",),
    ),
    Mutant(
        "few-tokens-without-bias",
        "kernels/fused.py",
        "            y = F.linear(x, weight, bias)\n",
        "            y = F.linear(x, weight)\n",
        (INTERPRETED, FUSED + "test_few_tokens_with_zero_b_give_the_frozen_output_to_the_bit"),
    ),
    Mutant(
        "fused-second-derivative-without-keep-scale",
        "kernels/fused.py",
        "ctx.p), ctx.scaling * keep_scale(ctx.p)",
        "ctx.p), ctx.scaling",
        (INTERPRETED, FUSED + "test_gradients_of_gradients_equal_pytorchs"),
    ),
    Mutant(
        "philox-of-other-rounds",
        "kernels/tiling.py",
        "zero, zero, n_rounds=7)",
        "zero, zero, n_rounds=10)",
        (INTERPRETED, FUSED + "test_the_masks_are_the_references_bit_by_bit[5-16-0.5]"),
    ),
    Mutant(
        "last-disabled-part-unwritten",
        "kernels/tiling.py",
        "if columns is not None and columns > at:",
        "if columns is not None and columns < at:",
        (
            INTERPRETED,
            FUSED + "test_error_is_at_most_twice_pytorchs[float32-float32-first and last part off]",
        ),
    ),
    Mutant(
        "slab-stride-of-one-part",
        "kernels/triton_expand.py",
        "at += M.to(tl.int64) * R",
        "at += M.to(tl.int64) * r",
        (
            INTERPRETED,
            FUSED + "test_without_gradients_the_output_is_the_same_to_the_bit",
        ),
    ),
    Mutant(
        "mask-repeated-in-every-tile",
        "kernels/triton_shrink.py",
        "keep_mask(seed, rows, k, level, BLOCK_K)",
        "keep_mask(seed, rows, 0, level, BLOCK_K)",
        (INTERPRETED, FUSED + "test_the_masks_are_the_references_bit_by_bit[70-41-0.05]"),
    ),
    Mutant(
        "first-parts-s-for-all",
        "kernels/triton_factor_grads.py",
        "s_ptr + wide_rows * R + part * r + ranks[None, :]",
        "s_ptr + wide_rows * R + ranks[None, :]",
        (
            INTERPRETED,
            FUSED + "test_error_is_at_most_twice_pytorchs[float32-float32-odd sizes]",
        ),
    ),
    Mutant(
        "fused-input-gradient-without-mask",
        "kernels/triton_input_grads.py",
        "dx = tl.where(keep, dx, 0.0)",
        "dx = tl.where(keep, dx, dx)",
        (INTERPRETED, FUSED + "test_the_masks_are_the_references_bit_by_bit[5-16-0.5]"),
    ),
    Mutant(
        "part-without-its-first-block",
        "kernels/triton_nf4.py",
        "            numbers += tl.load(first_ptr)\n",
        "            numbers = blocks\n",
        (INTERPRETED, "tests/test_kernels_nf4_fused.py::test_dequantised[40000-part-dtype0]"),
    ),
    Mutant(
        "tile-beyond-shared-memory",
        "kernels/triton_shrink.py",
        '    "sm_100": {\n        64: Config(rows=64, columns=128, warps=4, stages=3),',
        '    "sm_100": {\n        64: Config(rows=64, columns=512, warps=4, stages=3),',
        ("tests/test_kernels_aot.py",),
    ),
    Mutant(
        "tile-that-spills",
        "kernels/triton_factor_grads.py",
        "        16: Config(rows=64, columns=256, warps=8, stages=2),",
        "        16: Config(rows=64, columns=512, warps=2, stages=2),",
        ("tests/test_kernels_aot.py",),
    ),
    Mutant(
        "fp64-constant-in-a-kernel",
        "kernels/triton_nf4.py",
        "tl.full((BLOCKS,), 1.0, tl.float32)",
        "tl.full((BLOCKS,), 1.0, tl.float64)",
        ("tests/test_kernels_aot.py",),
    ),
    Mutant(
        "group-of-the-first-part",
        "kernels/nf4.py",
        "(block if parts.first is None else block + parts.first) // GROUP",
        "block // GROUP",
        ("tests/test_kernels_nf4.py::TestDefinition::test_a_part_knows_its_place",),
    ),
    Mutant(
        "nested-scale-truncated",
        "kernels/nf4.py",
        "(position.double() * _GRID + 0.5).float()",
        "(position.double() * _GRID).float()",
        (
            "tests/test_kernels_nf4.py::TestBitsandbytes::"
            "test_a_million_scales_take_the_same_neighbour",
        ),
    ),
    Mutant(
        "wrong-nf4-level",
        "kernels/nf4.py",
        "-0.5250730514526367",
        "-0.5250830514526367",
        ("tests/test_kernels_nf4.py::TestBitsandbytes::test_the_same_tables",),
    ),
    Mutant(
        "two-weights-in-one-buffer",
        "kernels/nf4_ops.py",
        "schema.name in _PRODUCTS and len(weights) == 1",
        "schema.name in _PRODUCTS",
        (
            "tests/test_kernels_nf4_tensor.py::TestElements::"
            "test_a_product_of_two_has_each_in_memory_of_its_own",
        ),
    ),
    Mutant(
        "rows-written-over-shared-scales",
        "kernels/nf4_ops.py",
        "return bool(others == weight.packed.count_nonzero())",
        "return bool(others >= weight.packed.count_nonzero())",
        (
            "tests/test_kernels_nf4_ops.py::TestWrites::"
            "test_what_could_not_be_held_is_refused_and_changes_nothing",
        ),
    ),
    Mutant(
        "own-values-quantised-again",
        "kernels/nf4_ops.py",
        "            return weight\n        new = NF4Tensor.quantize(",
        "            pass\n        new = NF4Tensor.quantize(",
        (PROCESSES + "[2-ddp_nf4]",),
    ),
    Mutant(
        "transposition-lost-in-new-data",
        "kernels/nf4_tensor.py",
        "        self._hold(new.parts)\n        self.transposed = new.transposed\n",
        "        self._hold(new.parts)\n",
        ("tests/test_kernels_nf4_ops.py::TestWrites::test_data_becomes_another_weight",),
    ),
    # lora/
    Mutant(
        "stale-merge-after-a-new-scaling",
        "lora/_base.py",
        "versions = (self.scaling, *((id(t), t.data_ptr(), t._version) for t in sources))",
        "versions = tuple((id(t), t.data_ptr(), t._version) for t in sources)",
        ("tests/test_base.py::test_a_stale_merge_is_never_used[linear-scaling]",),
    ),
    Mutant(
        "stale-merge-in-compiled-code",
        "lora/_base.py",
        "if self.training or not self.merge_weights or torch.compiler.is_compiling():",
        "if self.training or not self.merge_weights:",
        ("tests/test_compile.py::test_eval_without_gradients_never_uses_a_stale_merge",),
    ),
    Mutant(
        "merged-in-the-weights-dtype",
        "lora/_base.py",
        "dtype = torch.promote_types(self.weight.dtype, torch.float32)",
        "dtype = self.weight.dtype",
        ("tests/test_base.py::test_merged_weight_is_rounded_once_from_at_least_fp32",),
    ),
    Mutant(
        "merging-writes-to-the-weight",
        "lora/_base.py",
        "return torch.empty_like(self.weight).copy_(self.delta_weight().add_(self.weight))",
        "return self.weight.detach().add_(self.delta_weight())",
        ("tests/test_base.py::test_a_thousand_cycles_change_no_bit",),
    ),
    Mutant(
        "dropout-off-without-gradients",
        "lora/_base.py",
        "return p if self.lora_dropout.training else 0.0",
        "return p if self.lora_dropout.training and torch.is_grad_enabled() else 0.0",
        (
            "tests/test_training_step.py::TestCheckpointing::"
            "test_loss_and_gradients_are_the_same_to_the_bit[reentrant-0.2-plain]",
        ),
    ),
    Mutant(
        "sharded-layer-silent-in-eval-mode",
        "lora/_base.py",
        "        if self.is_sharded:\n            say_once(\n",
        "        if self.is_sharded and self.training:\n            say_once(\n",
        (PROCESSES + "[2-evaluates_alone]",),
    ),
    Mutant(
        "pissa-added-instead-of-subtracted",
        "lora/linear.py",
        "torch.cat([self.lora_B, -self.lora_B0], 1)",
        "torch.cat([self.lora_B, self.lora_B0], 1)",
        ("tests/test_variants.py::test_before_training_the_output_is_the_frozen_layers",),
    ),
    Mutant(
        "lorafa-trains-a",
        "lora/linear.py",
        ' or (own == "lora_A" and "use_lorafa" in self.variant)',
        "",
        ("tests/test_variants.py::test_what_is_frozen_keeps_its_bits",),
    ),
    Mutant(
        "parts-of-the-wrong-rank",
        "lora/merged_linear.py",
        "factors_A = torch.split(lora_A, lora_B.shape[1])",
        "factors_A = torch.split(lora_A, self.r)",
        ("tests/test_variants.py::test_every_merged_path_is_the_unmerged_one",),
    ),
    Mutant(
        "ones-in-rows-without-bias",
        "lora/merged_linear.py",
        "values.new_full((size,), fill)",
        "values.new_ones(size)",
        ("tests/test_variants.py::test_forward_and_gradients_are_the_papers",),
    ),
    Mutant(
        "padding-trains",
        "lora/embedding.py",
        "F.embedding(x, table, self.padding_idx, scale_grad_by_freq",
        "F.embedding(x, table, scale_grad_by_freq",
        ("tests/test_loralib_parity.py::test_embedding",),
    ),
    Mutant(
        "groups-ignored",
        "lora/conv.py",
        "self.out_channels // self.groups * k, r * k",
        "self.out_channels * k, r * k",
        ("tests/test_conv.py::test_factor_shapes",),
    ),
    Mutant(
        "convolution-ignores-dropout",
        "lora/conv.py",
        "x_dropped = F.dropout(x, p) if p > 0 else x",
        "x_dropped = x",
        ("tests/test_loralib_defects.py::test_conv_dropout_acts",),
    ),
    Mutant(
        "halved-cross-term-of-norms",
        "lora/variants.py",
        "frozen + 2 * scaling * cross + update",
        "frozen + scaling * cross + update",
        ("tests/test_variants.py::test_row_norms_are_those_of_the_dense_matrix",),
    ),
    Mutant(
        "principal-factors-without-scale",
        "lora/variants.py",
        "root = (S[:r] / scaling).sqrt()",
        "root = S[:r].sqrt()",
        ("tests/test_variants.py::test_pissa_begins_with_the_principal_part",),
    ),
    Mutant(
        "original-trains-too",
        "lora/full.py",
        "copied.__dict__[_ORIGINAL] = module.requires_grad_(False)",
        "copied.__dict__[_ORIGINAL] = module",
        ("tests/test_full.py::test_the_original_is_frozen",),
    ),
    Mutant(
        "nested-disabled-enables",
        "lora/modes.py",
        "layer.disabled = was_disabled",
        "layer.disabled = False",
        ("tests/test_state.py::test_disabled_gives_the_base_output_to_the_bit",),
    ),
    Mutant(
        "biases-at-the-rate-of-a",
        "lora/optim.py",
        '"vector": lr * lr_ratio,',
        '"vector": lr,',
        ("tests/test_optim.py::test_rates_of_all_that_can_train",),
    ),
    Mutant(
        "fp16-factors",
        "lora/patch.py",
        "weight.dtype in (torch.bfloat16, torch.float16)",
        "weight.dtype == torch.float16",
        ("tests/test_patch.py::test_factors_are_fp32_on_a_half_base_unless_told",),
    ),
    Mutant(
        "half-patched-after-an-error",
        "lora/patch.py",
        "        for name, module in before.items():\n            set_module(model, name, module)\n"
        "        for parameter",
        "        for parameter",
        ("tests/test_patch.py::test_bad_options_are_named_and_touch_nothing",),
    ),
    Mutant(
        "grouped-heads-ignored",
        "lora/phi3.py",
        "return [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]",
        "return [heads * head_dim, heads * head_dim, kv_heads * head_dim]",
        ("tests/test_phi3.py::test_the_family_on_meta[Phi-3-medium]",),
    ),
    Mutant(
        "tied-weight-quantised",
        "lora/quantize.py",
        "        if owners[id(weight)] > 1:\n",
        "        if owners[id(weight)] > 2:\n",
        (
            "tests/test_quantized.py::TestPatch::"
            "test_a_shared_weight_and_a_model_without_linear_layers_are_refused",
        ),
    ),
    Mutant(
        "dense-weights-held-while-quantising",
        "lora/quantize.py",
        "ids = {name: id(model.get_submodule(name)) for name in names}  # holds none of them",
        "held = {name: model.get_submodule(name) for name in names}\n"
        "    ids = {name: id(layer) for name, layer in held.items()}",
        ("tests/test_quantized.py::TestPatch::test_the_peak_is_the_model_and_one_layer",),
    ),
    Mutant(
        "rows-assigned-in-another-order",
        "lora/sharded.py",
        "        value = value if order is None else value[order.to(value.device)]\n",
        "",
        (PROCESSES + "[2-files]",),
    ),
    Mutant(
        "sampled-values-of-one-process",
        "lora/sharded.py",
        "            dist.all_reduce(values, group=mesh.get_group(dim))\n",
        "            pass\n",
        (PROCESSES + "[2-files]",),
    ),
    Mutant(
        "failure-of-one-process-alone",
        "lora/sharded.py",
        "    if flag > 0:\n",
        "    if flag > mesh.size():\n",
        (PROCESSES + "[2-refusals]",),
    ),
    Mutant(
        "saved-in-the-order-of-shards",
        "lora/sharded.py",
        "return whole(parameter, row_order(module, own))",
        "return whole(parameter)",
        (PROCESSES + "[2-variants]",),
    ),
    Mutant(
        "only-plain-bias-names",
        "lora/state.py",
        'return "bias" in own.split("_")',
        'return own == "bias"',
        ("tests/test_state.py::test_bias_all_takes_every_kind_of_bias",),
    ),
    Mutant(
        "one-moment-of-adam",
        "lora/summary.py",
        "optimizer_bytes=2 * sum(map(_bytes, trainable)),",
        "optimizer_bytes=sum(map(_bytes, trainable)),",
        ("tests/test_state.py::test_summary_prints_and_returns_the_table",),
    ),
    Mutant(
        "heads-of-classifiers-adapted",
        "lora/targets.py",
        "is_head = module is head or (head is None and by_name)",
        "is_head = module is head",
        ("tests/test_patch.py::test_all_linear_leaves_the_heads_of_classifiers",),
    ),
    Mutant(
        "parts-of-names-are-targets",
        "lora/targets.py",
        'return name == target or name.endswith(f".{target}")',
        "return name.endswith(target)",
        ("tests/test_phi3.py::test_refusals_name_the_offender_and_touch_nothing",),
    ),
    Mutant(
        "pattern-without-match-accepted",
        "lora/targets.py",
        "if not any(pattern.fullmatch(name) for name in names):",
        "if not names:",
        ("tests/test_patch.py::test_bad_options_are_named_and_touch_nothing",),
    ),
    Mutant(
        "columns-misaligned",
        "lora/table.py",
        "widths = [max(map(len, column))",
        "widths = [min(map(len, column))",
        ("tests/test_command_line.py::test_info",),
    ),
    Mutant(
        "factors-drawn-by-every-process",
        "lora/distributed.py",
        "            take_from_first(value, like.device_mesh)\n",
        "",
        (PROCESSES + "[2-from_meta]",),
    ),
    Mutant(
        "moments-in-another-order",
        "lora/distributed.py",
        "order = order if inverse else order.argsort()",
        "order = order.argsort() if inverse else order",
        (PROCESSES + "[2-load_states]",),
    ),
    Mutant(
        "first-columns-in-every-process",
        "lora/distributed.py",
        "columns = (slice(None), *slices[1:])",
        "columns = (slice(None), *(slice(0, s.stop - s.start) for s in slices[1:]))",
        (PROCESSES + "[2-from_meta]",),
    ),
    Mutant(
        "whole-weight-read-for-a-part",
        "lora/distributed.py",
        "values = checkpoint.rows(source.key, first + block.start, first + block.stop)",
        "values = checkpoint.rows(source.key, 0, parameter.shape[0])\n"
        "            values = values[first + block.start : first + block.stop]",
        (PROCESSES + "[2-memory]",),
    ),
    Mutant(
        "tied-weights-ignored",
        "lora/distributed.py",
        "_problems(modules), tied=_tied(model))",
        "_problems(modules))",
        (PROCESSES + "[2-originals]",),
    ),
    Mutant(
        "gradients-lost-by-saving",
        "lora/distributed.py",
        "            parameter.grad = gradient\n",
        "            parameter.grad = None\n",
        ("tests/test_distributed.py::test_a_state_is_saved_and_loaded_between_backward_and_step",),
    ),
    Mutant(
        "optimizer-not-compared",
        "lora/distributed.py",
        '        problems = _unlike(state["optimizer"], self._of_optimizer())\n',
        "        problems = []\n",
        ("tests/test_distributed.py::test_a_state_of_another_optimizer_changes_nothing",),
    ),
    Mutant(
        "gradient-of-a-of-one-process",
        "lora/tensor_parallel.py",
        "part._parameters[own] = self.summed_in_backward(part._parameters[own])\n        y: Tensor",
        "part._parameters[own] = part._parameters[own].clone()\n        y: Tensor",
        (PROCESSES + "[2-tensor_parallel]",),
    ),
    Mutant(
        "bias-added-by-every-process",
        "lora/tensor_parallel.py",
        '        part._parameters["bias"] = None  # added once, to the sum\n',
        "",
        ("tests/test_distributed.py::test_the_fused_kernels_do_so_too",),
    ),
    Mutant(
        "parts-dealt-as-one",
        "lora/tensor_parallel.py",
        "return torch.cat([part.view(n, -1)[rank] for rank in range(n) for part in parts])",
        "return torch.cat([part.view(n, -1)[rank] for part in parts for rank in range(n)])",
        ("tests/test_distributed.py::test_the_rows_of_parts_are_dealt_to_each_process",),
    ),
    Mutant(
        "memory-for-all-dense-weights",
        "lora/pretrained.py",
        "torch.empty(max(sizes, default=0), dtype=torch.uint8, device=place)",
        "torch.empty(sum(sizes), dtype=torch.uint8, device=place)",
        ("tests/test_quantized_disk.py::test_loading_holds_the_4_bit_model_and_a_few_layers",),
    ),
    Mutant(
        "half-loaded-after-an-error",
        "lora/pretrained.py",
        "            registry.update(kept)\n",
        "            kept.update(registry)\n",
        ("tests/test_quantized_disk.py::test_a_buffer_that_nothing_fills_is_refused",),
    ),
    Mutant(
        "ties-broken-by-loading",
        "lora/pretrained.py",
        "    for module, own in source.places:\n        module._parameters[own] = parameter\n",
        "    for module, own in source.places:\n"
        "        module._parameters[own] = nn.Parameter(parameter.detach().clone(), False)\n",
        ("tests/test_quantized_disk.py::test_tied_weights_stay_tied_and_stored_buffers_are_read",),
    ),
    Mutant(
        "offset-of-scales-lost",
        "lora/quantized.py",
        'offset = torch.full((1,), described["nested_offset"], dtype=torch.float32)',
        "offset = torch.zeros(1, dtype=torch.float32)",
        ("tests/test_quantized.py::TestState::test_it_goes_through_safetensors_and_torch_save",),
    ),
    Mutant(
        "merged-weight-left-by-switching",
        "lora/switch.py",
        "        current._drop_merged()\n",
        "        pass\n",
        ("tests/test_switch.py::test_switching_within_merged_leaves_no_merged_weight_behind",),
    ),
    Mutant(
        "switched-on-an-old-weight",
        "lora/switch.py",
        'if name in module._parameters and not name.startswith("lora_"):',
        'if name not in module._parameters and not name.startswith("lora_"):',
        ("tests/test_switch.py::test_switching_on_a_meta_model_is_whole_or_not_at_all",),
    ),
    Mutant(
        "merged-beyond-float16",
        "lora/unpatch.py",
        "        if largest > torch.finfo(dtype).max:\n",
        "        if largest > torch.finfo(torch.float32).max:\n",
        ("tests/test_quantized.py::TestUnpatch::test_a_weight_beyond_float16_is_refused_first",),
    ),
    Mutant(
        "merged-without-checks",
        "lora/unpatch.py",
        "        _check_mergeable(model)\n",
        "",
        (
            "tests/test_patch.py::test_unpatch_refuses_what_it_cannot_merge",
            "tests/test_state.py::test_merged_state_dict_warns_about_tied_weights",
        ),
    ),
    Mutant(
        "damage-without-exit-code",
        "lora/__main__.py",
        'print(f"{file.path}: {len(file.problems)} problems")\n        return 1',
        'print(f"{file.path}: {len(file.problems)} problems")\n        return 0',
        ("tests/test_command_line.py::test_check_finds_damage",),
    ),
    Mutant(
        "broken-pipe-is-an-error",
        "lora/__main__.py",
        "    except BrokenPipeError:  # whoever read the output has seen enough\n",
        "    except BlockingIOError:  # whoever read the output has seen enough\n",
        ("tests/test_command_line.py::test_as_a_module_and_as_a_script",),
    ),
    Mutant(
        "larger-is-never-better",
        "lora/hf.py",
        "sign = 1 if args.greater_is_better else -1",
        "sign = -1",
        ("tests/test_hf.py::test_greater_is_better_is_respected[True]",),
    ),
    Mutant(
        "running-statistics-left-out",
        "lora/hf.py",
        "for tensor in module.state_dict(keep_vars=True).values()",
        "for tensor in module.parameters()",
        ("tests/test_hf.py::test_running_statistics_of_a_module_that_trains_in_full_are_resumed",),
    ),
    Mutant(
        "reference-with-weights-of-its-own",
        "lora/hf.py",
        "reference: Any = copy.deepcopy(inner, shared)",
        "reference: Any = copy.deepcopy(inner)",
        ("tests/test_hf.py::test_the_reference_is_the_base_on_the_same_weights",),
    ),
    Mutant(
        "reference-calls-the-policy",
        "lora/hf.py",
        'for name in ("forward", "_original_forward", "_is_accelerate_prepared"):',
        'for name in ("_original_forward", "_is_accelerate_prepared"):',
        ("tests/test_hf.py::test_the_reference_calls_nothing_that_was_put_on_the_policy",),
    ),
    Mutant(
        "frozen-weights-reported-missing",
        "lora/hf.py",
        "            keys.missing_keys.clear()\n",
        "",
        ("tests/test_hf.py::test_a_resumed_run_repeats_every_loss_to_the_bit[plain]",),
    ),
    Mutant(
        "update-of-the-head-under-trl",
        "lora/hf.py",
        "    if of_trl and isinstance(head, LoRALayer):\n",
        "    if not of_trl and isinstance(head, LoRALayer):\n",
        ("tests/test_hf_trl.py::test_an_update_of_the_output_head_is_refused",),
    ),
    Mutant(
        "sharded-model-under-the-callback",
        "lora/hf.py",
        "    if sharded_tensor(model) is not None:\n",
        '    if sharded_tensor(model) is not None and getattr(args, "fsdp", None):\n',
        ("tests/test_hf_fsdp.py::test_a_sharded_model_is_refused_by_the_callback",),
    ),
    Mutant(
        "merged-forgets-the-mode-of-dropout",
        "lora/modes.py",
        "            layer.lora_dropout.train(dropping)\n",
        "",
        ("tests/test_state.py::test_merged_context_restores_everything",),
    ),
    Mutant(
        "flops-of-frozen-and-trained-swapped",
        "lora/summary.py",
        "(6 if p.requires_grad else 4)",
        "(4 if p.requires_grad else 6)",
        ("tests/test_state.py::test_summary_prints_and_returns_the_table",),
    ),
    Mutant(
        "property-in-the-place-of-fsdps-mark",
        "lora/_base.py",
        "    def __setattr__(self, name: str, value: Any) -> None:\n",
        "    _is_fsdp_managed_module = property(lambda self: False)\n\n"
        "    def __setattr__(self, name: str, value: Any) -> None:\n",
        ("tests/test_compile.py::test_fsdps_mark_is_a_plain_attribute",),
    ),
    Mutant(
        "loraplus-by-default",
        "lora/optim.py",
        "    lr_ratio: float = 1.0,\n",
        "    lr_ratio: float = 16.0,\n",
        ("tests/test_optim.py::test_by_default_it_is_plain_lora",),
    ),
    Mutant(
        "other-distribution-accepted",
        "lora/_distribution.py",
        '    if "lora/__init__.py," in',
        '    if "lora/none.py," in',
        ("tests/test_package.py::test_a_distribution_that_installs_lora_too_is_refused",),
    ),
    Mutant(
        "file-locks-required",
        "lora/adapter/files.py",
        "except ImportError:  # as on Windows",
        "except NameError:  # as on Windows",
        ("tests/test_package.py::test_it_works_without_triton_file_locks_and_resource_limits",),
    ),
    Mutant(
        "smallest-scale-in-fp64",
        "kernels/triton_nf4.py",
        "    floor = tl.full((BLOCKS,), smallest, tl.float32)\n",
        "    floor = tl.full((BLOCKS,), smallest, tl.float64)\n",
        (INTERPRETED, "tests/test_kernels_nf4_fused.py::test_codes_and_absmax"),
    ),
    # lora/adapter/
    Mutant(
        "no-sync-of-files",
        "lora/adapter/files.py",
        "        view = view[os.write(descriptor, view) :]\n    os.fsync(descriptor)\n",
        "        view = view[os.write(descriptor, view) :]\n",
        ("tests/test_adapter_files.py::test_what_gets_its_name_is_on_the_disk",),
    ),
    Mutant(
        "no-sync-of-folders",
        "lora/adapter/files.py",
        "    descriptor = os.open(folder, os.O_RDONLY)\n    try:\n        os.fsync(descriptor)\n",
        "    descriptor = os.open(folder, os.O_RDONLY)\n    try:\n        pass\n",
        ("tests/test_adapter_files.py::test_what_gets_its_name_is_on_the_disk",),
    ),
    Mutant(
        "no-sync-of-merged-shards",
        "lora/adapter/merged_folder.py",
        "    os.fsync(file.fileno())\n",
        "",
        (
            "tests/test_adapter_merge.py::test_a_merged_checkpoint_is_on_the_disk_when_it_gets_its_name",
        ),
    ),
    Mutant(
        "tied-head-merged",
        "lora/adapter/check.py",
        "    if said:\n        return any(said)\n",
        "    if said:\n        return False\n",
        ("tests/test_adapter_merge.py::test_refused_ties",),
    ),
    Mutant(
        "shard-outside-the-folder",
        "lora/adapter/checkpoint.py",
        'PureWindowsPath(shard).name != shard or "\\0" in shard:',
        '"\\0" in shard:',
        ("tests/test_adapter_merge.py::test_hostile_shards",),
    ),
    Mutant(
        "infinite-factors-accepted",
        "lora/adapter/contents.py",
        "            elif not torch.isfinite(tensor).all():\n",
        "            elif torch.isnan(tensor).any():\n",
        ("tests/test_adapter_load.py::test_tensors_that_do_not_fit_are_refused_by_name[inf]",),
    ),
    Mutant(
        "blocks-in-the-first-columns",
        "lora/adapter/contents.py",
        "blocks[start:stop, part * self.r : (part + 1) * self.r] = B",
        "blocks[start:stop, : self.r] = B",
        ("tests/test_adapter_peft.py::test_peft_and_transformers_compute_what_we_saved",),
    ),
    Mutant(
        "portable-without-scale",
        "lora/adapter/convert.py",
        "scaled = B.double() * layer.scaling",
        "scaled = B.double()",
        (
            "tests/test_adapter_convert.py::"
            "test_portable_has_one_rank_and_no_scale_and_the_same_update",
        ),
    ),
    Mutant(
        "norm-without-scale",
        "lora/adapter/describe.py",
        "return abs(layer.scaling) * math.sqrt(max(square, 0.0))",
        "return math.sqrt(max(square, 0.0))",
        ("tests/test_command_line.py::test_info_as_json",),
    ),
    Mutant(
        "non-atomic-write",
        "lora/adapter/files.py",
        "                os.replace(temporary[name], folder / name)\n",
        "                (folder / name).write_bytes(temporary[name].read_bytes())\n",
        (
            "tests/test_adapter_files.py::test_a_folder_is_read_and_healed_while_it_is_written",
            "tests/test_adapter_files.py::test_killed_at_200_random_moments_nothing_is_lost",
        ),
    ),
    Mutant(
        "running-writers-files-removed",
        "lora/adapter/files.py",
        "        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "",
        ("tests/test_adapter_files.py::test_a_running_writer_keeps_its_temporary_files",),
    ),
    Mutant(
        "new-folder-filled-in-its-place",
        "lora/adapter/files.py",
        "        with new_folder(folder) as temporary:\n",
        "        folder.mkdir(parents=True)\n        for temporary in [folder]:\n",
        ("tests/test_adapter_files.py::test_killed_at_200_random_moments_nothing_is_lost",),
    ),
    Mutant(
        "short-write-taken-for-whole",
        "lora/adapter/files.py",
        "        view = view[os.write(descriptor, view) :]\n",
        "        os.write(descriptor, view)\n        view = view[len(view) :]\n",
        ("tests/test_adapter_files.py::test_no_space_in_the_middle_of_a_file",),
    ),
    Mutant(
        "codes-compared-with-elements",
        "lora/adapter/fingerprint.py",
        "    if is_nf4(one) != is_nf4(other) or not value or not other_value:\n",
        "    if not value or not other_value:\n",
        ("tests/test_quantized_disk.py::test_an_adapter_of_a_dense_base_cannot_be_told_on_4_bits",),
    ),
    Mutant(
        "rows-of-a-sharded-weight-as-stored",
        "lora/adapter/fingerprint.py",
        "rows = rows if order is None else order.argsort()[rows]",
        "rows = rows if order is None else order[rows]",
        (PROCESSES + "[2-files]",),
    ),
    Mutant(
        "other-scale-loaded",
        "lora/adapter/fit.py",
        'for fact in ("kind", "enable_lora", "out_splits", "scaling"):',
        'for fact in ("kind", "enable_lora", "out_splits"):',
        (
            "tests/test_adapter_load.py::"
            "test_an_adapter_that_does_not_fit_a_patched_model_changes_nothing",
        ),
    ),
    Mutant(
        "strict-ignored",
        "lora/adapter/load.py",
        "    if strict and plan.problems:\n",
        '    if strict and "base" in plan.problems:\n',
        ("tests/test_adapter_load.py::test_tensors_that_do_not_fit_are_refused_by_name",),
    ),
    Mutant(
        "half-loaded-values-stay",
        "lora/adapter/load.py",
        "                _local(tensor).copy_(kept)\n",
        "                _local(tensor).copy_(tensor)\n",
        (
            "tests/test_adapter_load.py::"
            "test_a_patched_model_is_as_it_was_if_a_value_cannot_be_written",
        ),
    ),
    Mutant(
        "bf16-factors-of-peft-kept",
        "lora/adapter/load.py",
        "if lora_dtype is None and not file.native and dtype.itemsize < 4:",
        "if lora_dtype is None and file.native and dtype.itemsize < 4:",
        (
            "tests/test_adapter_peft.py::"
            "test_factors_that_peft_saved_in_bf16_are_fp32_here_as_in_peft",
        ),
    ),
    Mutant(
        "merged-rounded-twice",
        "lora/adapter/merge.py",
        "    bits |= (back != exact).int()\n",
        "",
        ("tests/test_adapter_merge.py::test_rounding_happens_once_where_torch_rounds_twice",),
    ),
    Mutant(
        "norms-without-scale",
        "lora/adapter/merge.py",
        "square = (left[rows] @ right).mul_(layer.scaling).add_(weight).square_()",
        "square = (left[rows] @ right).add_(weight).square_()",
        ("tests/test_variants_peft.py::test_a_merged_checkpoint_is_the_merged_model",),
    ),
    Mutant(
        "weights-held-whole-while-merging",
        "lora/adapter/merge.py",
        "squares = [(original[rows].double() - trained[rows]).square_().sum() for rows in blocks]",
        "squares = [(original.double() - trained).square_()[rows].sum() for rows in blocks]",
        ("tests/test_quantized_disk.py::test_merging_holds_a_few_layers[dense]",),
    ),
    Mutant(
        "best-layer-first",
        "lora/adapter/merge_report.py",
        "key=lambda item: -item[1].relative",
        "key=lambda item: item[1].relative",
        ("tests/test_adapter_merge.py::test_the_report",),
    ),
    Mutant(
        "unaligned-tensors",
        "lora/adapter/merged_folder.py",
        'text += b" " * (-len(text) % 8)',
        'text += b" " * (-len(text) % 4)',
        ("tests/test_adapter_merge.py::test_order_index_and_metadata_are_the_bases",),
    ),
    Mutant(
        "pissa-of-peft-accepted",
        "lora/adapter/peft_config.py",
        '(None, True, False, "gaussian", "orthogonal", "eva")',
        '(None, True, False, "gaussian", "orthogonal", "eva", "pissa")',
        (
            "tests/test_adapter_load.py::"
            "test_features_of_peft_that_compute_something_else_are_refused",
        ),
    ),
    Mutant(
        "alpha-of-one-part",
        "lora/adapter/peft_format.py",
        "return layer.lora_alpha * layer.parts",
        "return layer.lora_alpha",
        ("tests/test_adapter_peft.py::test_peft_and_transformers_compute_what_we_saved",),
    ),
    Mutant(
        "half-a-layer-loaded",
        "lora/adapter/plan.py",
        "plan.values += steps if not problems else []",
        "plan.values += steps",
        ("tests/test_adapter_load.py::test_half_a_layer_is_not_loaded",),
    ),
    Mutant(
        "frozen-rank-saved-as-trained",
        "lora/adapter/save.py",
        "frozen_rank=B.shape[1] - layer.r,",
        "frozen_rank=0,",
        ("tests/test_variants_peft.py::test_saved_and_loaded_is_the_same_to_the_bit",),
    ),
    Mutant(
        "exclusions-ignored",
        "lora/adapter/selection.py",
        "chosen -= {name for name in chosen if re.fullmatch(excluded, name)}",
        "chosen -= {name for name in chosen if name == excluded}",
        ("tests/test_adapter_peft.py::test_we_compute_what_peft_saved",),
    ),
    Mutant(
        "sha-not-verified",
        "lora/adapter/storage.py",
        "verified = digest(text, tensors) == metadata[_DIGEST]",
        "verified = bool(metadata[_DIGEST])",
        ("tests/test_adapter_load.py::test_a_changed_byte_of_our_file_is_refused",),
    ),
    Mutant(
        "users-base-name-lost",
        "lora/adapter/storage.py",
        "config = dict(file.config) | _free(directory / CONFIG_NAME)",
        "config = dict(file.config)",
        ("tests/test_adapter_files.py::test_the_json_is_healed_from_the_tensors",),
    ),
    # The package
    Mutant(
        "package-missing-from-the-wheel",
        "pyproject.toml",
        'packages = ["lora", "lora.adapter", "lora.kernels"]',
        'packages = ["lora", "lora.kernels"]',
        ("tests/test_package.py::test_the_wheel_has_lora_kernels_and_no_top_level_kernels",),
    ),
    Mutant(
        "import-brings-safetensors",
        "lora/adapter/storage.py",
        "import torch\nfrom torch import Tensor\n\nfrom .._version",
        "import safetensors.torch\nimport torch\nfrom torch import Tensor\n\nfrom .._version",
        ("tests/test_package.py::test_import_brings_no_triton_transformers_or_peft",),
    ),
    Mutant(
        "kernels-by-their-own-name",
        "kernels/__init__.py",
        'if __name__ == "lora.kernels":',
        'if __name__.endswith("kernels"):',
        ("tests/test_package.py::test_the_folder_is_empty_by_its_own_name",),
    ),
    Mutant(
        "wrong-annotation",
        "lora/table.py",
        "def aligned(rows: Iterable[Sequence[str]]) -> list[str]:",
        "def aligned(rows: Iterable[Sequence[str]]) -> str:",
        ("tests/test_package.py::test_mypy_strict_on_the_package_as_installed",),
    ),
    # examples/ and benchmarks/
    Mutant(
        "published-rate-by-default",
        "examples/finetune_phi3.py",
        "        training_config.update(default_config)\n",
        "        pass\n",
        ("tests/test_examples.py::test_the_learning_rate_of_each_recipe",),
    ),
    Mutant(
        "no-warning-of-a-loss-that-stays",
        "examples/settings.py",
        "    if after < 0.99 * before:\n",
        "    if after < 1.5 * before:\n",
        ("tests/test_examples.py::test_a_loss_that_hardly_moves_is_told",),
    ),
    Mutant(
        "prompt-learned",
        "examples/chat_data.py",
        "            if first >= start and last <= stop:\n",
        "            if last >= start and last <= stop:\n",
        ("tests/test_examples.py::test_mask_covers_the_assistants_tokens_alone",),
    ),
    Mutant(
        "left-out-chats-uncounted",
        "examples/chat_data.py",
        "return examples, truncated, len(conversations) - len(examples)",
        "return examples, truncated, 0",
        ("tests/test_examples.py::test_long_chats_are_truncated_and_counted",),
    ),
    Mutant(
        "resumed-with-other-masks",
        "examples/training.py",
        "        _set_rng_state(self.rng)\n",
        "",
        ("tests/test_examples.py::test_resume_after_a_crash_is_equal_to_the_bit",),
    ),
    Mutant(
        "standin-half-built",
        "examples/standin.py",
        'with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as building:',
        'for building in [tempfile.mkdtemp(prefix=".building-", dir=cache)]:',
        ("tests/test_examples.py::test_standin_is_built_whole_or_not_at_all",),
    ),
    Mutant(
        "unmerged-model-exported",
        "examples/finetune_phi3_trl.py",
        "lora.unpatch(trainer.model, merge=True, dtype=",
        "lora.unpatch(trainer.model, merge=False, dtype=",
        ("tests/test_example_trl.py::test_the_default_run",),
    ),
    Mutant(
        "bad-input-without-exit-status",
        "examples/finetune_phi3_trl.py",
        '        print(f"error: {error}", file=sys.stderr)\n        return 2\n',
        '        print(f"error: {error}", file=sys.stderr)\n        return 0\n',
        ("tests/test_example_trl.py::test_what_cannot_be_used_is_said",),
    ),
    Mutant(
        "engine-without-processes",
        "examples/processes.py",
        "    if not dist.is_initialized():\n        raise InputError(\n",
        "    if not dist.is_initialized() and parallel is None:\n        raise InputError(\n",
        ("tests/test_examples_processes.py::test_an_engine_without_processes_is_refused",),
    ),
    Mutant(
        "baseline-gradient-without-scale",
        "benchmarks/baselines.py",
        "        ds = (dy @ B) * ctx.scaling\n",
        "        ds = dy @ B\n",
        ("tests/test_bench_suite.py::test_a_baseline_is_the_formula_in_float64",),
    ),
    Mutant(
        "peak-with-what-was-held-before",
        "benchmarks/bench_step.py",
        'return round((kib("VmHWM") - before) * 1024 / 1e6, 1)',
        'return round(kib("VmHWM") * 1024 / 1e6, 1)',
        ("tests/test_bench_suite.py::test_the_peak_is_that_of_the_step_alone",),
    ),
    Mutant(
        "first-words-of-a-failure",
        "benchmarks/bench_step.py",
        '[f"exit status {done.returncode}"])[-1]',
        '[f"exit status {done.returncode}"])[0]',
        ("tests/test_bench_suite.py::test_a_process_that_fails_gives_its_last_words",),
    ),
    Mutant(
        "rows-of-other-kernels-current",
        "benchmarks/readme_table.py",
        '{row["source"] for row in read(path)} - {now}',
        '{read(path)[-1]["source"]} - {now}',
        ("tests/test_bench_suite.py::test_rows_of_other_kernels_are_stale",),
    ),
    Mutant(
        "shard-counted-for-the-whole",
        "benchmarks/bench_scaling.py",
        "self.reduced += args[1].nbytes",
        "self.reduced += args[0].nbytes",
        ("tests/test_bench_scaling.py::test_ranks_reduce_the_factors_and_no_more",),
    ),
]


# Planting


def planted(mutant: Mutant) -> str:
    """The text of the file with the fault; ValueError if the place is not there, or not alone."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    found = text.count(mutant.old)
    if found != 1:
        raise ValueError(f"{mutant.file} has the text to be replaced {found} times, expected 1")
    changed = text.replace(mutant.old, mutant.new)
    if mutant.file.endswith(".py"):
        try:
            ast.parse(changed)
        except SyntaxError as error:
            raise ValueError(f"{mutant.file} cannot be parsed any more: {error}") from error
    return changed


def check(mutants: list[Mutant]) -> list[str]:
    """What is wrong with the list itself, a line each."""
    problems = []
    names = [mutant.name for mutant in MUTANTS]
    for mutant in mutants:
        if names.count(mutant.name) > 1:
            problems.append(f"{mutant.name}: expected a name of its own")
        try:
            planted(mutant)
        except (OSError, ValueError) as error:
            problems.append(f"{mutant.name}: {error}")
    return problems


@contextmanager
def copied(mutant: Mutant | None) -> Iterator[Path]:
    """A folder with a copy of the checkout, `tree`, and of the packages as installed, `site`."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        tree, site = folder / "tree", folder / "site"
        shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*SKIPPED))
        if mutant is not None:
            (tree / mutant.file).write_text(planted(mutant), encoding="utf-8")
        shutil.copytree(tree / "lora", site / "lora")
        shutil.copytree(tree / "kernels", site / "lora" / "kernels")
        # Some tests give a process that they start no other path than this folder.
        (tree / "tests" / "lora").symlink_to(site / "lora", target_is_directory=True)
        (folder / "work").mkdir()
        yield folder


def environment(folder: Path) -> dict[str, str]:
    """Of processes that import the copy."""
    return {
        **os.environ,
        "PYTHONPATH": str(folder / "site"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }


def check_that_the_copy_is_imported() -> str:
    """Empty if it is, by both of the paths that processes are given; else what is imported."""
    with copied(None) as folder:
        for path in ("site", "tree/tests"):
            done = subprocess.run(
                [sys.executable, "-c", IMPORTED_FROM],
                env={**environment(folder), "PYTHONPATH": str(folder / path)},
                cwd=folder / "work",
                capture_output=True,
                text=True,
                check=False,
            )
            files = done.stdout.splitlines()
            if done.returncode or not all(Path(f).is_relative_to(folder) for f in files):
                return f"expected the copy to be imported, got {files} {done.stderr}"
            shown = ", ".join(str(Path(f).relative_to(folder)) for f in files)
            print(f"with {path} on the path, {shown} are imported", flush=True)
    return ""


# Catching


class Outcome(NamedTuple):
    """What became of a mutant: whether it was caught, in words by what, and in how many seconds."""

    mutant: Mutant
    caught: bool
    words: str
    seconds: float


def run(mutant: Mutant) -> Outcome:
    """Plant it in a copy, and run its tests there until the first one fails."""
    begun = time.monotonic()
    with copied(mutant) as folder:
        settings = dict(word.split("=", 1) for word in mutant.tests if _is_setting(word))
        tests = [str(folder / "tree" / t) for t in mutant.tests if not _is_setting(t)]
        options = ["-x", "-q", "-p", "no:cacheprovider", "-n", "0", "--import-mode=importlib"]
        # In an empty folder, since `python -c` and `python -m` would find the packages of the tree,
        # where the kernels are not yet a part of lora, before those of the path.
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests],
            env=environment(folder) | settings,
            cwd=folder / "work",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return Outcome(mutant, False, f"ERROR: not done after {LIMIT} s", LIMIT)
    caught, words = _verdict(process.returncode, output)
    return Outcome(mutant, caught, words, time.monotonic() - begun)


def _is_setting(word: str) -> bool:
    return "=" in word and not word.startswith("tests/")


def _verdict(status: int, output: str) -> tuple[bool, str]:
    """Whether the fault was caught, and by which test."""
    if status == 0:
        return False, "SURVIVED"
    if status != 1:
        last = output.strip().splitlines()[-3:]
        return False, f"ERROR: pytest exited with status {status}: {' | '.join(last)}"
    failed = (
        line.partition(" ")[2].partition(" - ")[0]
        for line in output.splitlines()
        if line.startswith(("FAILED ", "ERROR "))
    )
    first = next(failed, "a test that pytest does not name")
    return True, f"caught by {first[max(first.find('tests/'), 0) :]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help="of mutants (default: all)")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    parser.add_argument("--check", action="store_true", help="check the list and run nothing")
    parser.add_argument("-j", type=int, default=1, metavar="N", help="mutants side by side")
    args = parser.parse_args()
    unknown = set(args.names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}; see --list")
    mutants = [m for m in MUTANTS if not args.names or m.name in args.names]
    if args.list:
        for mutant in mutants:
            print(f"{mutant.name:44} {mutant.file:34} {' '.join(mutant.tests)}")
        return 0
    problems = check(mutants)
    if problems or args.check:
        print("\n".join(problems) or f"{len(mutants)} mutants can be planted")
        return 1 if problems else 0
    problem = check_that_the_copy_is_imported()
    if problem:
        print(problem)
        return 1
    begun, caught = time.monotonic(), 0
    with ThreadPoolExecutor(max(args.j, 1)) as executor:
        for outcome in executor.map(run, mutants):
            caught += outcome.caught
            print(f"{outcome.mutant.name:44} {outcome.words}, {outcome.seconds:.1f} s", flush=True)
    print(f"{time.monotonic() - begun:.0f} s")
    print(f"{len(mutants)} planted, {caught} caught")
    return 0 if caught == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
