"""Conversions of adapters: exact to the bit, there and back, or refused by name."""

import copy
import warnings

import loralib
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora
from lora.adapter import adapter_of, read_adapter, write_adapter
from lora.adapter.contents import Adapter, AdapterError, Layer
from lora.adapter.convert import from_loralib, fuse, portable, split, to_loralib
from lora.adapter.storage import blocks

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ROWS = {"qkv_proj": (8, 4, 4), "gate_up_proj": (6, 6)}


def numbers(*shape, dtype=torch.float32):
    """Small whole numbers: sums of their products are exact, in whatever order."""
    return torch.randint(-8, 9, shape).to(dtype)


class Fused(nn.Module):
    """The projections of a decoder layer as Phi-3 has them."""

    def __init__(self):
        super().__init__()
        self.qkv_proj = nn.Linear(8, 16, bias=False)
        self.o_proj = nn.Linear(8, 8, bias=False)
        self.gate_up_proj = nn.Linear(8, 12, bias=False)
        for parameter in self.parameters():
            parameter.data = numbers(*parameter.shape)

    def forward(self, x):
        return torch.cat([self.qkv_proj(x), self.o_proj(x), self.gate_up_proj(x)], -1)


class Separate(nn.Module):
    """The same layer as Llama has it, from slices of the fused weights."""

    def __init__(self, fused):
        super().__init__()
        self.o_proj = copy.deepcopy(fused.o_proj)
        for whole, parts in PARTS.items():
            weights = getattr(fused, whole).weight.detach().split(ROWS[whole])
            for part, weight in zip(parts, weights, strict=True):
                layer = nn.Linear(8, len(weight), bias=False)
                layer.weight = nn.Parameter(weight.clone())
                setattr(self, part, layer)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return torch.cat([q, k, v, self.o_proj(x), self.gate_proj(x), self.up_proj(x)], -1)


def bases():
    """Two copies of a model with a fused layer, and the same model with a separate one."""
    torch.manual_seed(0)
    layer = Fused()
    fused = nn.ModuleDict({"block": layer})
    return fused, copy.deepcopy(fused), nn.ModuleDict({"block": Separate(layer)})


def merged(rows, mask, r=2, **facts):
    facts = {"lora_alpha": 4, "scaling": 2.0, **facts}
    height = sum(n for n, on in zip(rows, mask, strict=True) if on)
    A, B = numbers(r * sum(mask), 8), numbers(height, r)
    return Layer("MergedLinear", A, B, enable_lora=mask, out_splits=rows, **facts)


def linear(out, r=2, **facts):
    facts = {"lora_alpha": 4, "scaling": 2.0, **facts}
    return Layer("Linear", numbers(r, 8), numbers(out, r), **facts)


def of_parts(qkv=(True, True, True)):
    """An adapter with an update for every part."""
    return Adapter(
        {
            "block.qkv_proj": merged(ROWS["qkv_proj"], qkv),
            "block.o_proj": linear(8),
            "block.gate_up_proj": merged(ROWS["gate_up_proj"], (True, True)),
        },
        target_modules=("qkv_proj", "o_proj", "gate_up_proj"),
    )


def dense():
    """One as PEFT trains it, with one update for a fused projection."""
    layers = {f"block.{n}": linear(out) for n, out in (("qkv_proj", 16), ("gate_up_proj", 12))}
    return Adapter(layers, target_modules=("qkv_proj", "gate_up_proj"))


def same(one, other):
    """Layers that are the same, tensors to the bit; what is known of the base does not count."""
    assert one.layers.keys() == other.layers.keys()
    for name, layer in one.layers.items():
        twin = other.layers[name]
        assert torch.equal(layer.lora_A, twin.lora_A)
        assert torch.equal(layer.lora_B, twin.lora_B)
        for fact in ("kind", "lora_alpha", "scaling", "enable_lora", "out_splits", "transposed"):
            assert getattr(layer, fact) == getattr(twin, fact)


