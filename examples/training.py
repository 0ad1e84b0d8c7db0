"""The training loop: a plain one, spelled out, that can stop at any moment and go on to the bit.

It needs nothing of LoRA but the two calls that say what is saved. Dropout draws from torch's
generator, the order of the data is a function of seed and epoch, and a checkpoint holds the
generator, so on a CPU with the same number of threads a resumed run ends with the same bits as one
that was never interrupted. In several processes (`processes`) each batch is dealt to all of them, and a
checkpoint is that of one process, for any number to go on from. Not handled: packing, half-precision
loss scaling.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import processes
import torch
import torch.nn.functional as F
from chat_data import IGNORED, QUIET, Data, Example, InputError, collate
from run_folder import RunLog, plot_losses, save_checkpoint
from settings import steps_of
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_scheduler

import lora
import lora.distributed

log = logging.getLogger("training")


def loss_sum(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The cross entropy of every labelled token given those before it, summed."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def count_labels(examples: Sequence[Example]) -> int:
    """How many tokens of the examples `loss_sum` looks at."""
    return sum(int((example.labels[1:] != IGNORED).sum()) for example in examples)


def dealt(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """This process's rows of a batch; if there is none for it, one without labels.

    For every process takes part in every forward and backward.
    """
    own = processes.share(examples)
    if not own:
        blank = torch.full_like(examples[0].labels, IGNORED)
        own = [dataclasses.replace(examples[0], labels=blank)]
    return collate(own, pad_id)


@torch.no_grad()
def evaluate(
    model: nn.Module, examples: Sequence[Example], batch_size: int, pad_id: int
) -> dict[str, float]:
    """Mean loss per assistant's token and its exponential. Draws nothing from any generator."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    by_length = sorted(examples, key=lambda example: len(example.ids))  # less padding
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start : start + batch_size]
        total += loss_sum(model, dealt(rows, pad_id)).item()
        tokens += count_labels(rows)
    model.train(was_training)
    (total,) = processes.total(total)
    return {"loss": total / tokens, "perplexity": math.exp(total / tokens)}


class _HeldInterrupt:
    """While entered, Ctrl-C is noted instead of raised; a second one ends the program at once.

    That second one must not be a KeyboardInterrupt, which saves: a step may be half done.
    """

    def __init__(self) -> None:
        self.noted = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.noted and processes.count() == 1:  # torchrun passes on what the terminal sends too
            raise SystemExit(130)
        self.noted = True

    def __enter__(self) -> _HeldInterrupt:
        self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._previous)


