"""What a training run leaves in its folder, and how it is written so that nothing gets lost.

    log.jsonl            every event of the run, one JSON object on each line
    loss.png             the loss curves, drawn from these events
    checkpoints/         all that is needed to go on after an interruption
    adapter/             what was trained, in PEFT's format
    merged/              a plain model with the update folded in

Every file that a run may need again is written under a temporary name and then renamed, so that it
is either the old one, or the new one, or absent, but never half of something.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from chat_data import InputError

log = logging.getLogger("run")

_OWN_NAMES = (
    "log.jsonl",
    "loss.png",
    "checkpoints",
    "adapter",
    "merged",
)
_FORMAT_ERRORS = (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def user_cache() -> Path:
    """This project's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lora")


def make_room(folder: Path, overwrite: bool, names: Sequence[str] = _OWN_NAMES) -> None:
    """Make the folder of a new run; what an earlier one wrote there moves to `previous-1`, and so on.

    names: of what a run writes, or patterns of them. Nothing is deleted, and nothing that a run does
    not write is touched. Without `overwrite`, earlier results are an InputError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}") from error
    found = [path for name in names for path in sorted(folder.glob(name))]
    if not found:
        return
    if not overwrite:
        raise InputError(
            f"{folder} has the results of an earlier run ({found[0].name}): go on with it by "
            "--resume, choose another --output, or set overwrite_output_dir"
        )
    number = 1
    while (folder / f"previous-{number}").exists():
        number += 1
    previous = folder / f"previous-{number}"
    previous.mkdir()
    for path in found:
        path.rename(previous / path.name)
    log.info("the results of an earlier run were moved to %s", previous)


def write_safely(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class RunLog:
    """The events of a run: kept in memory, and appended to a JSONL file as they happen.

    writes: False in all but one of several processes.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.events: list[dict[str, Any]] = []

    def write(self, event: str, **values: Any) -> None:
        self.events.append({"event": event, **values})
        if not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.events[-1]) + "\n")

    def find(self, event: str, **values: Any) -> dict[str, Any]:
        """The latest event with this name and these values."""
        wanted = {"event": event, **values}
        return next(e for e in reversed(self.events) if wanted.items() <= e.items())


def plot_losses(events: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draw the training and the held-out loss against the step."""
    # matplotlib keeps its font list in the user's configuration folder unless it is told otherwise.
    os.environ.setdefault("MPLCONFIGDIR", str(user_cache() / "matplotlib"))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("train", "training", "-"), ("evaluate", "held out", "o--")):
        points = [(e["step"], e["loss"]) for e in events if e["event"] == name]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="loss per token of the assistant")
    axes.legend()
    write_safely(path, lambda temporary: figure.savefig(temporary, format="png"))


def save_checkpoint(folder: Path, state: Mapping[str, Any], keep: int | None) -> Path:
    """Write `state` as its step's checkpoint, then delete all but the newest `keep` (None: all)."""
    path = folder / f"checkpoint-{state['step']}.pt"
    write_safely(path, lambda temporary: torch.save(dict(state), temporary))
    for old in _checkpoints(folder)[:-keep] if keep else ():
        old.unlink()
    return path


def load_checkpoint(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The newest checkpoint, if it was made with the same settings."""
    paths = _checkpoints(folder)
    if not paths:
        raise InputError(f"there is no checkpoint in {folder}: start the run without --resume")
    newest, older = paths[-1], [path.name for path in paths[:-1]]
    advice = f"move it away to go on from {older[-1]}" if older else "start without --resume"
    state = _load(newest, f"the checkpoint {newest} is damaged: {advice}")
    differing = [
        f"{name} was {state['settings'].get(name)!r} and is {value!r}"
        for name, value in settings.items()
        if state["settings"].get(name) != value
    ]
    if differing:
        raise InputError(
            f"cannot go on from {newest}, made with other settings: {'; '.join(differing)}"
        )
    return state


def _load(path: Path, message: str) -> dict[str, Any]:
    """The state in a file of `save_checkpoint`; `message` if the file is not whole."""
    needed = {"settings", "step", "training", "scheduler", "rng", "running", "history"}
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes a zip but does not check its sums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, *_FORMAT_ERRORS) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{message} ({type(error).__name__}: {reason})") from error
    if not isinstance(state, dict) or state.keys() != needed:
        raise InputError(f"{message} (it is no checkpoint of this script)")
    return state


def _checkpoints(folder: Path) -> list[Path]:
    """From the oldest to the newest."""
    numbered = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*.pt")
        if (match := re.fullmatch(r"checkpoint-(\d+)\.pt", path.name))
    ]
    return [path for _, path in sorted(numbered)]
