"""4-bit models: patching, training, state dicts, unpatching, LoftQ; and what is refused."""

import copy
import json
import warnings

import nf4_oracle
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

import lora
from lora.kernels.nf4_tensor import NF4Tensor

STATE = "weight.quant_state.bitsandbytes__nf4"


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def held(weight):
    return sum(part.nbytes for part in weight.parts if part is not None)


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


@pytest.fixture
def make(make_phi3):
    """(patched model on 4 bits, the model before it)."""

    def made(dtype=torch.float32, r=4, alpha=8, p=0.0, targets="all-linear", **options):
        base = make_phi3(intermediate_size=128).to(dtype)
        model = lora.patch_phi3(
            copy.deepcopy(base), r, alpha, p, targets, quantize="nf4", **options
        )
        return model, base

    return made


@pytest.fixture
def ids():
    return torch.randint(3, 96, (2, 12))


class TestPatch:
    @pytest.mark.parametrize("targets", ["all-linear", ["qkv_proj"]])
    def test_every_projection_is_quantised_adapted_or_not(self, targets, make):
        model, base = make(torch.bfloat16, targets=targets)
        for name, layer in linears(model).items():
            original = base.get_submodule(name).weight
            if name == "lm_head":
                assert torch.equal(layer.weight, original)
                continue
            assert type(layer.weight) is NF4Tensor
            assert (layer.weight.dtype, layer.weight.shape) == (torch.bfloat16, original.shape)
            assert isinstance(layer, lora.LoRALayer if "qkv" in name else nn.Linear)
            want = NF4Tensor.quantize(original).dequantize()
            assert torch.equal(layer.weight.dequantize(), want)
            assert held(layer.weight) <= 0.53 * original.numel()
            assert "weight=nf4 of " in repr(layer)
        kinds = {type(p) for n, p in model.named_parameters() if "norm" in n or "embed" in n}
        assert kinds == {nn.Parameter}
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}

    def test_the_output_is_that_of_the_dequantised_model_to_the_bit(self, make, ids):
        model, base = make()
        for name, layer in linears(base).items():
            if name != "lm_head":
                layer.weight = nn.Parameter(NF4Tensor.quantize(layer.weight.detach()).dequantize())
        assert torch.equal(model(ids).logits, base(ids).logits)

    def test_gradients_are_those_of_float64_on_the_dequantised_weights(
        self, make, fill_factors, ids
    ):
        model, _ = make(lora_bias=True)
        fill_factors(model, 0.05)
        exact = copy.deepcopy(model)
        for layer in linears(exact).values():
            if isinstance(layer.weight, NF4Tensor):
                layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
        exact.double()
        for m in (model, exact):
            m(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                want = exact.get_parameter(name).grad
                assert (parameter.grad - want).norm() < 1e-5 * want.norm(), name

    @pytest.mark.parametrize("variant", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
    def test_variants_begin_as_the_quantised_model(self, variant, make, ids):
        model, _ = make(**variant)
        with torch.no_grad(), lora.disabled(model):
            want = model(ids).logits
        assert (model(ids).logits - want).abs().max() < 1e-5

    def test_any_model_and_its_biases(self):
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8))
        dense = copy.deepcopy(model)
        lora.patch(model, ["0"], r=2, lora_alpha=4, quantize="nf4")
        assert (type(model[0]), type(model[2])) == (lora.Linear, lora.LinearNF4)
        assert torch.equal(model[2].bias, dense[2].bias)
        x = torch.randn(5, 64)
        want = F.linear(x, model[0].weight.dequantize(), dense[0].bias).tanh()
        want = F.linear(want, model[2].weight.dequantize(), dense[2].bias)
        assert torch.equal(model(x), want)

    def test_modules_to_save_stay_dense_and_train(self, make_phi3):
        model = lora.patch_phi3(
            make_phi3(),
            2,
            4,
            0.0,
            ["qkv_proj"],
            modules_to_save=["lm_head", "o_proj"],
            quantize="nf4",
        )
        assert type(model.model.layers[0].self_attn.o_proj.weight) is nn.Parameter
        assert model.model.layers[0].self_attn.o_proj.weight.requires_grad
        assert type(model.model.layers[0].mlp.down_proj) is lora.LinearNF4

    def test_on_the_meta_device_nothing_is_computed(self, make_phi3):
        with torch.device("meta"):
            model = make_phi3()
        lora.patch_phi3(model, 2, 4, 0.0, quantize="nf4")
        weight = model.model.layers[0].mlp.gate_up_proj.weight
        assert isinstance(weight, NF4Tensor)
        assert weight.is_meta

    def test_the_peak_is_the_model_and_one_layer(self, in_a_new_process):
        """In a fresh process, whose memory is of 24 layers and of what quantising one takes."""
        code = """
import torch, lora
from little_memory import at_most, held
from torch import nn

model = nn.Sequential(*(nn.Linear(1024, 2048, bias=False) for _ in range(24)))
lora.patch(nn.Sequential(nn.Linear(64, 64)), ["0"], r=2, lora_alpha=4, quantize="nf4")
with at_most(4 * 1024 * 2048) as before:
    lora.patch(model, ["0"], r=2, lora_alpha=4, quantize="nf4")
print(before - held())
"""
        (freed,) = in_a_new_process(code)
        assert freed > 0.7 * 24 * 4 * 1024 * 2048

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_a_weight_that_is_not_finite_is_refused_by_name_and_nothing_changes(self, value):
        model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
        with torch.no_grad():
            model[1].weight[3, 3] = value
        before = dict(model.named_modules())
        with pytest.raises(ValueError, match=r"^1\.weight has a NaN or infinite value"):
            lora.patch(model, ["0"], r=2, lora_alpha=4, quantize="nf4")
        assert dict(model.named_modules()) == before
        assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"quantize": "fp4"}, r"quantize='fp4': expected one of \('nf4',\)"),
            ({"merge_weights": True}, r"merge_weights=True with quantize='nf4'"),
            ({"r": -1}, r"r=-1: expected a whole number"),
            ({"target_modules": ["3"]}, r"match no module: '3'"),
            ({"init_lora_weights": "loftq", "r": 40}, r"has no 40 singular values"),
            ({"init_lora_weights": "loftq", "quantize": None}, r"expected quantize='nf4' with it"),
        ],
    )
    def test_what_does_not_fit_leaves_the_model_as_it_was(self, options, words):
        model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
        before = dict(model.named_modules())
        keywords = {"target_modules": ["0"], "r": 2, "lora_alpha": 4, "quantize": "nf4", **options}
        with pytest.raises(ValueError, match=words):
            lora.patch(model, **keywords)
        assert dict(model.named_modules()) == before
        assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())

    def test_a_shared_weight_and_a_model_without_linear_layers_are_refused(self):
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        model["b"].weight = model["a"].weight
        with pytest.raises(ValueError, match=r"a\.weight is shared with another module"):
            lora.patch(model, ["a"], r=2, lora_alpha=4, quantize="nf4")
        model = nn.ModuleDict({"e": nn.Embedding(8, 8)})
        with pytest.raises(ValueError, match=r"has no torch\.nn\.Linear beside its output head"):
            lora.patch(model, ["e"], r=2, lora_alpha=4, quantize="nf4")

    def test_the_summary_counts_the_bytes_that_are_held(self, make, capsys):
        model, _ = make(torch.bfloat16)
        said = lora.summary(model)
        want = sum(held(p) if isinstance(p, NF4Tensor) else p.nbytes for p in model.parameters())
        assert said.weight_bytes == want
        assert all("NF4" in row.path for row in said.rows)


