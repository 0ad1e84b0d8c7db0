"""What the tests of adapters share: models, files that are changed, and how outputs are compared."""

import contextlib
import copy
import json

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import lora

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.

FOUR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QKV_A, QKV_B = "0.self_attn.qkv_proj.lora_A", "0.self_attn.qkv_proj.lora_B"
IDS = torch.arange(18).reshape(2, 9) * 5 % 96
EXACT, CLOSE = 1e-13, 1e-5  # in float64, in float32; of the largest value


def logits(model, ids=IDS):
    with torch.no_grad():
        y = model(ids)
    return y if torch.is_tensor(y) else y.logits


def assert_near(got, wanted, tolerance):
    atol = tolerance * wanted.abs().max().item()
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def assert_same_logits(ours, theirs):
    """In float64 the same; in the model's own dtype an error at most twice PEFT's."""
    got, wanted = (logits(copy.deepcopy(model).double()) for model in (ours, theirs))
    assert_near(got, wanted, EXACT)
    error, their_error = ((logits(m).double() - wanted).abs().max() for m in (ours, theirs))
    assert error <= max(2 * their_error, CLOSE * wanted.abs().max())


def assert_same_model(ours, theirs):
    """The same logits, and the same merged weights by the names of the plain model."""
    assert_same_logits(ours, theirs)
    got, wanted = (copy.deepcopy(model).double() for model in (ours, theirs))
    got, wanted = merged_state(got), merged_state(wanted)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert_near(got[name], wanted[name], EXACT)
    rounded, theirs_rounded = merged_state(copy.deepcopy(ours)), merged_state(copy.deepcopy(theirs))
    for name, exact in wanted.items():
        error = (rounded[name].double() - exact).abs().max()
        their_error = (theirs_rounded[name].double() - exact).abs().max()
        # We round to the weight's dtype once; an fp32 update has roundings of its own.
        assert error <= max(1.01 * their_error, 2**-23 * exact.abs().max())


def merged_state(model):
    if isinstance(model, peft.PeftModel):
        return model.merge_and_unload().state_dict()
    return lora.unpatch(model, merge=True).state_dict()


def lora_layers(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, lora.LoRALayer)]


def in_peft(model, fill_factors=None, **options):
    """A PEFT model, its LoRA weights filled."""
    wrapped = get_peft_model(model, LoraConfig(**options)).eval()
    return fill_factors(wrapped) if fill_factors else wrapped


def plain_file(model, folder, fill_factors, **options):
    options = {"target_modules": FOUR, "r": 4, "lora_alpha": 8, **options}
    in_peft(model, fill_factors, **options).save_pretrained(folder)


def of_file(folder):
    return load_file(folder / TENSORS)


def edit(folder, config=None, tensors=None):
    """Change the two files of an adapter by functions of their contents."""
    if config is not None:
        fields = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config(fields)))
    if tensors is not None:
        save_file(tensors(of_file(folder)), folder / TENSORS, {"format": "pt"})


def changed(part, change):
    """Change the one tensor whose key has `part`."""

    def of(tensors):
        (key,) = [key for key in tensors if part in key]
        return {**tensors, key: change(tensors[key].clone())}

    return of


def set_first(value):
    def of(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return of


def move(parameters):
    """Other values for every Parameter."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def refused(model, path, match, **options):
    with unchanged(model), pytest.raises(lora.AdapterError, match=match):
        lora.load_adapter(model, path, **options)


@contextlib.contextmanager
def unchanged(model):
    """Every module is the same object, every tensor the same to the bit, and the same ones train."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trains = {name: p.requires_grad for name, p in parameters.items()}
    yield
    assert dict(model.named_modules()) == modules
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in parameters.items()
    }
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())


class Biased(nn.Module):
    """Layers with biases, some adapted, one not, and a norm."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.outer = nn.Linear(12, 5)

    def forward(self, ids):
        x = torch.sin(ids.unsqueeze(-1) * torch.arange(1.0, 9.0)).to(self.norm.weight.dtype)
        return self.outer(self.norm(torch.tanh(self.inner(x))))


def make_biased():
    torch.manual_seed(0)
    return Biased().eval()


def train(model, optimizer, steps=10):
    """The loss of every step, and the gradients of the first by shape-independent order."""
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    losses, first = [], {}
    model.train()
    for step in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        if step == 0:
            first = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]  # it does train
    return losses, {plain_key(name): grad for name, grad in first.items()}


def plain_key(name):
    name = name.removeprefix("base_model.model.")
    return name.removesuffix(".default.weight")