def update(layer):
    """The dense update in float64, part by part; of whole numbers without any rounding."""
    A, B = layer.lora_A.double(), layer.lora_B.double()
    if layer.kind == "Embedding":
        return (B @ A).T * layer.scaling
    if layer.kind == "Linear":
        return B @ A * layer.scaling
    rows, parts = [], iter(A.split(layer.r))
    for size, enabled in zip(layer.out_splits, layer.enable_lora, strict=True):
        if enabled:
            rows.append(B[:size] @ next(parts))
            B = B[size:]
        else:
            rows.append(A.new_zeros(size, A.shape[1]))
    return torch.cat(rows) * layer.scaling


def updates(adapter):
    """The dense updates in float64, parts under their fused names, without update as zeros."""
    found = {}
    for whole, parts in PARTS.items():
        name = f"block.{whole}"
        if name in adapter.layers:
            found[whole] = update(adapter.layers[name])
            continue
        pieces = [adapter.layers.get(f"block.{part}") for part in parts]
        if any(pieces):
            found[whole] = torch.cat(
                [
                    torch.zeros(rows, 8).double() if piece is None else update(piece)
                    for rows, piece in zip(ROWS[whole], pieces, strict=True)
                ]
            )
    return found


def assert_same_updates(one, other):
    one, other = updates(one), updates(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


MASKS = [(True, True, True), (True, False, True), (False, True, False)]


@pytest.mark.parametrize("mask", MASKS, ids=["qkv", "qv", "k"])
def test_split_has_the_same_update_in_every_row(mask):
    adapter = of_parts(mask)
    apart = split(adapter)
    enabled = [p for p, on in zip(PARTS["qkv_proj"], mask, strict=True) if on]
    assert set(apart.layers) == {f"block.{n}" for n in [*enabled, "o_proj", *PARTS["gate_up_proj"]]}
    assert set(apart.target_modules) == {*enabled, "o_proj", *PARTS["gate_up_proj"]}
    assert {layer.kind for layer in apart.layers.values()} == {"Linear"}
    assert apart.layers["block.o_proj"] is adapter.layers["block.o_proj"]
    assert_same_updates(apart, adapter)


def test_split_of_a_dense_update_copies_its_a():
    adapter = dense()
    apart = split(adapter, qkv_rows=(8, 4, 4))
    for part in PARTS["qkv_proj"]:
        layer = apart.layers[f"block.{part}"]
        assert torch.equal(layer.lora_A, adapter.layers["block.qkv_proj"].lora_A)
    assert_same_updates(apart, adapter)


@pytest.mark.parametrize("mask", MASKS[:2], ids=["qkv", "qv"])
def test_fuse_undoes_split_to_the_bit(mask):
    adapter = of_parts(mask)
    again = fuse(split(adapter))
    same(again, adapter)
    assert set(again.target_modules) == set(adapter.target_modules)


def test_fuse_undoes_split_of_dense_updates_to_the_bit():
    adapter = dense()
    same(fuse(split(adapter, qkv_rows=(8, 4, 4))), adapter)


def test_split_undoes_fuse_to_the_bit():
    apart = split(of_parts())
    same(split(fuse(apart)), apart)


def test_masks_that_differ_from_layer_to_layer_name_the_layers_in_full():
    layers = {
        f"layers.{i}.qkv_proj": merged(ROWS["qkv_proj"], mask) for i, mask in enumerate(MASKS)
    }
    apart = split(Adapter(layers, target_modules=("qkv_proj",)))
    assert apart.target_modules is None
    assert set(apart.layers) == {
        "layers.0.q_proj",
        "layers.0.k_proj",
        "layers.0.v_proj",
        "layers.1.q_proj",
        "layers.1.v_proj",
        "layers.2.k_proj",
    }


def test_split_forgets_a_target_that_the_adapter_has_no_layer_of():
    adapter = Adapter({"block.o_proj": linear(8)}, target_modules=("qkv_proj", "o_proj"))
    apart = split(adapter)
    same(apart, adapter)
    assert "qkv_proj" not in (apart.target_modules or ())


def in_float64(model, x):
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(x)


X = torch.arange(-12.0, 12.0).reshape(3, 8).double()


@pytest.mark.parametrize("mask", MASKS, ids=["qkv", "qv", "k"])
@pytest.mark.parametrize("reader", ["lora", "PEFT"])
def test_a_split_adapter_on_separate_projections_computes_the_same(mask, reader, tmp_path):
    fused, plain, separate = bases()
    adapter = of_parts(mask)
    write_adapter(adapter, tmp_path / "fused")
    write_adapter(split(adapter), tmp_path / "split")
    lora.load_adapter(fused, tmp_path / "fused")
    if reader == "lora":
        lora.load_adapter(separate, tmp_path / "split")
        block = separate["block"]
    else:
        block = PeftModel.from_pretrained(separate, tmp_path / "split").base_model.model["block"]
    wanted = in_float64(fused["block"], X)
    assert not torch.equal(wanted, in_float64(plain["block"], X))
    assert torch.equal(in_float64(block, X), wanted)


def test_an_adapter_that_peft_trained_on_separate_projections_fuses(tmp_path):
    fused, _, separate = bases()
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    theirs = get_peft_model(separate, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(numbers(*parameter.shape))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not identify embedding")
        theirs.save_pretrained(tmp_path / "theirs")
    write_adapter(fuse(read_adapter(tmp_path / "theirs").checked()), tmp_path / "ours")
    lora.load_adapter(fused, tmp_path / "ours")
    assert fused["block"].qkv_proj.enable_lora == [True, False, True]
    wanted = in_float64(theirs.base_model.model["block"], X)
    assert torch.equal(in_float64(fused["block"], X), wanted)


@pytest.mark.parametrize(
    ("adapter", "rows", "match"),
    [
        (lambda: dense(), None, "block.qkv_proj.*q_proj, k_proj, v_proj"),
        (lambda: dense(), (8, 4, 3), r"block.qkv_proj.*\[8, 4, 3\]"),
        (lambda: dense(), (8, 8), r"\[8, 8\]"),
        (lambda: Adapter({"a.c_attn": merged((8, 8), (True, True))}), None, "a.c_attn has parts"),
        (lambda: Adapter({"a.qkv_proj": merged((8, 8), (True, True))}), None, "has 2 parts"),
        (lambda: of_parts().replaced(biases={"block.qkv_proj.bias": torch.ones(16)}), None, "bias"),
        (
            lambda: Adapter(
                {"block.o_proj": linear(8)},
                modules_to_save=("qkv_proj",),
                saved={"block.qkv_proj.weight": torch.ones(16, 8)},
            ),
            None,
            "qkv_proj",
        ),
    ],
    ids=["no rows", "wrong sum", "two rows", "unknown parts", "two parts", "bias", "trained whole"],
)
def test_split_refuses_what_it_cannot_name_or_cut(adapter, rows, match):
    with pytest.raises(AdapterError, match=match):
        split(adapter(), rows)


def apart(**layers):
    return Adapter({f"block.{name}": layer for name, layer in layers.items()})


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        (lambda: apart(q_proj=linear(8), k_proj=linear(4, r=3)), "rank and scale"),
        (lambda: apart(q_proj=linear(8), v_proj=linear(4, scaling=1.0)), "rank and scale"),
        (lambda: apart(q_proj=linear(8)), "has q_proj alone"),
        (lambda: apart(k_proj=linear(4), v_proj=linear(4)), "has k_proj, v_proj alone"),
        (lambda: apart(q_proj=merged((4, 4), (True, True))), "Linear"),
        (
            lambda: apart(q_proj=linear(8), v_proj=linear(4)).replaced(
                bias="all", biases={"block.q_proj.bias": torch.ones(8)}
            ),
            "bias",
        ),
    ],
    ids=["ranks", "scales", "q alone", "k and v", "parts of parts", "bias"],
)
def test_fuse_refuses_parts_that_are_no_one_layer(adapter, match):
    with pytest.raises(AdapterError, match=match):
        fuse(adapter())


