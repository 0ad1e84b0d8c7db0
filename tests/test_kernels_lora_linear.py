"""lora_linear against its formula, in float64 and in every dtype; what it keeps; what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from lora.kernels import lora_linear
from lora.kernels.dropout import keep, keep_scale, seeded_keep_bits
from lora.kernels.reference import lora_linear as reference

SEED = torch.tensor(42)


def problem(shape, out, r, enabled=(True,), splits=None, bias=True, dtype=torch.float64):
    """x, weight, bias, A, B that fit, all with gradients."""
    splits = (out,) if splits is None else splits
    rows = sum(s for s, on in zip(splits, enabled, strict=True) if on)
    in_features = shape[-1]
    tensors = [
        torch.randn(shape, dtype=dtype),
        torch.randn(out, in_features, dtype=dtype) / in_features**0.5,
        torch.randn(out, dtype=dtype) if bias else None,
        torch.randn(r * sum(enabled), in_features, dtype=dtype) / in_features**0.5,
        torch.randn(rows, r, dtype=dtype),
    ]
    return [None if t is None else t.requires_grad_() for t in tensors]


def mask_of(x, p):
    bits = seeded_keep_bits(SEED, x.shape[:-1].numel(), x.shape[-1], p)
    return keep(torch.ones_like(x).detach(), bits)


def gradients(y, tensors, grad):
    wanted = [t for t in tensors if t is not None]
    return torch.autograd.grad(y, wanted, grad, allow_unused=True)


parts = st.lists(st.tuples(st.integers(1, 7), st.booleans()), min_size=1, max_size=4).filter(
    lambda pairs: any(on for _, on in pairs)
)


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    k=st.integers(1, 20),
    r=st.integers(1, 6),
    pairs=parts,
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.3]),
)
def test_output_and_gradients_equal_the_formula(lead, k, r, pairs, bias, p):
    splits, enabled = zip(*pairs, strict=True)
    tensors = problem((*lead, k), sum(splits), r, enabled, splits, bias)
    x = tensors[0]
    kw = {"splits": splits, "enabled": enabled}
    y = lora_linear(*tensors, 0.7, dropout_p=p, seed=SEED, **kw)
    mask, drawn_p = (mask_of(x, p), 1 - 1 / keep_scale(p)) if p else (None, 0.0)
    expected = reference(*tensors, 0.7, mask=mask, p=drawn_p, **kw)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    for got, want in zip(
        gradients(y, tensors, grad), gradients(expected, tensors, grad), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("splits", "enabled"), [(None, None), ((3, 2, 4), (True, False, True))])
def test_gradcheck_and_gradgradcheck(p, splits, enabled):
    tensors = problem((2, 3, 7), 9, 2, enabled or (True,), splits)

    def f(*args):
        return lora_linear(*args, 0.7, splits=splits, enabled=enabled, dropout_p=p, seed=SEED)

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


def test_a_loss_with_a_gradient_penalty():
    """y and S have gradients in one backward, unlike in gradgradcheck."""
    tensors = problem((2, 3, 7), 9, 2, (True,), None)

    def of(function):
        y = function(*tensors, 0.7).square().sum()
        first = torch.autograd.grad(y, tensors[-2:], create_graph=True)
        return torch.autograd.grad(y + sum(g.square().sum() for g in first), tensors)

    torch.testing.assert_close(of(lora_linear), of(reference), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_error_is_at_most_twice_pytorchs(dtype, p):
    """Against float64, for the output and every gradient, in the maximum and in the mean square."""
    splits, enabled = (40, 16, 16), (True, True, False)
    kw = {"splits": splits, "enabled": enabled}
    exact = problem((5, 13, 96), 72, 4, enabled, splits)
    cast = [t.detach().to(dtype).requires_grad_() for t in exact]
    exact = [t.detach().double().requires_grad_() for t in cast]
    grad = torch.randn(5, 13, 72).to(dtype)

    def run(function, tensors, **options):
        y = function(*tensors, 2.0, **kw, **options)
        return [y, *gradients(y, tensors, grad.to(y.dtype))]

    mask = {"mask": mask_of(exact[0], p), "p": p} if p else {}
    truth = run(reference, exact, **mask)
    theirs = run(reference, cast, **{k: v.to(dtype) if k == "mask" else v for k, v in mask.items()})
    ours = run(lora_linear, cast, dropout_p=p, seed=SEED)
    for got, peer, want in zip(ours, theirs, truth, strict=True):
        assert got.dtype == dtype
        error, allowed = (got - want).abs(), (peer - want).abs()
        atol = torch.finfo(dtype).eps * want.abs().max()
        assert error.max() <= 2 * allowed.max() + atol
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + atol / 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 7, 12), (2, 3, 5, 12)])
def test_zero_B_gives_the_frozen_output_to_the_bit(dtype, bias, shape):
    x, w, b, A, B = problem(shape, 9, 2, bias=bias, dtype=dtype)
    y = lora_linear(x, w, b, A, torch.zeros_like(B), 2.0)
    assert torch.equal(y, torch.nn.functional.linear(x, w, b))


def test_rank_zero_and_no_enabled_part_are_the_frozen_layer():
    x, w, b, _, _ = problem((4, 6), 9, 1)
    expected = torch.nn.functional.linear(x, w, b)
    kw = {"splits": (4, 5), "dropout_p": 0.5}
    empty = torch.zeros(0, 6, dtype=x.dtype)
    assert torch.equal(lora_linear(x, w, b, empty, x.new_zeros(9, 0), 1.0, **kw), expected)
    y = lora_linear(x, w, b, empty, x.new_zeros(0, 3), 1.0, enabled=(False, False), **kw)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("r", [1, 5, 64, 256])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_any_rank_and_any_number_of_rows(r, rows):
    tensors = problem((rows, 17), 19, r)
    y, expected = lora_linear(*tensors, 0.5), reference(*tensors, 0.5)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    for got, want in zip(
        gradients(y, tensors, grad), gradients(expected, tensors, grad), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_strided_and_expanded_inputs_and_gradients():
    _, w, b, A, B = problem((4, 6), 9, 2)
    layouts = [
        torch.randn(6, 4, dtype=torch.float64).t(),
        torch.randn(1, 6, dtype=torch.float64).expand(4, 6),
        torch.randn(4, 12, dtype=torch.float64)[:, ::2],
        torch.randn(6, 3, 4, dtype=torch.float64).permute(2, 1, 0),
    ]
    for x in layouts:
        x.requires_grad_()
        y, expected = lora_linear(x, w, b, A, B, 0.5), reference(x, w, b, A, B, 0.5)
        torch.testing.assert_close(y, expected)
        grad = torch.randn(1, dtype=torch.float64).expand_as(y)
        tensors = [x, w, b, A, B]
        for got, want in zip(
            gradients(y, tensors, grad), gradients(expected, tensors, grad), strict=True
        ):
            torch.testing.assert_close(got, want)


def test_weight_may_be_a_transposed_view():
    x, w, b, A, B = problem((4, 6), 9, 2)
    stored = w.detach().t().contiguous()
    torch.testing.assert_close(
        lora_linear(x, stored.t(), b, A, B, 0.5), lora_linear(x, w, b, A, B, 0.5)
    )


def kept(function, parameters):
    """Bytes of the distinct storages saved for backward, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in parameters if p is not None}
    storages = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    assert y.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_kept_for_backward_is_x_S_and_one_bit_an_element(dtype, p):
    x, w, b, A, B = problem((64, 256), 96, 4, (True,) * 3, (32,) * 3, dtype=dtype)
    w.requires_grad_(False)
    size = kept(
        lambda: lora_linear(x, w, b, A, B, 2.0, splits=(32,) * 3, dropout_p=p), (w, b, A, B)
    )
    bits = x.numel() / 8 if p else 0
    assert size <= x.nbytes * (1 + 12 / 256) + bits
    A.requires_grad_(False)  # LoRA-FA: x is not needed
    size = kept(
        lambda: lora_linear(x, w, b, A, B, 2.0, splits=(32,) * 3, dropout_p=p), (w, b, A, B)
    )
    assert size <= x.nbytes * 12 / 256 + bits


