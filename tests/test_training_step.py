"""A training step in one process: the same numbers however it is run, and memory linear in tokens.

The references are the eager step without checkpointing, the plain optimizer, one large batch, and for
autocast the formula in PyTorch's own operations, in float64 and under the same autocast.
"""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora
from lora.kernels import reference

IDS = torch.arange(3, 43).view(2, 20)
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "lorafa": {"use_lorafa": True},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.fixture
def make(make_phi3):
    """A factory of patched models in training mode, whose updates are not zero."""

    def make(p=0.0, checkpointing=None, dtype=torch.float32, layers=2, **variant):
        model = make_phi3(num_hidden_layers=layers).to(dtype)
        lora.patch_phi3(model, 4, 8, p, "all-linear", **variant)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("lora_B", "lora_bias")):
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        return model.train()

    return make


def loss_of(model, ids=IDS):
    return model(ids, labels=ids, use_cache=False).loss


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(model, forward=loss_of):
    """(loss, gradients) of one forward and backward from a fixed seed."""
    torch.manual_seed(2)
    loss = forward(model)
    loss.backward()
    gradients = {name: p.grad for name, p in trained(model).items()}
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values())
    assert any(bool(g.any()) for g in gradients.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return loss.detach(), gradients


def assert_near(got, want, bound):
    """In the maximum, in units of the largest value that was wanted, of everything."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = (got[name] - value).abs().max() / value.abs().max()
        assert error <= bound, f"{name} is off by {error:.1e} of its largest value"


class TestCheckpointing:
    """Recomputing draws the very masks again."""

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("p", [0.0, 0.2])
    @pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
    def test_loss_and_gradients_are_the_same_to_the_bit(self, make, how, p, variant):
        loss, gradients = step(make(p, **VARIANTS[variant]))
        again, recomputed = step(make(p, how, **VARIANTS[variant]))
        assert torch.equal(again, loss)
        assert recomputed.keys() == gradients.keys()
        assert all(torch.equal(recomputed[name], gradients[name]) for name in gradients)

    def test_dropout_acts_in_these_tests(self, make):
        assert not torch.equal(step(make(0.2))[0], step(make(0.0))[0])

    def test_the_generator_is_left_as_without_it(self, make):
        states = []
        for how in (None, "reentrant", "non-reentrant"):
            step(make(0.2, how))
            states.append(torch.get_rng_state())
        assert torch.equal(states[0], states[1])
        assert torch.equal(states[0], states[2])


class TestCompiling:
    @pytest.mark.parametrize(
        ("variant", "p", "checkpointing"),
        [
            *[("plain", p, how) for p in (0.0, 0.2) for how in (None, "non-reentrant")],
            *[(v, 0.2, "non-reentrant") for v in ("dora", "lora_bias", "lorafa", "pissa")],
        ],
    )
    def test_a_step_is_one_graph_with_eagers_numbers(self, make, variant, p, checkpointing):
        """With dropout: every layer draws its own mask, the one that it draws in eager."""
        torch._dynamo.reset()
        loss, gradients = step(make(p, layers=1, **VARIANTS[variant]))
        model = make(p, checkpointing, layers=1, **VARIANTS[variant])
        if checkpointing:  # else transformers makes the embeddings require gradients by a hook,
            model.disable_input_require_grads()  # which breaks the graph, of a plain model too
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(loss_of, backend=counter, fullgraph=True)
        got, found = step(model, compiled)
        assert counter.frame_count == 1
        assert_near({"loss": got, **found}, {"loss": loss, **gradients}, 1e-5)

    def test_inductor_too(self, make):
        torch._dynamo.reset()
        loss, gradients = step(make(0.2, layers=1))
        model = make(0.2, "non-reentrant", layers=1)
        model.disable_input_require_grads()
        got, found = step(model, torch.compile(loss_of, fullgraph=True))
        assert_near({"loss": got, **found}, {"loss": loss, **gradients}, 1e-5)

    def test_with_transformers_hook_no_more_breaks_than_the_frozen_model(self, make, make_phi3):
        torch._dynamo.reset()
        frozen = make_phi3(num_hidden_layers=1).requires_grad_(False).train()
        frozen.gradient_checkpointing_enable({"use_reentrant": False})
        breaks = []
        for model in (frozen, make(0.2, "non-reentrant", layers=1)):
            explanation = torch._dynamo.explain(loss_of)(model)
            breaks.append(explanation.graph_break_count)
            torch._dynamo.reset()
        assert breaks[1] <= breaks[0]


class Formula(nn.Module):
    """What a LoRA layer computes, on its own Parameters, in PyTorch's operations alone."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.lora_A, self.lora_B = layer.weight, layer.lora_A, layer.lora_B
        self.scaling, self.parts = layer.scaling, (layer.out_splits, layer.enable_lora)

    def forward(self, x):
        splits, enabled = self.parts
        factors = (self.lora_A, self.lora_B)
        kw = {"splits": splits, "enabled": enabled}
        return reference.lora_linear(x, self.weight, None, *factors, self.scaling, **kw)


def in_plain_pytorch(model):
    for name, layer in list(model.named_modules()):
        if isinstance(layer, lora.LoRALayer):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Formula(layer))
    return model