# Portable


def test_portable_has_one_rank_and_no_scale_and_the_same_update():
    adapter = of_parts((True, False, True))
    plain, rounding = portable(adapter)
    assert rounding == 0.0
    assert {layer.r for layer in plain.layers.values()} == {4}  # of two parts of rank 2
    assert {layer.lora_alpha for layer in plain.layers.values()} == {4}
    assert {layer.scaling for layer in plain.layers.values()} == {1.0}
    assert {layer.kind for layer in plain.layers.values()} == {"Linear"}
    for name, layer in adapter.layers.items():
        assert torch.equal(update(plain.layers[name]), update(layer))


def test_peft_reads_a_portable_file_without_patterns(tmp_path):
    fused, _, _ = bases()
    adapter = of_parts()
    layers = {**adapter.layers, "block.o_proj": linear(8, r=3, lora_alpha=3, scaling=1.0)}
    plain, rounding = portable(adapter.replaced(layers=layers))
    assert rounding == 0.0
    write_adapter(plain, tmp_path)
    config = read_adapter(tmp_path).config
    assert (config["r"], config["lora_alpha"]) == (6, 6)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    theirs = PeftModel.from_pretrained(copy.deepcopy(fused), tmp_path).merge_and_unload()
    for name, layer in layers.items():
        weight = fused.get_submodule(name).weight
        assert torch.equal(theirs.get_submodule(name).weight, weight + update(layer).float())


