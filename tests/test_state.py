"""What trains is what is saved; merged_state_dict; the two context managers; the summary."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lora


def small_model():
    model = nn.Sequential(
        lora.Linear(6, 8, 2, 4), nn.ReLU(), lora.MergedLinear(8, 6, 2, enable_lora=[True, False])
    )
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    return model


@pytest.mark.parametrize("function", [lora.mark_only_lora_as_trainable, lora.lora_state_dict])
def test_wrong_bias_is_refused_and_changes_nothing(function):
    model = small_model()
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"bias='lora': expected one of \('none', "):
        function(model, bias="lora")
    assert [p.requires_grad for p in model.parameters()] == before


def test_bias_all_takes_every_kind_of_bias():
    model = nn.ModuleDict(
        {"a": nn.MultiheadAttention(4, 2), "b": nn.LSTM(4, 4), "c": lora.Linear(4, 4, 2)}
    )
    lora.mark_only_lora_as_trainable(model, "all")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"a.in_proj_bias", "a.out_proj.bias", "b.bias_ih_l0", "b.bias_hh_l0"} < trained
    assert "a.in_proj_weight" not in trained
    assert set(lora.lora_state_dict(model, "all")) == trained


def test_a_model_without_lora_layers_is_warned_about():
    with pytest.warns(UserWarning, match="Linear has no LoRA layer"):
        lora.mark_only_lora_as_trainable(nn.Linear(3, 3))


def test_a_layer_of_the_users_own_on_the_mixin():
    """As loralib's users write them: the mixin last, its __init__ called by name."""

    class Scaled(nn.Linear, lora.LoRALayer):
        def __init__(self, size, r):
            nn.Linear.__init__(self, size, size)
            lora.LoRALayer.__init__(self, r, lora_alpha=2, lora_dropout=0.1, merge_weights=False)
            self.lora_scale = nn.Parameter(torch.ones(size))
            self.merged = False

        def forward(self, x):
            return nn.functional.linear(self.lora_dropout(x), self.weight) * self.lora_scale

    model = nn.Sequential(Scaled(4, 2))
    lora.mark_only_lora_as_trainable(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.lora_scale"]
    assert list(lora.lora_state_dict(model)) == ["0.lora_scale"]
    assert model.eval()(torch.zeros(1, 4)).shape == (1, 4)


def test_a_shared_layer_is_saved_under_both_names():
    layer = lora.Linear(4, 4, 2)
    model = nn.ModuleDict({"a": layer, "b": layer})
    lora.mark_only_lora_as_trainable(model)
    assert layer.lora_A.requires_grad
    assert len(lora.lora_state_dict(model)) == 4


def test_guide_saving_and_loading(tmp_path):
    model, x = small_model(), torch.randn(3, 6)
    torch.save(model.state_dict(), tmp_path / "pretrained.pt")
    for p in lora.lora_state_dict(model).values():
        p.normal_()
    torch.save(lora.lora_state_dict(model), tmp_path / "lora.pt")
    fresh = small_model()
    fresh.load_state_dict(torch.load(tmp_path / "pretrained.pt"), strict=False)
    fresh.load_state_dict(torch.load(tmp_path / "lora.pt"), strict=False)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("mode", [True, False])
def test_merged_state_dict_is_the_plain_models(mode):
    model, x = small_model().train(mode), torch.randn(3, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    plain.load_state_dict(lora.merged_state_dict(model))
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert set(lora.merged_state_dict(model[0])) == {"weight", "bias"}


def test_merged_state_dict_warns_about_tied_weights():
    model = nn.ModuleDict({"embed": lora.Embedding(5, 4, 2), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    nn.init.normal_(model["embed"].lora_A)
    with pytest.warns(
        UserWarning, match=r"embed\.weight has an update and is tied to head\.weight"
    ):
        state = lora.merged_state_dict(model)
    assert torch.equal(state["head.weight"], model["head"].weight)
    assert not torch.equal(state["embed.weight"], model["embed"].weight)
    with pytest.raises(ValueError, match=r"embed\.weight is tied to head\.weight"):
        lora.unpatch(model, merge=True)


def test_disabled_gives_the_base_output_to_the_bit():
    model, x = small_model(), torch.randn(3, 6)
    base = nn.functional.linear(x, model[0].weight, model[0].bias).relu()
    base = nn.functional.linear(base, model[2].weight, model[2].bias)
    for mode in (True, False):
        model.train(mode)
        expected = model(x)
        with lora.disabled(model) as same:
            assert same is model
            assert torch.equal(model(x), base)
            with lora.disabled(model[0]):
                pass
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), expected)
    with pytest.raises(KeyError), lora.disabled(model):
        raise KeyError
    assert not model[0].disabled


def test_merged_context_restores_everything():
    model, x = small_model(), torch.randn(3, 6)
    model[0].merge_weights = False
    model[0].lora_dropout.p = 0.5
    model.train()
    model[2].eval()
    before = [(m.training, m.merged, m.merge_weights) for m in (model[0], model[2])]
    with torch.no_grad(), lora.merged(model):
        assert model[0].merged
        assert model[2].merged
        y = model(x)
        assert torch.equal(model(x), y)
    assert [(m.training, m.merged, m.merge_weights) for m in (model[0], model[2])] == before
    assert model[0].lora_dropout.training
    model[0].lora_dropout.eval()  # a mode of its own, which is restored too
    with lora.merged(model):
        pass
    assert not model[0].lora_dropout.training
    torch.testing.assert_close(y, model.eval()(x), rtol=1e-4, atol=1e-5)


def test_summary_prints_and_returns_the_table(capsys):
    model = nn.Sequential(small_model(), nn.Linear(6, 6))
    lora.mark_only_lora_as_trainable(model)
    table = lora.summary(model)
    printed = capsys.readouterr().out
    assert printed == f"{table}\n"
    assert table.trainable_parameters == 2 * 6 + 8 * 2 + 2 * 8 + 3 * 2
    assert table.total_parameters == sum(p.numel() for p in model.parameters())
    assert table.adapter_bytes == 4 * table.trainable_parameters
    assert table.optimizer_bytes == 8 * table.trainable_parameters
    assert [(r.type, r.count, r.shape, r.parts, r.r, r.scaling) for r in table.rows] == [
        ("Linear", 1, (8, 6), "1", 2, 2.0),
        ("MergedLinear", 1, (6, 8), "3 (3)", 2, 0.5),
    ]
    assert sum(r.parameters for r in table.rows) == table.trainable_parameters
    # Two a weight forward and for the gradient of the input, and two for its own gradient if it trains.
    assert table.flops_per_token == 4 * (8 * 6 + 6 * 8 + 6 * 6) + 6 * table.trainable_parameters
    assert "merged: 0 of 2 layers" in printed
    assert f"({100 * 50 / table.total_parameters:.4f} %)" in printed
    model.eval()
    assert lora.summary(model).merged_layers == 2
    assert lora.summary(nn.Linear(2, 2)).rows == ()


def test_wrappers_do_not_hide_what_trains():
    inner = nn.Sequential(checkpoint_wrapper(lora.Linear(4, 4, 2)), nn.Linear(4, 2))
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    lora.mark_only_lora_as_trainable(inner)
    for model in (inner, torch.compile(inner, backend="eager")):
        assert list(lora.lora_state_dict(model)) == ["0.lora_A", "0.lora_B"]
        assert list(lora.merged_state_dict(model)) == list(plain.state_dict())


def test_adapter_bytes_count_trained_biases(capsys):
    model = nn.Sequential(lora.Linear(4, 4, 2))
    lora.mark_only_lora_as_trainable(model)
    assert lora.summary(model).adapter_bytes == 4 * 16
    lora.mark_only_lora_as_trainable(model, "lora_only")
    assert lora.summary(model).adapter_bytes == 4 * 20