def autocast(model, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype=dtype):
        return loss_of(model)


class TestAutocast:
    @pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
    def test_error_is_at_most_twice_that_of_the_formula(self, make, base):
        model = make(dtype=base)
        truth = in_plain_pytorch(make(dtype=base).double())
        theirs = in_plain_pytorch(make(dtype=base))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = [m(IDS, use_cache=False).logits for m in (model, theirs)]
        assert {t.dtype for t in logits} == {torch.bfloat16}
        results = [(step(m, autocast)[1], y) for m, y in zip((model, theirs), logits, strict=True)]
        results = [{**gradients, "logits": y} for gradients, y in results]
        assert {g.dtype for g in step(make(dtype=base), autocast)[1].values()} == {torch.float32}
        want = {**step(truth)[1], "logits": truth(IDS, use_cache=False).logits}
        for name, right in want.items():
            ours, peers = ((found[name] - right).square().mean().sqrt() for found in results)
            assert ours <= 2 * peers, f"{name}: {ours:.1e}, PyTorch's {peers:.1e}"

    def test_a_layers_output_and_input_gradient_have_the_formulas_dtypes(self, make):
        for base in (torch.float32, torch.bfloat16):
            layer = make(0.2, dtype=base).model.layers[0].self_attn.qkv_proj
            for given in (torch.float32, torch.bfloat16):
                found = []
                for module in (layer, Formula(layer)):
                    leaf = torch.randn(6, 64, dtype=given).requires_grad_()
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        y = module(leaf)
                    y.sum().backward()
                    found.append((y.dtype, leaf.grad.dtype, layer.lora_A.grad.dtype))
                assert found[0] == found[1] == (torch.bfloat16, given, torch.float32)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_dropout_and_checkpointing_under_autocast(self, make, variant):
        loss, gradients = step(make(0.2, **VARIANTS[variant]), autocast)
        again, recomputed = step(make(0.2, "non-reentrant", **VARIANTS[variant]), autocast)
        assert torch.equal(again, loss)
        assert all(torch.equal(recomputed[name], gradients[name]) for name in gradients)

    def test_fp16_with_a_gradient_scaler(self, make):
        model = make()
        _, want = step(make())
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scaler.scale(autocast(model, torch.float16)).backward()
        scaler.unscale_(optimizer)
        assert_near({name: p.grad for name, p in trained(model).items()}, want, 0.02)
        before = {name: p.detach().clone() for name, p in trained(model).items()}
        scaler.step(optimizer)
        scaler.update()
        assert all(not torch.equal(p, before[name]) for name, p in trained(model).items())

    def test_an_overflow_in_fp16_skips_the_step(self, make):
        model = make()
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        scaler.scale(autocast(model, torch.float16)).backward()
        before = {name: p.detach().clone() for name, p in trained(model).items()}
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**39
        assert all(torch.equal(p, before[name]) for name, p in trained(model).items())


class TestAccumulation:
    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
    @pytest.mark.parametrize("checkpointing", [None, "non-reentrant"])
    def test_micro_batches_equal_one_batch(self, make, dtype, bound, checkpointing):
        """Each of other counted tokens, and weighed by them, as transformers' Trainer does it."""
        ids = torch.randint(3, 96, (8, 12))
        labels = ids.clone()
        labels[torch.arange(12)[None] >= torch.randint(4, 12, (8, 1))] = -100
        counted = (labels[:, 1:] != -100).sum()
        whole, model = make(dtype=dtype), make(dtype=dtype, checkpointing=checkpointing)
        whole(ids, labels=labels, use_cache=False).loss.backward()
        for micro, of_micro in zip(ids.split(2), labels.split(2), strict=True):
            outputs = model(micro, labels=of_micro, use_cache=False, num_items_in_batch=counted)
            outputs.loss.backward()
        want = {name: p.grad for name, p in trained(whole).items()}
        assert_near({name: p.grad for name, p in trained(model).items()}, want, bound)