@pytest.mark.parametrize(
    ("scaling", "dtype", "wanted", "exact"),
    [
        (0.5, None, torch.bfloat16, True),
        (1.375, None, torch.float32, True),  # 8 bits times 4 bits
        (1.375, torch.bfloat16, torch.bfloat16, False),
        (1 / 3, None, torch.float32, False),
        (2.0, torch.float16, torch.float16, True),
    ],
)
def test_portable_rounds_b_once_and_says_by_how_much(scaling, dtype, wanted, exact):
    torch.manual_seed(1)
    A, B = torch.randn(2, 8).bfloat16(), torch.randn(5, 2).bfloat16()
    layer = Layer("Linear", A, B, lora_alpha=1, scaling=scaling)
    plain, rounding = portable(Adapter({"a": layer}), dtype)
    got = plain.layers["a"].lora_B
    assert got.dtype == plain.layers["a"].lora_A.dtype == wanted
    product = B.double() * scaling
    assert torch.equal(got, product.to(wanted))
    error = (got.double() - product).abs().max() / product.abs().max()
    assert rounding == error.item()
    assert (rounding == 0.0) == exact


def test_portable_of_an_embedding_stays_one():
    layer = Layer("Embedding", numbers(2, 11), numbers(6, 2), lora_alpha=4, scaling=2.0)
    plain, _ = portable(Adapter({"table": layer, "o": linear(8, r=3)}))
    assert plain.layers["table"].kind == "Embedding"
    assert plain.layers["table"].r == 3
    assert torch.equal(update(plain.layers["table"]), update(layer))


def test_portable_says_that_no_bias_was_trained():
    assert portable(dense().replaced(bias="all"))[0].bias == "none"


def large(A=1.0, B=1.0):
    layer = linear(8)
    return Adapter({"a": layer.with_factors(layer.lora_A * A, layer.lora_B * B)})


@pytest.mark.parametrize(
    ("adapter", "dtype", "match"),
    [
        (lambda: Adapter({"c": conv(2)}), None, "c is a Conv2d"),
        (lambda: dense().replaced(biases={"x.bias": torch.ones(1)}), None, "x.bias"),
        (
            lambda: dense().replaced(
                modules_to_save=("lm_head",), saved={"lm_head.weight": torch.ones(1)}
            ),
            None,
            "lm_head",
        ),
        (lambda: large(B=1e5), torch.float16, "a: .*float16"),
        (lambda: large(A=1e5), torch.float16, "a: .*float16"),
    ],
    ids=["convolution", "bias", "trained whole", "B overflows", "A overflows"],
)
def test_portable_refuses_what_others_do_not_read(adapter, dtype, match):
    with pytest.raises(AdapterError, match=match):
        portable(adapter(), dtype)


def conv(dimensions):
    return Layer(f"Conv{dimensions}d", numbers(2, 4), numbers(6, 2), lora_alpha=4, scaling=2.0)


# loralib


class OfLoralib(nn.Module):
    """A model of loralib's own layers, or of torch's with the same names."""

    def __init__(self, adapted):
        super().__init__()
        parts = {"enable_lora": [True, False, True], "lora_alpha": 4}
        self.table = loralib.Embedding(11, 8, 2, 4) if adapted else nn.Embedding(11, 8)
        self.inner = loralib.Linear(8, 12, 2, 4) if adapted else nn.Linear(8, 12)
        self.attn = loralib.MergedLinear(12, 18, 2, **parts) if adapted else nn.Linear(12, 18)

    def forward(self, ids):
        return self.attn(torch.tanh(self.inner(self.table(ids))))