class TestTraining:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointed_steps_learn(self, use_reentrant, make, ids):
        model, _ = make(torch.bfloat16, p=0.05)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        optimizer = torch.optim.AdamW(lora.parameter_groups(model, 1e-2))
        losses = []
        for _ in range(6):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.1

    def test_transformers_trainer_takes_it(self, make, tmp_path, ids):
        from datasets import Dataset
        from transformers import Trainer, TrainingArguments

        from lora.hf import AdapterCallback

        model, _ = make()
        data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, report_to=[], use_cpu=True, save_steps=3, logging_steps=1
        )
        callbacks = [AdapterCallback()]
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's and the Trainer's own
            trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        assert losses[-1] < losses[0]
        again, _ = make()
        assert lora.load_adapter(again, tmp_path / "checkpoint-3").problems == ()
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)

    def test_it_takes_one_that_transformers_loaded_in_4_bits(
        self, bitsandbytes, make_phi3, tmp_path, ids
    ):
        from datasets import Dataset
        from transformers import (
            AutoModelForCausalLM,
            BitsAndBytesConfig,
            Trainer,
            TrainingArguments,
        )

        # bitsandbytes is right on every CPU only if all columns are multiples of 64.
        make_phi3(intermediate_size=128).bfloat16().save_pretrained(tmp_path / "base")
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, dtype=torch.bfloat16
        )
        want = model.eval()(ids).logits
        lora.patch_phi3(model, 4, 8, 0.0, ["qkv_proj"], quantize="nf4")
        assert torch.equal(model(ids).logits, want)
        data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
        arguments = TrainingArguments(
            str(tmp_path / "out"), max_steps=2, report_to=[], use_cpu=True, logging_steps=1
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(model, arguments, train_dataset=data)
            trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        assert losses[-1] < losses[0]
        assert not hasattr(model.config, "quantization_config")

    def test_adapters_are_ordinary(self, make, make_phi3, fill_factors, ids, tmp_path):
        model, base = make()
        lora.save_adapter(fill_factors(model), tmp_path)
        dense = lora.patch_phi3(base, 4, 8, 0.0, "all-linear")
        lora.load_adapter(dense, tmp_path)
        for name, value in lora.lora_state_dict(model).items():
            assert torch.equal(value, dense.state_dict()[name])

    def test_adapters_are_switched_on_one_4_bit_base(self, make, fill_factors, ids, tmp_path):
        model, _ = make()
        before = model(ids).logits
        lora.save_adapter(fill_factors(make()[0]), tmp_path)
        lora.load_adapter(model, tmp_path, name="other")
        lora.set_adapter(model, "other")
        assert not torch.equal(model(ids).logits, before)
        lora.set_adapter(model, "default")
        assert torch.equal(model(ids).logits, before)
        lora.unpatch(model)
        assert type(model.model.layers[0].mlp.down_proj) is lora.LinearNF4


class TestState:
    def test_it_goes_through_safetensors_and_torch_save(self, make, fill_factors, ids, tmp_path):
        model, _ = make(torch.bfloat16)
        fill_factors(model)
        want = model(ids).logits
        safetensors.torch.save_file(model.state_dict(), tmp_path / "state.safetensors")
        torch.save(model.state_dict(), tmp_path / "state.pt")
        for state in (
            safetensors.torch.load_file(tmp_path / "state.safetensors"),
            torch.load(tmp_path / "state.pt", weights_only=True),
        ):
            for assign in (False, True):
                other, _ = make(torch.bfloat16)
                torch.nn.init.zeros_(other.lm_head.weight)
                other.load_state_dict(copy.deepcopy(state), assign=assign)
                assert torch.equal(other(ids).logits, want)
                assert type(other.model.layers[1].mlp.down_proj.weight) is NF4Tensor

    def test_a_dense_state_is_quantised_as_it_is_loaded(self, make, ids):
        model, base = make()
        other, _ = make()
        for p in other.parameters():
            torch.nn.init.zeros_(p) if type(p) is nn.Parameter else p.copy_(torch.zeros(p.shape))
        missing = other.load_state_dict(base.state_dict(), strict=False).missing_keys
        assert all("lora_" in name for name in missing)
        with lora.disabled(other), lora.disabled(model):
            assert torch.equal(other(ids).logits, model(ids).logits)

    def test_every_entry_is_what_bitsandbytes_writes(self, bitsandbytes):
        linear = nn.Linear(96, 40, dtype=torch.bfloat16)
        theirs = bitsandbytes.nn.Linear4bit(96, 40, quant_type="nf4", compute_dtype=torch.bfloat16)
        theirs.load_state_dict(linear.state_dict())
        weight = linear.weight.detach().clone()
        theirs.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        theirs.to("cpu")
        ours = lora.LinearNF4.from_module(linear).state_dict()
        expected = theirs.state_dict()
        expected["bias"] = linear.bias
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in ours)

    def test_a_saved_4_bit_base_is_read_by_transformers(
        self, bitsandbytes, make_phi3, tmp_path, ids
    ):
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        make_phi3(intermediate_size=128).save_pretrained(tmp_path / "dense")
        dense = {"dtype": torch.bfloat16}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **dense)
        lora.unpatch(lora.patch_phi3(model, 2, 4, 0.0, quantize="nf4"))
        model.config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model.save_pretrained(tmp_path / "nf4")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", **dense)
        assert type(theirs.model.layers[0].mlp.down_proj) is bitsandbytes.nn.Linear4bit
        assert torch.equal(theirs(ids).logits, model(ids).logits)

    def test_of_another_kind_it_is_refused_by_name(self):
        layer = lora.LinearNF4.from_module(nn.Linear(64, 32, bias=False))
        before = layer.weight.dequantize()

        def described(**changes):
            text = json.loads(bytes(layer.state_dict()[STATE].tolist()))
            return torch.tensor(list(json.dumps(text | changes).encode()), dtype=torch.uint8)

        bad = {
            r"blocksize=128: expected 64": {STATE: described(blocksize=128)},
            r"nested_blocksize=128: expected 256": {STATE: described(nested_blocksize=128)},
            r"quant_map is not the one of NF4": {"weight.quant_map": torch.linspace(-1, 1, 16)},
            r"packed has 7 elements: a weight \(32, 64\) has 1024": {
                "weight": torch.zeros(7, 1, dtype=torch.uint8)
            },
        }
        for words, changes in bad.items():
            with pytest.raises(RuntimeError, match=f"weight: {words}"):
                layer.load_state_dict(layer.state_dict() | changes)
        state = layer.state_dict()
        state["weight.quant_state.bitsandbytes__fp4"] = state.pop(STATE)
        with pytest.raises(RuntimeError, match=r"weight: quantised as fp4: expected nf4"):
            layer.load_state_dict(state)
        assert torch.equal(layer.weight.dequantize(), before)


