"""LoRA on a model of your own, in five steps: build, mark, train, save, load."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import lora


class Model(nn.Module):
    """A small classifier; with r=0, what one would have pretrained without LoRA."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self.image = lora.Conv2d(1, 4, kernel_size=3, r=r, padding=1)
        self.word = lora.Embedding(50, 32, r=r)
        parts = [True, False, True]  # adapt q and v, leave k
        self.qkv = lora.MergedLinear(32, 3 * 32, r=r // 2, enable_lora=parts)
        self.out = lora.Linear(32, 10, r=r)

    def forward(self, image: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        x = self.word(words) + self.image(image).mean((1, 2, 3))[:, None, None]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).mean(1))


torch.manual_seed(0)
image, words = torch.randn(64, 1, 8, 8), torch.randint(50, (64, 12))
labels = torch.randint(10, (64,))

with tempfile.TemporaryDirectory() as folder:
    pretrained, adapter = Path(folder, "pretrained.pt"), Path(folder, "lora.pt")
    torch.save(Model(r=0).state_dict(), pretrained)  # stands for a checkpoint that you have

    model = Model(r=16)
    model.load_state_dict(torch.load(pretrained), strict=False)
    lora.mark_only_lora_as_trainable(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.02)
    for step in range(41):
        loss = nn.functional.cross_entropy(model(image, words), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    torch.save(lora.lora_state_dict(model), adapter)

    fresh = Model(r=16)
    fresh.load_state_dict(torch.load(pretrained), strict=False)
    fresh.load_state_dict(torch.load(adapter), strict=False)

with torch.no_grad():
    expected = model(image, words)
    assert torch.equal(fresh(image, words), expected)
    assert torch.allclose(fresh.eval()(image, words), expected, atol=1e-4)  # eval merges
print("the reloaded model gives the same outputs")