@pytest.fixture
def of_loralib(fill_factors):
    """A trained model of loralib, and the plain model under it."""
    model = fill_factors(OfLoralib(True))
    with torch.no_grad():
        model.inner.bias.add_(1)
    plain = OfLoralib(False)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    return model, plain.eval()


def imported(model, plain, bias="none"):
    return from_loralib(
        loralib.lora_state_dict(model, bias),
        {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()},
        lora_alpha=4,
        enable_lora=[True, False, True],
        embeddings=["table"],
    )


IDS = torch.tensor([[1, 5, 0], [10, 1, 2]])


def test_a_model_of_loralib_computes_the_same_in_lora_and_in_peft(of_loralib, tmp_path):
    model, plain = of_loralib
    write_adapter(imported(model, plain), tmp_path)
    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    lora.load_adapter(ours, tmp_path)
    assert [type(m) for m in (ours.table, ours.inner, ours.attn)] == [
        lora.Embedding,
        lora.Linear,
        lora.MergedLinear,
    ]
    theirs = PeftModel.from_pretrained(theirs, tmp_path)
    model, ours, theirs = (m.double().train() for m in (model, ours.eval(), theirs))
    for other in (ours, theirs):
        torch.testing.assert_close(other(IDS), model(IDS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_loralib_to_peft_and_back_is_equal_to_the_bit(bias, of_loralib, tmp_path):
    model, plain = of_loralib
    before = loralib.lora_state_dict(model, bias)
    write_adapter(imported(model, plain, bias), tmp_path / "ours")
    with warnings.catch_warnings():  # PEFT, of biases and of models that are not transformers'
        warnings.simplefilter("ignore", UserWarning)
        theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    adapter = read_adapter(tmp_path / "theirs").checked()
    merged = adapter.layers["attn"]
    mask, rows = (True, False, True), (6, 6, 6)
    own = {"kind": "MergedLinear", "enable_lora": mask, "out_splits": rows}
    attn = merged.with_factors(merged.lora_A, blocks(merged.lora_B, mask, rows), **own)
    write_adapter(adapter.replaced(layers={**adapter.layers, "attn": attn}), tmp_path / "again")
    after = to_loralib(read_adapter(tmp_path / "again").checked())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    model.load_state_dict(after, strict=False)


def test_to_loralib_is_the_state_dict_of_the_model(of_loralib, fill_factors):
    _, plain = of_loralib
    ours = lora.patch(copy.deepcopy(plain), ["table", "inner"], r=2, lora_alpha=4, bias="all")
    ours.attn = lora.MergedLinear.from_module(ours.attn, 2, 4, enable_lora=[True, False, True])
    wanted = lora.lora_state_dict(fill_factors(ours), bias="all")
    got = to_loralib(adapter_of(ours))
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    loralib_model = OfLoralib(True)
    assert not loralib_model.load_state_dict(got, strict=False).unexpected_keys


@pytest.mark.parametrize("mask", [(True, False, False), (False, False, True)])
def test_one_part_of_several_comes_from_loralib(mask):
    layer = loralib.MergedLinear(8, 12, 2, 4, enable_lora=list(mask))
    adapter = from_loralib(
        {f"x.{k}": v for k, v in loralib.lora_state_dict(layer).items()},
        {"x.weight": (12, 8)},
        4,
        enable_lora=mask,
    )
    found = adapter.layers["x"]
    assert (found.kind, found.enable_lora, found.out_splits) == ("MergedLinear", mask, (4, 4, 4))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_convolution_with_kernel_size_1_comes_from_loralib(dimensions):
    A, B = numbers(2, 4), numbers(6, 2)
    state = {"c.lora_A": A, "c.lora_B": B}
    shapes = {"c.conv.weight": (6, 4, *(1,) * dimensions)}
    adapter = from_loralib(state, shapes, 4)
    assert adapter.layers["c"].kind == f"Conv{dimensions}d"
    assert torch.equal(to_loralib(adapter)["c.lora_A"], A)


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        (of_parts, "block.qkv_proj has parts of .8, 4, 4."),
        (
            lambda: dense().replaced(
                modules_to_save=("lm_head",), saved={"lm_head.weight": torch.ones(1)}
            ),
            "lm_head",
        ),
    ],
    ids=["unequal parts", "trained whole"],
)
def test_to_loralib_refuses_what_loralib_does_not_have(adapter, match):
    with pytest.raises(AdapterError, match=match):
        to_loralib(adapter())


