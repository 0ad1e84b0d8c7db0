"""Chat conversations: read, check, turn into tokens with a mask, and batch.

A conversation is `{"messages": [{"role": "user", "content": "..."}, ...]}`. The loss is taken on
what the assistant says and on the token that ends its turn, so each token carries a label: its own
id there, -100 (which PyTorch's cross entropy ignores) everywhere else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

log = logging.getLogger("data")

ROLES = ("system", "user", "assistant")
IGNORED = -100
# Of several processes the first alone shows its progress.
QUIET = os.environ.get("RANK", "0") != "0"

_T = TypeVar("_T")


class InputError(ValueError):
    """What the user gave cannot be used; the message says what, where and what to do."""


@dataclass(frozen=True)
class Example:
    """One conversation, ready for the model: ids and labels are int32, to be light in thousands."""

    messages: tuple[dict[str, str], ...]
    ids: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        """The messages before the assistant's last."""
        return self.messages[: self._last_reply]

    @property
    def reply(self) -> str:
        """The assistant's last message."""
        return self.messages[self._last_reply]["content"]

    @property
    def _last_reply(self) -> int:
        roles = [message["role"] for message in self.messages]
        return len(roles) - 1 - roles[::-1].index("assistant")


@dataclass(frozen=True)
class Data:
    """Examples to train on and to evaluate with, the token that fills a batch, and what was lost.

    `truncated` conversations were too long; `left_out` kept no token of the assistant.
    """

    train: list[Example]
    held_out: list[Example]
    pad_id: int
    truncated: int
    left_out: int

    def counts(self) -> dict[str, int]:
        """What a log has to tell of the data."""
        return {
            "train": len(self.train),
            "held_out": len(self.held_out),
            "truncated": self.truncated,
            "left_out": self.left_out,
        }