class TestOptimizers:
    @pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
    @pytest.mark.parametrize("option", ["fused", "foreach"])
    def test_equals_the_plain_one_and_holds_the_factors_alone(self, make, kind, option):
        options = {"lr": 1e-2, "weight_decay": 0.1}
        options |= {"momentum": 0.9} if kind is torch.optim.SGD else {}
        results = []
        for choice in ({"fused": False, "foreach": False}, {option: True}):
            model = make()
            base = {n: p.detach().clone() for n, p in model.named_parameters()}
            optimizer = kind(trained(model).values(), **options, **choice)
            for _ in range(5):
                loss_of(model).backward()
                optimizer.step()
                optimizer.zero_grad()
            factors = trained(model)
            assert set(optimizer.state) == set(factors.values())
            assert set(factors) == set(lora.lora_state_dict(model))
            changed = {n for n, p in model.named_parameters() if not torch.equal(p, base[n])}
            assert changed == set(factors)
            results.append({name: p.detach() for name, p in factors.items()})
        assert_near(results[1], results[0], 1e-5)


def kept_bytes(layer, x):
    """Bytes that autograd keeps for `layer`'s backward, each storage once, Parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(storages.values())


# What a token keeps: x is 64 values wide, S 12 (three parts of rank 4), the output 128.
KEPT = {
    "plain": 64 + 12,
    "rslora": 64 + 12,
    "lora_bias": 64 + 12,
    "dora": 64 + 12 + 128,  # the output before its magnitude
    "lorafa": 12,
    "pissa": 64 + 2 * 12,  # of the frozen factors too
}


class TestLongSequences:
    TOKENS = 32768

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("p", [0.0, 0.05])
    def test_a_layer_keeps_x_S_and_mask_bits_for_every_token(self, p, dtype, variant):
        """The frozen layer keeps nothing, and its adapter nothing that is quadratic."""
        options = {"enable_lora": [True] * 3, "out_splits": [64, 32, 32], **VARIANTS[variant]}
        base = nn.Linear(64, 128, bias=False, dtype=dtype).requires_grad_(False)
        layer = lora.MergedLinear.from_module(base, 4, 8, p, **options)
        kept = []
        for tokens in (self.TOKENS // 4, self.TOKENS):
            x = torch.randn(1, tokens, 64, dtype=dtype).requires_grad_()
            assert kept_bytes(base, x) == 0
            kept.append(kept_bytes(layer, x))
        a_token = KEPT[variant] * x.element_size() + (64 / 8 if p > 0 else 0)
        assert 0 < kept[1] - kept[0] <= (self.TOKENS - self.TOKENS // 4) * a_token
        if variant == "plain":
            assert kept[1] == self.TOKENS * a_token

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
    def test_a_step_at_32k_tokens_is_linear_in_memory(self):
        """Peak of the resident memory over that of a short step, in a fresh process.

        A decoder layer with all its gradients and copies takes fewer than 1,000 values a token here,
        the loss fewer than ten rows of logits; a mask or a row of scores has 32,768.
        """
        code = f"""
import torch, lora
from transformers import Phi3Config, Phi3ForCausalLM

config = Phi3Config(
    vocab_size=96, hidden_size=16, intermediate_size=28, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, max_position_embeddings={self.TOKENS},
    pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
)
model = Phi3ForCausalLM._from_config(config, attn_implementation="sdpa")
lora.patch_phi3(model, 4, 8, 0.05, "all-linear").train()
model.gradient_checkpointing_enable({{"use_reentrant": False}})
for tokens in (256, {self.TOKENS}):
    ids = torch.randint(3, 96, (1, tokens))
    model(ids, labels=ids).loss.backward()
    print(next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line))
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
"""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        short, long = (1024 * int(line) for line in done.stdout.split())
        assert self.TOKENS * 96 * 4 < long - short < self.TOKENS * (1000 + 10 * 96) * 4