def factors(a, b, name="x"):
    return {f"{name}.lora_A": torch.ones(a), f"{name}.lora_B": torch.ones(b)}


@pytest.mark.parametrize(
    ("state", "shape", "options", "match"),
    [
        ({"x.lora_A": torch.ones(2, 8)}, (12, 8), {}, "x has no lora_B"),
        ({"x.lora_B": torch.ones(12, 2)}, (12, 8), {}, "x has no lora_A"),
        (factors((2, 8), (12, 2)), None, {}, "x has no weight in the base"),
        ({**factors((2, 8), (12, 2)), "x.stray": torch.ones(1)}, (12, 8), {}, "x.stray"),
        ({}, (12, 8), {}, "no lora_A"),
        ({"x.bias": torch.ones(12)}, (12, 8), {}, "no lora_A"),
        (factors((3, 8), (12, 2)), (12, 8), {}, "x: .*do not fit"),
        (factors((2, 8), (12,)), (12, 8), {}, "x: .*do not fit"),
        (factors((2, 8), (12, 0)), (12, 8), {}, "x: .*do not fit"),
        (factors((2, 7), (12, 2)), (12, 8), {}, r"x: .*\(12, 8\)"),
        (factors((2, 8), (11, 2)), (12, 8), {}, "x: "),
        (factors((6, 24), (18, 6)), (6, 8, 3, 3), {}, r"\(6, 8, 3, 3\)"),
        (factors((2, 11), (6, 2)), (11, 6), {}, "name the embeddings"),
        (factors((2, 12), (8, 2)), (11, 6), {"embeddings": ["x"]}, "x: "),
        (factors((4, 8), (8, 2)), (12, 8), {"enable_lora": [True, True]}, "--enable-lora"),
        (factors((4, 8), (8, 2)), (12, 8), {}, "--enable-lora"),
        (factors((4, 8), (7, 2)), (12, 8), {"enable_lora": [1, 0, 1]}, "--enable-lora"),
        (factors((6, 8), (2, 2)), (12, 8), {}, "x: "),
        (factors((2, 8), (12, 2)), (12, 8), {"lora_alpha": float("nan")}, "lora_alpha"),
    ],
    ids=[
        "no B",
        "no A",
        "no weight",
        "stray",
        "empty",
        "bias alone",
        "ranks",
        "vector",
        "rank 0",
        "columns",
        "rows",
        "kernel 3",
        "embedding or transposed",
        "no such table",
        "mask too short",
        "no mask",
        "rows of parts",
        "fewer rows than parts",
        "alpha",
    ],
)
def test_from_loralib_refuses_what_does_not_say_its_layer(state, shape, options, match):
    shapes = {} if shape is None else {"x.weight": shape}
    with pytest.raises(AdapterError, match=match):
        from_loralib(state, shapes, **{"lora_alpha": 4, **options})


def test_blocks_refuses_a_dense_b():
    B = torch.zeros(8, 4)
    B[:4, :2], B[4:, 2:] = 1, 2
    assert torch.equal(blocks(B, (True, True), (4, 4)), torch.cat([B[:4, :2], B[4:, 2:]]))
    B[0, 3] = 1e-30
    with pytest.raises(AdapterError, match="1 entries beside its blocks"):
        blocks(B, (True, True), (4, 4))


def test_a_part_beside_its_whole_is_not_fused():
    def layer(rows):
        return Layer("Linear", torch.ones(2, 4), torch.ones(rows, 2), 2, 1.0)

    with pytest.raises(AdapterError, match="both have an update"):
        fuse(Adapter({"x.q_proj": layer(4), "x.qkv_proj": layer(12)}))
