"""torch.compile: whole graphs, one dynamic graph a mode, the same results as eager."""

import inspect

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lora
from lora.kernels import dispatch


class EveryLayer(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.embedding = lora.Embedding(20, 8, 2)
        self.conv1d = lora.Conv1d(8, 8, 3, 2, 2, p, padding=1)
        self.linear = lora.Linear(8, 8, 2, 4, p)
        self.merged = lora.MergedLinear(8, 12, 2, 4, p, [True, False, True], out_splits=[6, 4, 2])
        self.conv2d = lora.Conv2d(1, 2, 3, 2, 2, p, padding=1)
        self.conv3d = lora.Conv3d(1, 2, 1, 2, 2, p)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.conv1d(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        h = self.merged(torch.tanh(self.linear(h)))
        h = self.conv2d(h.unsqueeze(1)).sum(1)
        return self.conv3d(h[:, None, None]).sum(1)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_every_layer_compiles_whole_with_one_dynamic_graph_a_mode(p, fill_factors):
    torch._dynamo.reset()
    model = fill_factors(EveryLayer(p))
    lora.mark_only_lora_as_trainable(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batches = [torch.randint(0, 20, (n, 5)) for n in (2, 3, 7, 11)]
    for train, most in ((True, 2), (False, 4)):
        model.train(train)
        for ids in batches:
            y = compiled(ids)
            if p == 0 or not train:
                torch.testing.assert_close(y, model(ids), rtol=1e-4, atol=1e-5)
            y.square().sum().backward()
        assert counter.frame_count <= most  # a static graph first, then one for all sizes


def test_eval_without_gradients_never_uses_a_stale_merge(fill_factors):
    torch._dynamo.reset()
    model = fill_factors(EveryLayer(0.1)).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.randint(0, 20, (2, 5))
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-4, atol=1e-5)
            fill_factors(model)


def test_fsdps_mark_is_a_plain_attribute():
    """torch.compile looks it up statically, and takes a property for a module that FSDP manages."""
    layer = lora.Linear(4, 4, 2, merge_weights=False)
    assert inspect.getattr_static(layer, "_is_fsdp_managed_module", None) is None
    assert not layer.is_sharded
    layer._is_fsdp_managed_module = True  # as fully_shard does
    assert inspect.getattr_static(layer, "_is_fsdp_managed_module", None) is True
    assert layer.is_sharded
    merged = lora.Linear(4, 4, 2).eval()
    with pytest.raises(ValueError, match=r"fully_shard on a merged Linear"):
        merged._is_fsdp_managed_module = True
    assert not merged.is_sharded


def test_inductor_gives_eagers_values_and_gradients(fill_factors):
    torch._dynamo.reset()
    model = fill_factors(nn.Sequential(lora.Linear(8, 12, 2, 4, 0.3), nn.Tanh()))
    lora.mark_only_lora_as_trainable(model)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(6, 8)
    results = []
    for f in (model, compiled):
        torch.manual_seed(7)
        y = f(x)
        y.square().sum().backward()
        results.append(
            [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        )
        model.zero_grad()
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_checkpointing_inside_a_compiled_step_keeps_the_mask(fill_factors):
    torch._dynamo.reset()
    layer = fill_factors(lora.Linear(8, 8, 2, 4, 0.4))
    lora.mark_only_lora_as_trainable(layer)
    x = torch.randn(6, 8)

    def step(x):
        return checkpoint(layer, x, use_reentrant=False)

    compiled = torch.compile(step, backend="aot_eager")
    torch.manual_seed(7)
    layer(x).square().sum().backward()
    want = layer.lora_A.grad.clone()
    layer.zero_grad()
    torch.manual_seed(7)
    compiled(x).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, want, rtol=1e-4, atol=1e-5)


def test_a_patched_phi3_compiles_without_more_breaks_than_the_plain_one(make_phi3):
    ids = torch.randint(3, 90, (2, 9))
    breaks = []
    for patched in (False, True):
        torch._dynamo.reset()
        model = make_phi3()
        if patched:
            lora.patch_phi3(model, target_modules="all-linear")
        model.train()
        explanation = torch._dynamo.explain(model)(ids, use_cache=False)
        breaks.append(explanation.graph_break_count)
    assert breaks[1] <= breaks[0]


def test_every_draw_of_a_compiled_graph_is_one_of_its_own():
    """The compiler merges calls of an operator with the same arguments, even if it is random."""
    x = torch.ones(4, 64, requires_grad=True)  # with a backward, which the merging comes before

    def draw():
        seeds = torch.stack([dispatch._seed(x, None) for _ in range(3)])
        bits = torch.stack([dispatch._draw(x, 0.5, None) for _ in range(3)])
        return x * seeds.sum() * bits.sum(), seeds, bits

    torch.manual_seed(0)
    _, *eager = draw()
    torch.manual_seed(0)
    for drawn, wanted in zip(torch.compile(draw)()[1:], eager, strict=True):
        assert len(drawn.unique(dim=0)) == 3
        assert torch.equal(drawn, wanted)