class TestBitsandbytesLayers:
    def make(self, bitsandbytes, quant_type="nf4", nested=True):
        layer = bitsandbytes.nn.Linear4bit(
            96, 64, quant_type=quant_type, compress_statistics=nested, compute_dtype=torch.bfloat16
        )
        return nn.Sequential(layer.to(torch.bfloat16)).to("cpu")

    @pytest.mark.parametrize("nested", [True, False])
    def test_their_codes_are_taken_over(self, nested, bitsandbytes):
        model = self.make(bitsandbytes, nested=nested)
        weight, state = model[0].weight, model[0].weight.quant_state
        want = nf4_oracle.dequantized(weight.data, state)
        lora.patch(model, ["0"], r=2, lora_alpha=4)
        assert type(model[0]) is lora.Linear
        assert model[0].lora_A.dtype == torch.float32
        assert torch.equal(model[0].weight.dequantize(), want)
        assert type(lora.unpatch(model)[0]) is lora.LinearNF4

    def test_quantize_takes_those_over_that_are_not_adapted(self, bitsandbytes):
        model = nn.Sequential(*self.make(bitsandbytes), nn.Linear(64, 8, dtype=torch.bfloat16))
        lora.patch(model, ["1"], r=2, lora_alpha=4, quantize="nf4")
        assert (type(model[0]), type(model[1])) == (lora.LinearNF4, lora.Linear)

    def test_others_are_refused_by_name(self, bitsandbytes):
        with pytest.raises(ValueError, match=r"^0: quantised as fp4: expected nf4"):
            lora.patch(self.make(bitsandbytes, "fp4"), ["0"], r=2, lora_alpha=4)
        model = nn.Sequential(bitsandbytes.nn.Linear8bitLt(8, 8))
        with pytest.raises(TypeError, match=r"Linear8bitLt cannot be adapted"):
            lora.patch(model, ["0"], r=2, lora_alpha=4)