def test_what_is_not_asked_for_is_not_computed():
    tensors = problem((4, 6), 9, 2)
    for wanted in range(5):
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i == wanted)
            tensor.grad = None
        lora_linear(*tensors, 0.5).sum().backward()
        assert [t.grad is not None for t in tensors] == [i == wanted for i in range(5)]


def test_saved_tensors_are_never_written_to():
    tensors = problem((4, 6), 9, 2)
    copies = [t.detach().clone() for t in tensors]
    y = lora_linear(*tensors, 0.5, dropout_p=0.5)
    grad = torch.randn_like(y)
    grad_copy = grad.clone()
    first = torch.autograd.grad(y, tensors, grad, retain_graph=True)
    second = torch.autograd.grad(y, tensors, grad)
    assert all(map(torch.equal, tensors, copies))
    assert torch.equal(grad, grad_copy)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_fp32_factors_on_a_half_base(base):
    x, w, b, _, _ = problem((5, 32), 24, 4, dtype=base)
    _, _, _, A, B = problem((5, 32), 24, 4, dtype=torch.float32)
    dtypes = []

    def pack(tensor):
        dtypes.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = lora_linear(x, w, b, A, B, 2.0)
    assert (torch.float32, x.numel()) not in dtypes
    assert (base, 5 * 4) in dtypes  # S
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, A.grad.dtype, B.grad.dtype) == (base, base, *[torch.float32] * 2)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype_and_keeps_no_cast_weight(weight_dtype):
    x, w, b, A, B = problem((64, 96), 80, 4, dtype=torch.float32)
    w = w.detach().to(weight_dtype)
    b = b.detach().to(weight_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x, w, b, A, B, 2.0)
        size = kept(lambda: lora_linear(x, w, b, A, B, 2.0), (w, b, A, B))
    assert y.dtype == torch.bfloat16
    assert size <= 64 * 96 * 2 + 64 * 4 * 2
    y.sum().backward()
    assert x.grad.dtype == A.grad.dtype == B.grad.dtype == torch.float32
    expected = reference(x, w.float(), b.float(), A, B, 2.0)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    tensors = problem((6, 16), 9, 2, dtype=torch.float32)

    def f(*args):
        return lora_linear(*args, 0.5, dropout_p=0.4)

    results = []
    for wrap in (False, True):
        torch.manual_seed(3)
        y = checkpoint(f, *tensors, use_reentrant=use_reentrant) if wrap else f(*tensors)
        y.square().sum().backward()
        results.append([t.grad.clone() for t in tensors])
        for t in tensors:
            t.grad = None
    assert all(map(torch.equal, *results))


