"""Which code a call takes, and what it says about it."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from lora.kernels import dispatch, explain, lora_linear


@pytest.fixture
def tensors():
    """x, weight, bias, A, B."""
    return [torch.randn(s) for s in ((5, 8), (6, 8), (6,), (2, 8), (6, 2))]


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that nothing stands in the way of the fused kernels but the arguments."""
    monkeypatch.setattr(dispatch, "_find_obstacle", lambda device, explicit: "")


def test_auto_falls_back_and_says_why(tensors):
    assert explain(*tensors) == (
        "torch: the tensors are on 'cpu', the fused kernels need a CUDA or ROCm GPU"
    )
    torch.testing.assert_close(
        lora_linear(*tensors, 1.0), lora_linear(*tensors, 1.0, impl="torch"), rtol=0, atol=0
    )


def test_an_explicit_choice_that_cannot_run_raises_with_the_reason(tensors, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._find_obstacle.cache_clear()
    with pytest.raises(RuntimeError, match="on 'cpu', the fused kernels need a CUDA or ROCm GPU"):
        lora_linear(*tensors, 1.0, impl="triton")
    monkeypatch.setenv("LORA_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="LORA_KERNELS=triton"):
        lora.Linear(8, 6, 2)(tensors[0])
    assert lora_linear(*tensors, 1.0, impl="auto").shape == (5, 6)
    assert explain(*tensors).startswith("torch: ")


def test_unknown_choices_are_named(tensors, monkeypatch):
    with pytest.raises(ValueError, match=r"impl='cuda': expected one of \('auto', 'torch', 'tri"):
        lora_linear(*tensors, 1.0, impl="cuda")
    monkeypatch.setenv("LORA_KERNELS", "fast")
    for call in (lora_linear, explain):
        with pytest.raises(ValueError, match="LORA_KERNELS='fast'"):
            call(*tensors, 1.0)


@pytest.mark.usefixtures("gpu")
class TestReasons:
    def test_fused(self, tensors):
        assert explain(*tensors) == "triton: torch.float32 on cpu runs the fused kernels"

    def test_asked_for(self, tensors, monkeypatch):
        assert "was asked for" in explain(*tensors, impl="torch")
        monkeypatch.setenv("LORA_KERNELS", "torch")
        assert explain(*tensors).startswith("torch: ")

    def test_float64(self, tensors):
        assert "no fused kernels for torch.float64" in explain(*(t.double() for t in tensors))

    def test_rank(self, tensors):
        x, weight, bias, *_ = tensors
        assert "r = 257 is above 256" in explain(
            x, weight, bias, torch.zeros(257, 8), torch.zeros(6, 257)
        )
        assert "of rank 0" in explain(x, weight, bias, torch.zeros(0, 8), torch.zeros(6, 0))

    def test_transforms(self, tensors):
        said = []

        def f(x):
            said.append(explain(x, *tensors[1:]))
            return lora_linear(x, *tensors[1:], 1.0)

        torch.func.grad(lambda x: f(x).sum())(tensors[0])
        assert "torch.func" in said.pop()
        with forward_ad.dual_level():
            assert "forward-mode" in explain(*tensors)

    def test_wrapper_tensors(self, tensors):
        from torch.testing._internal.two_tensor import TwoTensor

        x, weight, *rest = tensors
        assert "TwoTensor is not a plain tensor" in explain(x, TwoTensor(weight, weight), *rest)


def test_old_gpus_are_named(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    find = dispatch._find_obstacle.__wrapped__
    assert find(torch.device("cuda", 0), False) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (13, 7))
    assert find(torch.device("cuda", 0), False) == ""
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert find(torch.device("cuda", 0), True) == "the package triton is not installed"


def test_a_gpu_that_is_not_there_is_no_reason_to_fail():
    """Fake tensors may say "cuda" anywhere."""
    dispatch._find_obstacle.cache_clear()
    with FakeTensorMode():
        tensors = [torch.empty(s, device="cuda") for s in ((5, 8), (6, 8), (6,), (2, 8), (6, 2))]
        assert lora_linear(*tensors, 1.0, dropout_p=0.1).shape == (5, 6)
    dispatch._find_obstacle.cache_clear()


def test_explain_computes_nothing_and_names_what_does_not_fit(tensors):
    x, weight, *rest = tensors
    with pytest.raises(TypeError, match=r"x is torch.float64 and weight is torch.float32"):
        explain(x.double(), weight, *rest)
    with pytest.raises(TypeError, match="imp"):
        explain(*tensors, imp="triton")
    with torch.autocast("cpu"), CountOperations() as counted:
        explain(*tensors)
    assert counted.number == 0


class CountOperations(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.number += 1
        return operation(*args, **kwargs or {})


def test_summary_says_the_path_of_every_layer(capsys):
    model = nn.Sequential(lora.Linear(8, 6, 2), lora.Embedding(5, 4, 2))
    rows = lora.summary(model).rows
    assert rows[0].path.startswith("torch: the tensors are on 'cpu'")
    assert rows[1].path == "torch: there are no fused kernels for Embedding"
    assert "Linear: torch: the tensors are on 'cpu'" in capsys.readouterr().out


def test_an_unknown_gpu_takes_the_default_config():
    pytest.importorskip("triton")
    from lora.kernels import tiling, triton_shrink

    x = torch.empty(1, dtype=torch.bfloat16)
    for arch in ("sm_75", "sm_999", "gfx1201", "pvc"):
        block, config = tiling.choose(triton_shrink.CONFIGS, arch, 40, x, 64)
        assert (block, config) == (64, triton_shrink.CONFIGS["default"][64])
    block, config = tiling.choose(triton_shrink.CONFIGS, "sm_90", 40, x, 63)
    assert config == triton_shrink.CONFIGS["default"][64]  # no wide loads
    block, config = tiling.choose(triton_shrink.CONFIGS, "sm_90", 300, x.float(), 64)
    assert (block, config) == (32, triton_shrink.CONFIGS["fp32"][32])