def other_values(base):
    return {name: torch.randn_like(value) for name, value in base.state_dict().items()}


def with_last(what):
    """The original weights, but for one of them."""

    def changed(base):
        state, name = base.state_dict(), "model.layers.1.mlp.down_proj.weight"
        nan = torch.full_like(state[name], torch.nan)
        return {**state, name: nan if what == "nan" else nan.to("meta")}

    return changed


class TestUnpatch:
    def test_without_merging_the_4_bit_base_is_back(self, make, fill_factors, ids):
        model, _ = make()
        with lora.disabled(model):
            want = model(ids).logits
        lora.unpatch(fill_factors(model))
        assert torch.equal(model(ids).logits, want)
        assert {type(m) for n, m in linears(model).items() if n != "lm_head"} == {lora.LinearNF4}

    def test_merging_is_refused_unless_a_dtype_is_named(self, make, fill_factors, ids):
        model, _ = make()
        want = fill_factors(model)(ids).logits
        for run in (
            lambda: lora.unpatch(model, merge=True),
            lambda: lora.merged_state_dict(model),
        ):
            with pytest.raises(ValueError, match=r"4.bit"):
                run()
        assert torch.equal(model(ids).logits, want)

    @pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
    def test_dequantised_and_merged(self, variant, make, fill_factors, ids, capsys):
        model, _ = make(targets=["qkv_proj", "down_proj"], **variant)
        want = fill_factors(model)(ids).logits
        lora.unpatch(model, merge=True, dtype=torch.float32)
        assert {type(m) for m in linears(model).values()} == {nn.Linear}
        assert (model(ids).logits - want).abs().max() < 1e-4
        assert capsys.readouterr().out.startswith("merged 4 updates into dense weights of torch.fl")

    @pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_bias": True}])
    def test_merged_into_the_original_base(self, variant, make, fill_factors, capsys):
        if "lora_bias" in variant:
            layer = nn.Linear(64, 32)
            model = lora.patch(
                nn.Sequential(copy.deepcopy(layer)),
                ["0"],
                r=2,
                lora_alpha=4,
                quantize="nf4",
                **variant,
            )
            fill_factors(model)
            dense = lora.patch(nn.Sequential(layer), ["0"], r=2, lora_alpha=4, **variant)
            base = {"0.weight": layer.weight.detach()}
        else:
            model, original = make(**variant)
            fill_factors(model)
            dense = lora.patch_phi3(copy.deepcopy(original), 4, 8, 0.0, "all-linear", **variant)
            base = original.state_dict()
        dense.load_state_dict(lora.lora_state_dict(model), strict=False)
        lora.unpatch(model, merge=True, dtype=torch.float32, base=base)
        lora.unpatch(dense, merge=True)
        for name, value in dense.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        said = capsys.readouterr().out
        assert "on the base that was given" in said
        assert "the change of base is" in said

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"merge": True, "dtype": torch.int8}, r"dtype=torch.int8"),
            ({"merge": True, "dtype": "bfloat16"}, r"dtype='bfloat16'"),
            ({"merge": True, "dtype": torch.float8_e4m3fn}, r"pass one of .*torch.bfloat16"),
            (
                {"merge": True, "dtype": torch.float32, "base": lambda base: base},
                r"base is a Phi3ForCausalLM: expected original.state_dict\(\)",
            ),
            (
                {"merge": True, "dtype": torch.float32, "base": other_values},
                r"base: another base model: the frozen weights of 8 of 8 layers",
            ),
            (
                {"merge": True, "dtype": torch.float32, "base": with_last("nan")},
                r"base\['model.layers.1.*down_proj.weight'\] has a NaN",
            ),
            (
                {"merge": True, "dtype": torch.float32, "base": with_last("meta")},
                r"base\['model.layers.1.*down_proj.weight'\] is on the meta device",
            ),
            ({"dtype": torch.float32}, r"dtype is for merging into 4-bit weights, and merge is F"),
            (
                {"merge": True, "dtype": torch.float32, "base": {}},
                r"base\['model.*expected \(64, 64\)",
            ),
        ],
    )
    def test_arguments_that_do_not_fit(self, options, words, make):
        model, base = make()
        if callable(options.get("base")):
            options = {**options, "base": options["base"](base)}
        before = dict(model.named_modules())
        with pytest.raises(ValueError, match=words):
            lora.unpatch(model, **options)
        assert dict(model.named_modules()) == before

    @pytest.mark.parametrize("quantize", [None, "nf4"])
    def test_a_weight_beyond_float16_is_refused_first(self, quantize, make_phi3):
        dtype = {} if quantize is None else {"dtype": torch.float16}
        model = make_phi3().to(torch.float16 if quantize is None else torch.bfloat16)
        lora.patch_phi3(model, 4, 8, 0.0, "all-linear", quantize=quantize)
        last = model.model.layers[1].mlp.down_proj
        with torch.no_grad():
            last.lora_A.fill_(300)
            last.lora_B.fill_(300)
        before = dict(model.named_modules())
        with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj: .* beyond torch.float16"):
            lora.unpatch(model, merge=True, **dtype)
        assert dict(model.named_modules()) == before

    def test_a_dtype_for_a_dense_model_is_refused(self, make_phi3):
        model = lora.patch_phi3(make_phi3(), 2, 4, 0.0)
        with pytest.raises(ValueError, match=r"no weight is of 4 bits: leave it out"):
            lora.unpatch(model, merge=True, dtype=torch.float32)

    def test_eval_does_not_merge(self, make, fill_factors, ids):
        layer = lora.LinearNF4.from_module(nn.Linear(64, 32))
        with pytest.raises(ValueError, match=r"merge_weights=True on a 4-bit weight"):
            lora.Linear.from_module(layer, 2, merge_weights=True)
        adapted = fill_factors(lora.Linear.from_module(layer, 2))
        x = torch.randn(3, 64)
        want = adapted(x)
        with torch.no_grad(), lora.merged(adapted):
            assert torch.equal(adapted(x), want)
            assert not adapted.merged


