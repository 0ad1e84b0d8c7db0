"""A stand-in for the download: a small Phi-3, trained here in about a minute, kept in the cache.

The published Phi-3 has 3.8 billion parameters and must be fetched. So that the example runs on any
machine, this module trains a model of the same class, with the same chat template, on running text
and saves it as an ordinary Hugging Face checkpoint. It can be loaded like any other one; it has
never seen a chat, as a pretrained model has not.

It knows about nine tenths of a million parameters' worth: plausible words, no facts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import tempfile
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast, get_scheduler

log = logging.getLogger("standin")

STEPS = 600  # of full training; about 65 seconds on two cores
_BATCH, _CONTEXT = 16, 128  # sequences in a step, tokens in a sequence
_LEARNING_RATE = 5e-3

_END_OF_TEXT, _END_OF_TURN = "<|endoftext|>", "<|end|>"
_SPECIAL_TOKENS = [_END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", _END_OF_TURN]
_SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,  # as in Phi-4-mini: half of the parameters would be the vocabulary
}

# Phi-3's format: <|user|>, a newline, the text, <|end|>, a newline, and so on for every turn.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def standin_checkpoint(texts: list[str], cache: Path, steps: int = STEPS) -> Path:
    """The folder of the stand-in for these texts; it is trained first if the cache lacks it.

    The folder's name holds a digest of all that the model is made from, so a change of this file,
    of the texts or of a library leads to a new one. It is built under a temporary name and then
    renamed: an interrupted run leaves nothing that looks finished.
    """
    folder = cache / f"phi3-standin-{_digest(texts, steps)}"
    if folder.is_dir():
        log.info("the stand-in for Phi-3 is in the cache: %s", folder)
        return folder
    log.info("training a stand-in for Phi-3 (first run only) into %s", folder)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as building:
        checkpoint = Path(building, "checkpoint")
        tokenizer = _train_tokenizer(texts)
        model = _train_model(_token_stream(texts, tokenizer), tokenizer, steps)
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        try:
            checkpoint.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process finished the same model first
                raise
    return folder


def _digest(texts: list[str], steps: int) -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    versions = [platform.python_version(), torch.__version__, transformers.__version__]
    digest.update(json.dumps([steps, *versions, tokenizers.__version__, texts]).encode())
    return digest.hexdigest()[:16]


def _train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_SHAPE["vocab_size"],
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=_END_OF_TEXT,
        pad_token=_END_OF_TEXT,
        chat_template=_CHAT_TEMPLATE,
    )


def _token_stream(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All texts as one row of tokens, an end-of-text after each."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([i for ids in encoded for i in [*ids, tokenizer.eos_token_id]])


def _train_model(
    stream: torch.Tensor, tokenizer: PreTrainedTokenizerFast, steps: int
) -> Phi3ForCausalLM:
    """Plain language modelling of the stream: every parameter, random windows, fixed seed."""
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = Phi3Config(**_SHAPE, pad_token_id=end, bos_token_id=end, eos_token_id=end)
    model = Phi3ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=20, num_training_steps=steps)
    window = torch.arange(_CONTEXT + 1)
    for _ in (bar := tqdm(range(steps), desc="stand-in", unit="step")):
        tokens = stream[torch.randint(len(stream) - _CONTEXT, (_BATCH, 1)) + window]
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    # A chat model stops at the end of its turn as well as at the end of the text.
    model.generation_config.eos_token_id = [end, tokenizer.convert_tokens_to_ids(_END_OF_TURN)]
    return model
