"""The contract: same seed, same call, same state, same outputs and gradients as loralib 0.1.2."""

import itertools

import loralib
import pytest
import torch

import lora

MASKS = [list(m) for n in (1, 2, 3) for m in itertools.product([True, False], repeat=n) if any(m)]


def both(kind, *args, **kwargs):
    layers = []
    for library in (lora, loralib):
        torch.manual_seed(11)
        layers.append(getattr(library, kind)(*args, **kwargs))
    return layers


def plain_keys(state):
    return {key.replace("conv.", ""): value for key, value in state.items()}


def randomise(ours, theirs):
    if ours.r == 0:
        return
    with torch.no_grad():
        for name in ("lora_A", "lora_B"):
            getattr(ours, name).normal_(std=0.3)
            getattr(theirs, name).copy_(getattr(ours, name))


def check(ours, theirs, x):
    state, expected = ours.state_dict(), plain_keys(theirs.state_dict())
    assert list(state) == list(expected) or set(state) == set(expected)
    for key in state:
        assert torch.equal(state[key], expected[key]), key
        assert state[key].shape == expected[key].shape
    assert {k: p.requires_grad for k, p in ours.named_parameters()} == {
        k.replace("conv.", ""): p.requires_grad for k, p in theirs.named_parameters()
    }
    assert (ours.r, ours.lora_alpha) == (theirs.r, theirs.lora_alpha)
    if ours.r:
        assert ours.scaling == theirs.scaling
    randomise(ours, theirs)
    grad = None
    for layer in (ours, theirs):
        y = layer(x)
        grad = torch.randn_like(y) if grad is None else grad
        y.backward(grad)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    expected = {k.replace("conv.", ""): p.grad for k, p in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=1e-4)
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    if ours.r:
        assert ours.merged == theirs.merged is True


@pytest.mark.parametrize("r", [0, 1, 4])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(r, fan_in_fan_out, bias):
    ours, theirs = both("Linear", 12, 20, r, 2, 0.0, fan_in_fan_out, bias=bias)
    check(ours, theirs, torch.randn(3, 5, 12))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("r", [0, 3])
def test_merged_linear(mask, fan_in_fan_out, r):
    ours, theirs = both("MergedLinear", 12, 18, r, 2, 0.0, mask, fan_in_fan_out)
    check(ours, theirs, torch.randn(2, 5, 12))


@pytest.mark.parametrize("r", [0, 3])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}])
def test_embedding(r, options):
    ours, theirs = both("Embedding", 10, 6, r, 2, **options)
    check(ours, theirs, torch.tensor([[1, 2, 3], [3, 3, 9]]))


@pytest.mark.parametrize("r", [0, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 2},
        {"stride": 2, "padding": 1, "bias": False},
        {"dilation": 2, "padding": 2, "padding_mode": "reflect"},
    ],
)
def test_conv2d(r, kernel, options):
    ours, theirs = both("Conv2d", 4, 6, kernel, r, 2, **options)
    check(ours, theirs, torch.randn(2, 4, 9, 9))


@pytest.mark.parametrize(("kind", "space"), [("Conv1d", (7,)), ("Conv3d", (3, 4, 5))])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("r", [0, 2])
def test_conv1d_and_conv3d_with_kernel_one(kind, space, groups, r):
    ours, theirs = both(kind, 4, 6, 1, r, 2, groups=groups)
    check(ours, theirs, torch.randn(2, 4, *space))


@pytest.mark.parametrize("merge_weights", [True, False])
def test_merge_weights_argument(merge_weights):
    ours, theirs = both("Linear", 4, 4, 2, merge_weights=merge_weights)
    ours.eval()
    theirs.eval()
    assert ours.merged == theirs.merged == merge_weights


def model(library):
    torch.manual_seed(4)
    return torch.nn.Sequential(
        library.Embedding(10, 8, 2),
        library.Linear(8, 8, 2),
        library.MergedLinear(8, 12, 2, enable_lora=[True, False, True]),
        torch.nn.LayerNorm(12),
        torch.nn.Linear(12, 4),
        library.Linear(4, 4),
    )


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_mark_and_state_dict(bias):
    ours, theirs = model(lora), model(loralib)
    lora.mark_only_lora_as_trainable(ours, bias)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    trained = {k for k, p in theirs.named_parameters() if p.requires_grad}
    if bias == "lora_only":
        trained -= {"5.bias"}  # loralib trains the bias of an r=0 layer and does not save it
    assert {k for k, p in ours.named_parameters() if p.requires_grad} == trained
    saved = lora.lora_state_dict(ours, bias)
    assert set(saved) == set(loralib.lora_state_dict(theirs, bias)) == trained
    assert all(torch.equal(saved[k], v) for k, v in loralib.lora_state_dict(theirs, bias).items())


def test_a_loralib_checkpoint_loads_strictly():
    theirs = model(loralib)
    model(lora).load_state_dict(theirs.state_dict())
    conv = loralib.Conv2d(4, 6, 3, 2)
    ours = lora.Conv2d(4, 6, 3, 2)
    ours.load_state_dict(conv.state_dict())
    assert torch.equal(ours.weight, conv.conv.weight)
    assert torch.equal(ours.bias, conv.conv.bias)
    nested = torch.nn.Sequential(lora.Conv2d(4, 6, 3, 2))
    nested.load_state_dict(torch.nn.Sequential(conv).state_dict())
    both_names = {**conv.state_dict(), "weight": conv.conv.weight, "bias": conv.conv.bias}
    ours.load_state_dict(both_names)
    with pytest.raises(RuntimeError, match=r"conv\.weight and weight are both .* and differ"):
        ours.load_state_dict({**both_names, "weight": torch.zeros_like(ours.weight)})


def test_dropout_has_the_same_expectation():
    ours, theirs = both("Linear", 64, 8, 4, 8, 0.25)
    randomise(ours, theirs)
    x = torch.randn(1, 64)
    with torch.no_grad():
        mean = ours(x.expand(20000, 64)).mean(0)
        theirs.eval()
        expected = theirs(x)[0]
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.05)