class Trainer:
    """Trains what requires a gradient, as `config` (the script's `training_config`) says.

    `settings` names all that decides the course of the run; it goes into every checkpoint, and a
    checkpoint with other settings is refused. `folder` receives checkpoints and curves. `parallel` is
    the engine of several processes.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        config: dict[str, Any],
        settings: dict[str, Any],
        folder: Path,
        log: RunLog,
        parallel: str,
    ) -> None:
        self.model, self.data, self.config = model, data, config
        self.called = processes.data_parallel(model, parallel)
        self.settings, self.folder, self.log = settings, folder, log
        self.accumulation = config["gradient_accumulation_steps"]
        self.batches = math.ceil(len(data.train) / config["per_device_train_batch_size"])
        self.steps = steps_of(config, self.batches)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        rates = config["learning_rate"], config["loraplus_lr_ratio"]
        self.optimizer = torch.optim.AdamW(lora.parameter_groups(model, *rates))
        self.state = lora.distributed.TrainingState(model, self.optimizer)
        self.scheduler = get_scheduler(
            config["lr_scheduler_type"],
            self.optimizer,
            num_warmup_steps=math.ceil(config["warmup_ratio"] * self.steps),
            num_training_steps=self.steps,
        )
        self.step = 0
        self.tokens, self.seconds = 0, 0.0  # of this process, in training steps alone
        self.running = {"loss": 0.0, "steps": 0}  # since the last log event
        if processes.count() > 1:  # other rows, other masks
            self._seed_of_step()
        self.rng = _rng_state()

    def _seed_of_step(self) -> None:
        parts = self.config["seed"], self.step, processes.rank()
        torch.manual_seed(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big"))

    @property
    def tokens_per_second(self) -> float:
        """Tokens that went through training steps, padding left out, in this process."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def run(self) -> None:
        """Train to the last step. Ctrl-C saves a checkpoint and is passed on."""
        self.model.train()
        _set_rng_state(self.rng)
        shown = {"desc": "training", "unit": "step", "disable": QUIET}
        bar = tqdm(total=self.steps, initial=self.step, **shown)
        # Of several processes each gets a signal at a moment of its own: it must not take one of them
        # out of what all do together, so it is held until all agree after a step.
        held = _HeldInterrupt() if processes.count() > 1 else contextlib.nullcontext()
        with bar, held as always:
            try:
                while self.step < self.steps:
                    self._evaluate_if_due()
                    with _HeldInterrupt() as interrupt:
                        self._step(interrupt, bar)
                    if processes.most(interrupt.noted or (always is not None and always.noted)):
                        raise KeyboardInterrupt
                    if self.step % self.config["save_steps"] == 0 or self.step == self.steps:
                        self.save()
            except KeyboardInterrupt:
                self.log.write("interrupt", step=self.step)
                self.save()
                log.warning(
                    "stopped after step %d: the same command with --resume goes on", self.step
                )
                raise

    def _step(self, interrupt: _HeldInterrupt, bar: tqdm) -> None:
        """One step of the optimizer; if interrupted midway, everything stays as it was before.

        The loss is the mean over all labelled tokens of the step, however they are spread over
        its batches.
        """
        begun = time.perf_counter()
        first = self.step * self.accumulation
        batches = [self._batch(first + number) for number in range(self.accumulation)]
        labels = sum(map(count_labels, batches))
        mine = labels / processes.count()  # the engines take the mean over processes
        total = 0.0
        for number, batch in enumerate(batches):
            if number and interrupt.noted and processes.count() == 1:
                self.optimizer.zero_grad()
                return
            with processes.reducing(self.called, now=number == len(batches) - 1):
                loss = loss_sum(self.called, dealt(batch, self.data.pad_id)) / mine
                loss.backward()
            total += loss.item() / processes.count()
        (total,) = processes.total(total)
        clipped = nn.utils.clip_grad_norm_(self.trained, self.config["max_grad_norm"])
        norm = processes.whole(clipped).item()
        if not math.isfinite(total + norm):
            raise InputError(
                f"the loss or its gradient is not finite in step {self.step + 1}: try a smaller "
                "learning_rate; what was saved before is as it was"
            )
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.rng = _rng_state()
        self.tokens += sum(len(example.ids) for batch in batches for example in batch)
        self.seconds += time.perf_counter() - begun
        self._report(bar, total, learning_rate, norm)

    def _batch(self, index: int) -> list[Example]:
        """Batch number `index` of all epochs in a row; each epoch has an order of its own."""
        epoch, place = divmod(index, self.batches)
        generator = torch.Generator().manual_seed(self.config["seed"] * 1_000_003 + epoch)
        order = torch.randperm(len(self.data.train), generator=generator).tolist()
        size = self.config["per_device_train_batch_size"]
        rows = order[place * size : (place + 1) * size]
        return [self.data.train[row] for row in rows]

    def _report(self, bar: tqdm, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Move the progress bar and, when it is due, log the mean loss since the last time."""
        self.running = {"loss": self.running["loss"] + loss, "steps": self.running["steps"] + 1}
        rate = round(self.tokens_per_second)
        bar.set_postfix_str(f"loss {loss:.3f}, lr {learning_rate:.1e}, {rate:,} tokens/s", False)
        bar.update()
        if self._log_is_due():
            self.log.write(
                "train",
                step=self.step,
                epoch=round(self.step * self.accumulation / self.batches, 4),
                loss=self.running["loss"] / self.running["steps"],
                learning_rate=learning_rate,
                grad_norm=grad_norm,
                tokens_per_second=rate,
            )
            self.running = {"loss": 0.0, "steps": 0}

    def _log_is_due(self) -> bool:
        if self.config["logging_strategy"] == "epoch":
            epochs_before = (self.step - 1) * self.accumulation // self.batches
            ended = self.step * self.accumulation // self.batches > epochs_before
            return ended or self.step == self.steps
        every_steps = self.config["logging_strategy"] == "steps"
        return every_steps and self.step % self.config["logging_steps"] == 0

    def _evaluate_if_due(self) -> None:
        """Evaluate before the next step, unless a run that this one resumes has done it."""
        if self.config["do_eval"] and self.step % self.config["eval_steps"] == 0:
            evaluated = (e["step"] for e in self.log.events if e["event"] == "evaluate")
            if self.step not in evaluated:
                self.evaluate("during")

    def evaluate(self, when: str) -> float:
        """Log loss and perplexity on the held-out examples; the loss."""
        size = self.config["per_device_eval_batch_size"]
        values = evaluate(self.model, self.data.held_out, size, self.data.pad_id)
        self.log.write("evaluate", step=self.step, when=when, **values)
        log.info(
            "step %d: held-out loss %.4f, perplexity %.1f",
            self.step,
            values["loss"],
            values["perplexity"],
        )
        return values["loss"]

    def save(self) -> None:
        """Write a checkpoint, and the loss curves up to here."""
        state = {
            "settings": self.settings,
            "step": self.step,
            "training": self.state.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": processes.every(self.rng),
            "running": self.running,
            "history": self.log.events,
        }
        with processes.first_alone() as alone:
            if alone:
                keep = self.config["save_total_limit"]
                save_checkpoint(self.folder / "checkpoints", state, keep)
                plot_losses(self.log.events, self.folder / "loss.png")

    def resume(self, state: dict[str, Any]) -> None:
        """Go back to where a checkpoint was made."""
        self.state.load_state_dict(state["training"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.running = state["step"], state["running"]
        if len(state["rng"]) == processes.count():
            self.rng = state["rng"][processes.rank()]
        else:  # then the masks of dropout are others
            self._seed_of_step()
            self.rng = _rng_state()
        self.log.events = state["history"]
        self.log.write("resume", step=self.step)


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