class TestLoftQ:
    @pytest.mark.parametrize("init", ["loftq", "loftq_niter_8"])
    def test_the_factors_are_the_best_of_what_quantising_lost(self, init, make):
        model, base = make(r=8, alpha=16, init_lora_weights=init)
        for name, layer in lora._base.lora_layers(model):
            error = base.get_submodule(name).weight.double() - layer.weight.dequantize().double()
            left = error - layer.delta_weight().double()
            for start, stop in layer.rows:
                values = torch.linalg.svdvals(error[start:stop])
                best = values[8:].square().sum().sqrt()
                slack = 1e-5 if init == "loftq" else 1e-2
                assert left[start:stop].norm() <= best * (1 + slack) + 1e-6

    def test_it_is_nearer_to_the_original_model(self, make, ids):
        logits = [make(r=16, init_lora_weights=init)[0](ids).logits for init in ("loftq", True)]
        want = make()[1](ids).logits
        near, far = ((found - want).norm() for found in logits)
        assert near < 0.8 * far

    def test_it_is_merged_into_the_4_bit_weights_alone(self, make, ids):
        model, base = make(init_lora_weights="loftq")
        want = model(ids).logits
        with pytest.raises(ValueError, match=r"a LoftQ update holds what quantising lost"):
            lora.unpatch(model, merge=True, dtype=torch.float32, base=base.state_dict())
        lora.unpatch(model, merge=True, dtype=torch.float32)
        assert (model(ids).logits - want).abs().max() < 1e-4

    def test_the_original_weight_is_not_written_to(self):
        linear = nn.Linear(64, 32)
        weight, before = linear.weight, linear.weight.detach().clone()
        options = {"quantize": "nf4", "init_lora_weights": "loftq"}
        lora.patch(nn.Sequential(linear), ["0"], r=2, lora_alpha=4, **options)
        assert torch.equal(weight, before)

    def test_a_quantised_base_is_refused(self):
        layer = lora.LinearNF4.from_module(nn.Linear(64, 32))
        with pytest.raises(ValueError, match=r"not known of a weight that is quantised already"):
            lora.Linear.from_module(layer, 2, init_lora_weights="loftq")
