"""LoRA layers for PyTorch that cost next to nothing over the frozen model.

>>> import torch, lora
>>> model = torch.nn.Sequential(lora.Linear(64, 64, r=8), torch.nn.Linear(64, 2))
>>> lora.mark_only_lora_as_trainable(model)
>>> model(torch.randn(4, 64)).sum().backward()
>>> sorted(lora.lora_state_dict(model))
['0.lora_A', '0.lora_B']
"""

# ruff: noqa: E402
from ._distribution import refuse_other_distribution

refuse_other_distribution()

from ._base import LoRALayer
from ._version import __version__
from .adapter import AdapterError, load_adapter, save_adapter
from .conv import Conv1d, Conv2d, Conv3d
from .embedding import Embedding
from .linear import Linear
from .merged_linear import MergedLinear
from .modes import disabled, merged
from .optim import parameter_groups
from .patch import patch
from .phi3 import patch_phi3
from .pretrained import load_pretrained
from .quantized import LinearNF4
from .state import lora_state_dict, mark_only_lora_as_trainable, merged_state_dict
from .summary import Summary, summary
from .switch import adapter_names, delete_adapter, set_adapter
from .unpatch import unpatch

__all__ = [
    "AdapterError",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LinearNF4",
    "LoRALayer",
    "MergedLinear",
    "Summary",
    "__version__",
    "adapter_names",
    "delete_adapter",
    "disabled",
    "load_adapter",
    "load_pretrained",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merged",
    "merged_state_dict",
    "parameter_groups",
    "patch",
    "patch_phi3",
    "save_adapter",
    "set_adapter",
    "summary",
    "unpatch",
]