def test_func_grad_equals_autograd():
    x, w, b, A, B = problem((4, 6), 9, 2)
    got = torch.func.grad(lambda a: lora_linear(x, w, b, a, B, 0.5).square().sum())(A.detach())
    want = torch.autograd.grad(lora_linear(x, w, b, A, B, 0.5).square().sum(), A)[0]
    torch.testing.assert_close(got, want)


def test_seed_decides_the_mask_alone():
    tensors = problem((6, 16), 9, 2)
    runs = [lora_linear(*tensors, 0.5, dropout_p=0.4, seed=s) for s in (SEED, 42, SEED + 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"x has shape \(3, 5\): expected \(\.\.\., 6\)"),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\): expected \(9,\)"),
        ({"lora_A": torch.zeros(2, 7)}, "lora_A"),
        ({"lora_B": torch.zeros(8, 2)}, "lora_B"),
        ({"weight": torch.zeros(9)}, "matrices"),
        ({"splits": (4, 4)}, "splits"),
        ({"splits": (-1, 10), "enabled": (False, True)}, "splits"),
        ({"enabled": (True, True)}, "enabled"),
        ({"dropout_p": 0.1, "seed": torch.zeros(2, dtype=torch.int64)}, r"seed has shape \(2,\)"),
        ({"dropout_p": 1.0}, "dropout_p=1.0"),
        ({"impl": "cuda"}, "impl='cuda'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {
        "x": torch.zeros(3, 6),
        "weight": torch.zeros(9, 6),
        "bias": None,
        "lora_A": torch.zeros(2, 6),
        "lora_B": torch.zeros(9, 2),
        "scaling": 1.0,
    }
    lora_linear(**good)
    with pytest.raises(ValueError, match=message):
        lora_linear(**{**good, **change})


def test_dtypes_that_differ_are_refused_with_the_fix():
    x, w, _, A, B = problem((3, 6), 9, 2, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"x\.to\(torch\.bfloat16\)"):
        lora_linear(x, w.bfloat16(), None, A, B, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lora_linear(x, w.bfloat16(), None, A, B, 1.0)


def test_tensors_on_several_devices_are_named():
    x, weight, bias, A, B = problem((3, 4), 5, 2)
    with pytest.raises(ValueError, match=r"the tensors are on cpu, meta: expected one device"):
        lora_linear(x, weight.to("meta"), bias, A, B, 1.0)