def read_conversations(path: Path) -> list[dict[str, Any]]:
    """The conversations of a JSONL file, one on each line; the first bad line is an InputError."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip().splitlines()
    except OSError as error:
        raise InputError(f"cannot read the data file {path}: {error.strerror}") from error
    if not lines:
        raise InputError(f"{path} is empty: expected one conversation in JSON on each line")
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{where}: not JSON ({getattr(error, 'msg', error)})") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list):
        raise InputError(f'{where}: expected {{"messages": [...]}}, got {line[:60]!r}')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise InputError(f'{where}: a message needs a "role" and a text "content": {message!r}')
        if message.get("role") not in ROLES:
            raise InputError(
                f"{where}: unknown role {message.get('role')!r}, expected one of {ROLES}"
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{where}: no assistant turn, so nothing to learn from")
    return row


def split(items: Sequence[_T], share: float = 0.05) -> tuple[list[_T], list[_T]]:
    """(training, held out): `share` of the items, at least one, chosen by a digest of each.

    The choice looks at content alone, not at a seed or at the order, so every run of every user
    holds out the same items.
    """
    if len(items) < 2:
        raise InputError(f"{len(items)} usable chats: two are needed, one of them to hold out")
    digests = [hashlib.sha256(repr(item).encode("utf-8", "replace")).digest() for item in items]
    ranked = sorted(range(len(items)), key=lambda index: digests[index])
    held_out = set(ranked[: max(1, round(share * len(items)))])
    return (
        [item for index, item in enumerate(items) if index not in held_out],
        [item for index, item in enumerate(items) if index in held_out],
    )


def encode_data(
    conversations: Sequence[dict[str, Any]],
    held_out: Sequence[dict[str, Any]] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_held_out: int,
) -> Data:
    """Tokens and labels of the conversations and those held out (None: 5 % of the conversations).

    Conversations of more than `max_length` tokens are cut there; those left without an assistant's
    token are left out. Both are counted.
    """
    train, truncated, left_out = _encode_all(conversations, tokenizer, max_length)
    if held_out is None:
        train, evaluation = split(train)
    else:
        evaluation, more_truncated, more_left_out = _encode_all(held_out, tokenizer, max_length)
        truncated, left_out = truncated + more_truncated, left_out + more_left_out
    if truncated or left_out:
        log.warning(
            "%d chats have more than %d tokens and were truncated; %d chats have none of the "
            "assistant's words in these and were left out",
            truncated,
            max_length,
            left_out,
        )
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    data = Data(train, evaluation[:max_held_out], pad_id, truncated, left_out)
    log.info("%d chats to train on, %d to evaluate with", len(data.train), len(data.held_out))
    return data


def _encode_all(
    conversations: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Example], int, int]:
    """(examples, how many conversations were truncated, how many of these were left out)."""
    examples: list[Example] = []
    truncated = 0
    bar = tqdm(conversations, desc="tokenizing", unit="chat", leave=False, disable=QUIET)
    for number, conversation in enumerate(bar, start=1):
        try:
            ids, labels = encode(conversation["messages"], tokenizer)
        except (ValueError, TypeError, TemplateError) as error:
            raise InputError(f"conversation {number}: {error}") from error
        truncated += len(ids) > max_length
        ids, labels = (
            torch.tensor(tokens[:max_length], dtype=torch.int32) for tokens in (ids, labels)
        )
        if (labels[1:] != IGNORED).any():  # the first token is never predicted
            examples.append(Example(tuple(conversation["messages"]), ids, labels))
    if not examples:
        raise InputError(f"no chat has an assistant's word in its first {max_length} tokens")
    return examples, truncated, len(conversations) - len(examples)


def render(
    messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, reply: bool
) -> str:
    """The conversation as the text that the model sees; reply=True adds the opening of a reply."""
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=reply
    )
    assert isinstance(text, str)  # one conversation gives one text
    return text


def encode(
    messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokens of the whole conversation, and the same with all but the assistant's masked."""
    if not tokenizer.is_fast:
        raise ValueError("this needs a fast tokenizer: a slow one cannot tell where a token stands")
    text = render(messages, tokenizer, reply=False)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = tokens["input_ids"]
    offsets: list[tuple[int, int]] = tokens["offset_mapping"]
    labels = [IGNORED] * len(ids)
    special = set(tokenizer.all_special_ids)
    special.update(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    for start, stop in _assistant_spans(messages, text, tokenizer):
        for position, (first, last) in enumerate(offsets):
            if first >= start and last <= stop:
                labels[position] = ids[position]
                if ids[position] in special:  # it closes the turn; a newline after it is not said
                    break
    return ids, labels


def _assistant_spans(
    messages: Sequence[dict[str, str]], text: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """Where in `text` the assistant speaks, as (first character, just after the last).

    A turn of the assistant is what the template adds between the prompt that ends in the opening of
    that turn and the conversation up to and including it. Both must open the whole text.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:index], tokenizer, reply=True)
        answered = render(messages[: index + 1], tokenizer, reply=False)
        if not text.startswith(answered):  # Phi-3 ends a text, but not a turn, with the end of text
            answered = answered.removesuffix(tokenizer.eos_token or "")
        if not (text.startswith(answered) and answered.startswith(prompt)):
            raise ValueError(
                "the tokenizer's chat template rewrites earlier turns, so the assistant's tokens "
                f"cannot be found: {prompt[-40:]!r} does not come before the reply in {text[:200]!r}"
            )
        spans.append((len(prompt), len(answered)))
    return spans


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Pad to the longest on the right; padding is neither attended to nor learned."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), IGNORED)
    attention = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = example.ids
        labels[row, :length] = example.labels
        attention[row, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": attention}


def fingerprint(examples: Sequence[Example]) -> str:
    """A digest of all tokens and labels: equal only for the same data, tokenizer and lengths."""
    digest = hashlib.sha256()
    for example in examples:
        for tokens in (example.ids, example.labels):
            digest.update(len(tokens).to_bytes(8, "little") + tokens.numpy().tobytes())
    return digest.hexdigest()[:16]
