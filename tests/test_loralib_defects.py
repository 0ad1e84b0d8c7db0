"""Defects of loralib 0.1.2, each with a test that says it is not ours."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora


def filled(layer):
    nn.init.normal_(layer.lora_A, std=0.5)
    nn.init.normal_(layer.lora_B, std=0.5)
    return layer


@torch.no_grad()
def out(layer, x):
    return layer(x)


def test_a_state_dict_saved_in_eval_mode_does_not_add_the_update_twice():
    x, layer = torch.randn(4, 8), filled(lora.Linear(8, 8, 4)).eval()
    fresh = lora.Linear(8, 8, 4)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(out(fresh.eval(), x), out(layer, x))


def test_loading_in_eval_mode_keeps_the_update_and_the_base():
    x, source, target = torch.randn(4, 8), filled(lora.Linear(8, 8, 4)), lora.Linear(8, 8, 4)
    target.eval().load_state_dict(source.state_dict())
    torch.testing.assert_close(out(target, x), out(source, x))
    target.train()
    assert torch.equal(target.weight, source.weight)


def test_changing_factors_while_merged_does_not_corrupt_the_base():
    layer = filled(lora.Linear(8, 8, 4)).eval()
    before = layer.weight.clone()
    filled(layer).train()
    assert torch.equal(layer.weight, before)


def test_bf16_merging_does_not_drift():
    layer = filled(lora.Linear(32, 32, 4)).bfloat16()
    before = layer.weight.clone()
    for _ in range(1000):
        layer.eval().train()
    assert torch.equal(layer.weight, before)


def test_train_and_eval_return_self():
    for layer in (lora.Linear(4, 4), lora.Embedding(4, 4, 2), lora.Conv2d(4, 4, 1, 2)):
        assert layer.train() is layer
        assert layer.eval() is layer


def test_conv_keys_are_the_plain_ones_and_safetensors_saves_them(tmp_path):
    layer = lora.Conv2d(4, 4, 3, 2)
    missing, unexpected = layer.load_state_dict(nn.Conv2d(4, 4, 3).state_dict(), strict=False)
    assert missing == ["lora_A", "lora_B"]
    assert not unexpected
    save_file(layer.state_dict(), tmp_path / "conv.safetensors")
    layer.load_state_dict(load_file(tmp_path / "conv.safetensors"))


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Conv3d"])
@pytest.mark.parametrize("kernel", [1, 2, 3, "tuple"])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_works_for_every_kernel_and_group(kind, kernel, groups):
    dimensions = int(kind[4])
    kernel = tuple(range(1, dimensions + 1)) if kernel == "tuple" else kernel
    layer = filled(getattr(lora, kind)(4, 6, kernel, 2, groups=groups))
    x = torch.randn(2, 4, *[5] * dimensions)
    unmerged = out(layer, x)
    torch.testing.assert_close(out(layer.eval(), x), unmerged, rtol=1e-4, atol=1e-5)


def test_conv_dropout_acts():
    layer = filled(lora.Conv2d(4, 6, 3, 2, lora_dropout=0.5))
    x = torch.randn(2, 4, 6, 6)
    assert not torch.equal(out(layer, x), out(layer, x))
    mean = torch.stack([out(layer, x) for _ in range(3000)]).mean(0)
    expected = out(copy.deepcopy(layer).eval(), x)
    assert (mean - expected).abs().max() < 0.1 * expected.abs().max()
    layer.eval()
    assert torch.equal(out(layer, x), out(layer, x))


def test_merged_linear_keeps_no_dense_update():
    layer = lora.MergedLinear(64, 192, 2, enable_lora=[True] * 3)
    sizes = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() != layer.weight.untyped_storage().data_ptr():
            sizes.append(tensor.numel())
        return tensor

    x = torch.randn(8, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert max(sizes) < 64 * 192


def test_no_enabled_part_is_refused_by_name():
    with pytest.raises(ValueError, match=r"r=4 but enable_lora=\(False,\) enables no part"):
        lora.MergedLinear(6, 6, 4)
    assert lora.MergedLinear(6, 6).weight.requires_grad


def test_unequal_parts_are_exact():
    layer = filled(
        lora.MergedLinear(8, 14, 2, enable_lora=[True, True, True], out_splits=[8, 4, 2])
    )
    x = torch.randn(3, 8)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    start = 0
    for j, size in enumerate([8, 4, 2]):
        A, B = layer.lora_A[2 * j : 2 * j + 2], layer.lora_B[start : start + size]
        base[:, start : start + size] += x @ A.t() @ B.t() * layer.scaling
        start += size
    torch.testing.assert_close(layer(x), base)


def test_embedding_options_work_or_are_refused():
    with pytest.raises(ValueError, match="sparse=True with r=2"):
        lora.Embedding(5, 4, 2, sparse=True)
    with pytest.raises(ValueError, match=r"max_norm=1\.0 with r=2"):
        lora.Embedding(5, 4, 2, max_norm=1.0)
    table = nn.Embedding(5, 4, max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm"):
        lora.Embedding.from_module(table, 2)
    assert table.weight.requires_grad
    lora.Embedding(5, 4, sparse=True)(torch.tensor([1])).sum().backward()
    given = torch.randn(5, 4)
    assert torch.equal(lora.Embedding(5, 4, 2, _weight=given.clone()).weight, given)
    assert torch.equal(lora.Embedding.from_pretrained(given.clone()).weight, given)


def test_merging_a_tied_embedding_does_not_move_the_head():
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    wrapped = filled(lora.Embedding.from_module(embedding, 2, merge_weights=True))
    x = torch.randn(2, 4)
    before = out(head, x)
    assert wrapped.eval().merged
    assert torch.equal(out(head, x), before)
    assert head.weight is wrapped.weight


def test_dropout_zero_pickles():
    pickle.loads(pickle.dumps(lora.Linear(4, 4, 2)))


def test_half_base_with_fp32_factors_works():
    layer = lora.Linear.from_module(nn.Linear(4, 4).bfloat16(), 2, lora_dtype=torch.float32)
    layer(torch.randn(2, 4, dtype=torch.bfloat16)).sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


def test_names_that_merely_contain_lora_are_frozen():
    model = nn.Module()
    model.lora_head = nn.Linear(4, 4)
    model.explora_x = nn.Parameter(torch.zeros(3))
    model.bias_table = nn.Embedding(3, 3)
    model.layer = lora.Linear(4, 4, 2)
    model.plain = lora.Linear(4, 4)
    for bias, expected in (
        ("none", {"layer.lora_A", "layer.lora_B"}),
        ("lora_only", {"layer.lora_A", "layer.lora_B", "layer.bias"}),
        (
            "all",
            {"layer.lora_A", "layer.lora_B", "layer.bias", "plain.bias", "lora_head.bias"},
        ),
    ):
        lora.mark_only_lora_as_trainable(model, bias)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
        assert set(lora.lora_state_dict(model, bias)) == expected


def test_a_pretrained_layer_can_be_wrapped():
    base = nn.Linear(4, 4)
    assert lora.Linear.from_module(base, 2).weight is base.weight


def test_multihead_attention_out_proj_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match=r"attention\.out_proj: nn\.MultiheadAttention reads"):
        lora.patch(model, ["out_proj"], r=2, lora_alpha=2)
    assert not any(isinstance(m, lora.LoRALayer) for m in model.modules())


def test_merged_forward_gives_gradients_to_the_factors():
    layer = filled(lora.Linear(4, 4, 2)).eval()
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True}, "enable_lora=True: expected a list"),
        ({"enable_lora": []}, r"enable_lora=\[\]"),
        ({"enable_lora": [True, 2]}, "expected bools alone"),
        ({"enable_lora": [True] * 4}, "4 parts, which do not divide out_features=6"),
        ({"enable_lora": [True], "out_splits": 6}, "out_splits=6"),
        ({"enable_lora": [True, True], "out_splits": [3.0, 3.0]}, r"out_splits=\[3\.0"),
        ({"enable_lora": [True, True], "out_splits": [4, 4]}, "6 in the sum"),
        ({"enable_lora": [True, True], "out_splits": [7, -1]}, "positive size"),
        ({"enable_lora": [True, True], "out_splits": [6]}, "each of the 2 parts"),
    ],
)
def test_masks_and_parts_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lora.MergedLinear(4, 6, 2, **options)
