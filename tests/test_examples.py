"""The examples as a user runs them, with few steps: what they print, write, resume and refuse."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import scripts
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = EXAMPLES / "finetune_phi3.py"
sys.path.append(str(EXAMPLES))

FAST = [
    "--set=logging_steps=1",
    "--set=save_steps=10",
    "--set=eval_steps=10",
    "--set=eval_samples=64",
]
# A run of a second or two: few short chats, three small batches a step.
SMALL = [
    *FAST,
    "--set=logging_steps=3",  # so that a mean is under way when a checkpoint is made
    "--steps=30",
    "--set=bf16=false",
    "--set=do_eval=true",
    "--set=learning_rate=0.003",
    "--set=save_total_limit=3",
    "--set=gradient_accumulation_steps=3",
    "--set=per_device_train_batch_size=2",
    "--set=gradient_checkpointing=false",
]


def environment(home: Path) -> dict[str, str]:
    changes = {
        "HOME": str(home / "home"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    (home / "home").mkdir(parents=True, exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if k not in ("HF_HOME", "MPLCONFIGDIR")}
    return inherited | changes


def losses(output: Path) -> dict[tuple[str, int], float]:
    """Every logged loss; what was logged twice, before and after an interruption, must agree."""
    found: dict[tuple[str, int], float] = {}
    for line in (output / "log.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] in ("train", "evaluate"):
            key = (event["event"], event["step"])
            assert found.setdefault(key, event["loss"]) == event["loss"]
    return found


def same_factors(one: Path, other: Path) -> bool:
    a, b = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def first(default_run):
    return default_run


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A small data file with several turns, system messages and a column that is not used."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = []
    for number in range(40):
        turns = [("user", f"What is {number} + 1?"), ("assistant", f"It is {number + 1}.")]
        turns += [("user", "Sure?"), ("assistant", "Yes.")] * (number % 3)
        turns[:0] = [("system", "You add.")] * (number % 2)
        messages = [{"role": role, "content": content} for role, content in turns]
        rows.append(json.dumps({"messages": messages, "id": number}))
    path.write_text("\n".join(rows) + "\n\n")
    return path


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the script in this process: (exit code, the lines of stdout, stderr)."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(*arguments: object) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out.splitlines(), captured.err

    yield call
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(first, chats, tmp_path_factory):
    """A run on `chats` from its beginning to its end, in a process of its own."""
    output = tmp_path_factory.mktemp("uninterrupted") / "output"
    arguments = ["--model", first.base, "--data", chats, *SMALL]
    done = scripts.run(
        *(SCRIPT, *arguments, "--output", output),
        folder=output.parent / "printed",
        environment=environment(first.home),
    )
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(output=output, arguments=arguments)


def test_default_run_reports_and_writes(first):
    report = first.report
    assert set(report) == {
        "eval_loss_before",
        "eval_loss_after",
        "reload_difference",
        "merged_difference",
        "base_bytes",
        "trainable_parameters",
        "tokens_per_second",
        "seconds",
    }
    assert report["eval_loss_after"] < 0.95 * report["eval_loss_before"]
    assert report["reload_difference"] < 1e-4
    assert report["merged_difference"] < 1e-4
    assert report["trainable_parameters"] == 131_072
    assert report["tokens_per_second"] > 0
    assert (first.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    kept = sorted(path.name for path in (first.output / "checkpoints").iterdir())
    assert kept == ["checkpoint-10.pt", "checkpoint-20.pt"]
    events = [json.loads(line) for line in (first.output / "log.jsonl").read_text().splitlines()]
    assert [e["when"] for e in events if e["event"] == "evaluate"] == ["before", "during", "after"]
    assert [len(e["answers"]) for e in events if e["event"] == "answers"] == [4, 4]
    trained = [e for e in events if e["event"] == "train"]
    assert [e["step"] for e in trained] == list(range(1, 21))
    rates = [e["learning_rate"] for e in trained]
    assert rates.index(max(rates)) == 4  # 20 % of warm-up, then down
    assert rates[0] < rates[2] > rates[-1]


def test_default_run_writes_only_into_output_and_cache(first):
    assert list(first.work.iterdir()) == []
    assert list((first.home / "home").iterdir()) == []
    written = {path.name for path in first.home.iterdir()}
    assert written == {
        "work",
        "output",
        "cache",
        "home",
        "report.json",
        "stderr",
    }  # two by the tests


def test_second_run_reuses_the_standin_repeats_every_bit_and_keeps_the_first(first, run, tmp_path):
    stamp = (first.base / "model.safetensors").stat().st_mtime_ns
    kept = tmp_path / "output"
    kept.mkdir()
    (kept / "log.jsonl").write_text("an earlier log\n")
    (kept / "mine.txt").write_text("not a run's")
    arguments = [kept if a == first.output else a for a in first.arguments]
    code, out, err = run(*arguments, "--cache-dir", first.base.parent)
    assert code == 0, err
    report = json.loads(out[-1])
    for name in ("eval_loss_before", "eval_loss_after"):
        assert report[name] == first.report[name]
    assert same_factors(first.output, kept)
    assert (first.base / "model.safetensors").stat().st_mtime_ns == stamp
    assert (kept / "previous-1" / "log.jsonl").read_text() == "an earlier log\n"
    assert (kept / "mine.txt").read_text() == "not a run's"


def test_merged_checkpoint_needs_no_lora(first, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setitem(sys.modules, "lora", None)  # an import would fail
    folder = first.output / "merged"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("What is a list?", return_tensors="pt").input_ids
    reply = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert 1 <= reply.shape[1] - ids.shape[1] <= 5


def test_standin_is_built_whole_or_not_at_all(tmp_path, monkeypatch):
    import standin

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(standin, "_train_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        standin.standin_checkpoint(["some text"], tmp_path, steps=1)
    assert list(tmp_path.iterdir()) == []


def test_recipe_has_the_published_values_and_nothing_decorative():
    script = runpy.run_path(str(SCRIPT), run_name="finetune_phi3")
    published = {
        "bf16": True,
        "do_eval": False,
        "learning_rate": 5.0e-06,
        "log_level": "info",
        "logging_steps": 20,
        "logging_strategy": "steps",
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1,
        "max_steps": -1,
        "output_dir": "./checkpoint_dir",
        "overwrite_output_dir": True,
        "per_device_eval_batch_size": 4,
        "per_device_train_batch_size": 4,
        "save_steps": 100,
        "save_total_limit": 1,
        "seed": 0,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "gradient_accumulation_steps": 1,
        "warmup_ratio": 0.2,
        "max_seq_length": 2048,
    }
    assert published.items() <= script["training_config"].items()
    assert script["peft_config"] == {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "target_modules": "all-linear",
        "modules_to_save": None,
    }
    assert script["standin_config"].keys() <= script["training_config"].keys()
    sources = "".join(path.read_text() for path in EXAMPLES.glob("*.py"))
    for name in script["training_config"]:
        assert f'config["{name}"]' in sources, f"{name} is not read"


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [
        ([], 5e-3),
        (["--lr", "0.25"], 0.25),
        (["--model", "x"], 1e-4),
        (["--model", "x", "--recipe", "published"], 5e-6),
        (["--model", "x", "--recipe", "published", "--lr", "0.25"], 0.25),
    ],
)
def test_the_learning_rate_of_each_recipe(arguments, rate, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    script = runpy.run_path(str(SCRIPT), run_name="finetune_phi3")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    script["arguments"]()
    assert script["training_config"]["learning_rate"] == rate


def test_the_published_recipe_is_for_a_real_model(run, tmp_path):
    code, _, err = run("--recipe", "published", "--output", tmp_path / "output")
    assert code == 2
    assert "--recipe published needs --model" in err


def test_what_a_run_trains_with_is_told(first):
    said = r"training: learning rate 0\.005 \(cosine\), 0\.\d+ epochs \(20 steps\), r=16\n"
    assert re.search(said, first.stderr), first.stderr
    assert "hardly moved" not in first.stderr


def test_a_loss_that_hardly_moves_is_told(first, chats, run, tmp_path, caplog):
    arguments = ["--model", first.base, "--data", chats, "--output", tmp_path / "output", *SMALL]
    code, _, err = run(*arguments, "--set=learning_rate=5e-6", "--steps=3")
    assert code == 0, err
    assert "the held-out loss hardly moved" in caplog.text
    assert "at the learning rate 5e-06" in caplog.text


def test_resume_after_a_crash_is_equal_to_the_bit(uninterrupted, run, tmp_path):
    output = tmp_path / "output"
    code, _, err = run(*uninterrupted.arguments, "--output", output)
    assert code == 0, err
    for name in ("checkpoint-20.pt", "checkpoint-30.pt"):  # as if it had ended in step 10
        (output / "checkpoints" / name).unlink()
    shutil.rmtree(output / "adapter")
    code, out, err = run(*uninterrupted.arguments, "--output", output, "--resume")
    assert code == 0, err
    assert "resume" in (output / "log.jsonl").read_text()
    assert same_factors(output, uninterrupted.output)
    assert losses(output) == losses(uninterrupted.output)
    assert json.loads(out[-1])["reload_difference"] == 0.0


def test_ctrl_c_saves_and_can_be_resumed(uninterrupted, first, run, tmp_path):
    output = tmp_path / "output"
    arguments = [*uninterrupted.arguments, "--output", output]
    script = scripts.start(
        *(SCRIPT, *arguments),
        folder=tmp_path / "printed",
        environment=environment(first.home),
    )
    log = output / "log.jsonl"
    while not (log.exists() and '"train", "step": 3,' in log.read_text()):
        assert script.poll() is None, script.stderr
        time.sleep(0.01)
    os.kill(script.pid, signal.SIGINT)
    assert script.wait() == 130
    err = script.stderr
    assert "Traceback" not in err
    assert "--resume" in err
    steps = [int(p.stem.rpartition("-")[2]) for p in (output / "checkpoints").iterdir()]
    assert 3 <= max(steps) < 30
    code, _, err = run(*arguments, "--resume")
    assert code == 0, err
    assert same_factors(output, uninterrupted.output)
    assert losses(output) == losses(uninterrupted.output)


def test_evaluation_does_not_disturb_training(uninterrupted, run, tmp_path):
    output = tmp_path / "output"
    code, _, err = run(*uninterrupted.arguments, "--output", output, "--set", "do_eval=false")
    assert code == 0, err
    assert same_factors(output, uninterrupted.output)


def test_bf16_and_gradient_checkpointing(first, chats, run, tmp_path):
    recipe = ["--steps=3", *FAST, "--set=learning_rate=0.003", "--output", tmp_path / "output"]
    code, out, err = run("--model", first.base, "--data", chats, *recipe)
    assert code == 0, err
    report = json.loads(out[-1])
    assert report["eval_loss_after"] < report["eval_loss_before"]
    config = json.loads((tmp_path / "output" / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{GOOD}\n{{oops\n", "line 2: not JSON"),
        (f"{GOOD}\n\n{GOOD}\n", "line 2: not JSON"),
        (f"{GOOD}\n\xff\n", "line 2: not JSON"),
        (f"{GOOD}\n[]\n", 'line 2: expected {"messages": [...]}'),
        (f"{GOOD}\n{GOOD.replace('user', 'human')}\n", "line 2: unknown role 'human'"),
        (GOOD.replace("assistant", "user"), "line 1: no assistant turn"),
        (GOOD.replace('"b"', "3"), 'a message needs a "role" and a text "content"'),
        ("", "is empty"),
        ("\n \n", "is empty"),
        (GOOD, "two are needed"),
        (None, "cannot read the data file"),
    ],
)
def test_bad_data_is_a_clear_error_and_loses_nothing(first, run, tmp_path, content, message):
    data, output = tmp_path / "chats.jsonl", tmp_path / "output"
    output.mkdir()
    (output / "log.jsonl").write_text("an earlier log\n")
    if content is not None:
        data.write_bytes(content.encode("latin-1"))
    code, out, err = run("--model", first.base, "--data", data, "--output", output)
    assert code == 2
    assert message in err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert out == []
    assert [path.name for path in output.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "there is no such folder here either"),
        (["--set", "learning_rat=1"], "expected NAME=VALUE, with NAME one of"),
        (["--set", "save_steps=often"], "expected the type int, as of 100"),
        (["--set", "save_steps=0"], "save_steps=0: expected a whole number of 1 or more"),
        (["--set", "logging_strategy=always"], "expected one of ('no', 'epoch', 'steps')"),
        (["--set", 'target_modules=["q_proj"]'], "cannot be adapted"),
        (["--set", "max_seq_length=3"], "no chat has an assistant's word in its first 3 tokens"),
        (["--set", "overwrite_output_dir=false"], "has the results of an earlier run"),
        (["--resume"], "there is no checkpoint in"),
    ],
)
def test_bad_settings_are_a_clear_error(first, chats, run, tmp_path, arguments, message):
    output = tmp_path / "output"
    output.mkdir()
    (output / "log.jsonl").write_text("an earlier log\n")
    code, _, err = run("--model", first.base, "--data", chats, "--output", output, *arguments)
    assert code == 2
    assert message in err
    assert [path.name for path in output.iterdir()] == ["log.jsonl"]


def test_damaged_and_foreign_checkpoints_are_refused(uninterrupted, run, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    whole = (uninterrupted.output / "checkpoints" / "checkpoint-10.pt").read_bytes()
    older, newest = folder / "checkpoint-10.pt", folder / "checkpoint-20.pt"
    older.write_bytes(whole)
    arguments = [*uninterrupted.arguments, "--output", tmp_path, "--resume"]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (b"", b"garbage", whole[: len(whole) // 2], bytes(flipped)):
        newest.write_bytes(damaged)
        code, _, err = run(*arguments)
        assert code == 2
        assert f"{newest} is damaged: move it away to go on from checkpoint-10.pt" in err
        assert older.read_bytes() == whole
    newest.unlink()
    for change, message in (
        ("r=8", "peft_config.r was 16 and is 8"),
        ("seed=1", "training_config.seed was 0 and is 1"),
        ("max_seq_length=30", "data was "),
    ):
        code, _, err = run(*arguments, "--set", change)
        assert code == 2
        assert message in err
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == []


def test_all_checkpoints_can_be_kept(run, first, chats, tmp_path):
    arguments = ["--model", first.base, "--data", chats, "--output", tmp_path, *SMALL]
    code, _, err = run(*arguments, "--steps=4", "--set=save_steps=1", "--set=save_total_limit=null")
    assert code == 0, err
    assert len(list((tmp_path / "checkpoints").glob("*.pt"))) == 4


VARIANTS = {
    "rslora": (["--use-rslora"], "use_rslora"),
    "dora": (["--use-dora"], "use_dora"),
    "lora_bias": (["--lora-bias"], "lora_bias"),
    "lorafa": (["--use-lorafa"], "use_lorafa"),
    "pissa": (["--init-lora-weights", "pissa"], "pissa"),
    "loraplus": (["--loraplus-lr-ratio", "16"], None),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_by_its_flag(name, run, first, chats, tmp_path):
    flags, said = VARIANTS[name]
    arguments = ["--model", first.base, "--data", chats, "--output", tmp_path / "output", *SMALL]
    code, out, err = run(*arguments, "--steps=6", *flags)
    assert code == 0, err
    table = "\n".join(out[:-1])
    assert said is None or all(said in line for line in out if line.startswith("MergedLinear"))
    assert ("variant" in table) == (said is not None)
    report = json.loads(out[-1])
    assert report["eval_loss_after"] < report["eval_loss_before"]
    assert report["reload_difference"] == 0
    assert ("merged_difference" in report) == (name != "lora_bias")  # Phi-3 has no biases
    code, _, err = run(*arguments, "--steps=6", "--resume")  # as plain LoRA
    assert code == 2
    assert "made with other settings" in err


def test_a_base_of_4_bits(run, first, chats, tmp_path):
    output = tmp_path / "output"
    arguments = ["--model", first.base, "--data", chats, "--output", output, *SMALL, "--steps=9"]
    code, out, err = run(*arguments, "--quantize", "nf4")
    assert code == 0, err
    report = json.loads(out[-1])
    assert set(report) == {*first.report, "base_eval_loss"}
    assert report["eval_loss_after"] < 0.95 * report["eval_loss_before"]
    assert report["eval_loss_before"] == pytest.approx(report["base_eval_loss"], rel=0.02)
    assert report["eval_loss_before"] != report["base_eval_loss"]
    assert report["reload_difference"] == 0
    assert report["merged_difference"] < 1e-4
    base = load_file(first.base / "model.safetensors")
    weights = sum(t.numel() for name, t in base.items() if name.endswith("_proj.weight"))
    dense = first.report["base_bytes"] - 4 * weights  # of what is not quantised
    assert 0.5 * weights < report["base_bytes"] - dense <= 0.53 * weights
    assert load_file(output / "merged" / "model.safetensors").keys() == base.keys()
    code, _, err = run(*arguments, "--resume")
    assert code == 2
    assert "quantize was 'nf4' and is None" in err
    code, _, err = run(*arguments, "--quantize", "int8")
    assert code == 2
    assert "invalid choice: 'int8' (choose from 'nf4')" in err


PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}"
)
# The tokenizers of the Phi-3 family have had these forms: the text ends in an end-of-text unless a
# reply is asked for; every user's turn opens a reply; no newlines.
TEMPLATES = {
    "ends the text": PHI3
    + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "opens the reply at once": (
        "{{ eos_token }}{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}{{ m['content'] + '<|end|>\n' }}"
        "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        "{% if m['role'] == 'user' %}{{ '<|assistant|>\n' }}{% endif %}{% endif %}{% endfor %}"
    ),
    "no newlines": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    ),
}
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one and two?"},
    {"role": "assistant", "content": " three"},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "you are welcome\nindeed"},
]


@pytest.fixture
def make_tokenizer():
    """A tokenizer with Phi-3's marks; llama: SentencePiece's way, marks that swallow newlines."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(template: str, llama: bool) -> PreTrainedTokenizerFast:
        texts = [message["content"] for message in CHAT]
        marks = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
        if llama:
            characters = ["▁", *sorted(set("".join(texts).replace(" ", "")) - {"\n"})]
            pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
            vocab = {piece: number for number, piece in enumerate(pieces)}
            bpe = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
            bpe.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
            bpe.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            )
        else:
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            vocab = {piece: number for number, piece in enumerate(alphabet)}
            newline = "Ċ"
            vocab[2 * newline] = len(vocab)
            bpe = Tokenizer(models.BPE(vocab, [(newline, newline)]))
            bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            bpe.decoder = decoders.ByteLevel()
        bpe.add_special_tokens([AddedToken(m, rstrip=llama, normalized=False) for m in marks])
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe, eos_token=marks[0], pad_token=marks[0], chat_template=template
        )

    return make


@pytest.mark.parametrize("llama", [False, True], ids=["byte-level", "llama"])
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_mask_covers_the_assistants_tokens_alone(make_tokenizer, template, llama):
    from chat_data import IGNORED, collate, encode_data

    tokenizer = make_tokenizer(TEMPLATES[template], llama)
    data = encode_data([{"messages": CHAT}], [{"messages": CHAT}], tokenizer, 500, 10)
    (example,) = data.train
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert example.ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    learned: list[list[int]] = [[]]
    for label in example.labels.tolist():
        if label != IGNORED:
            learned[-1].append(label)
        elif learned[-1]:
            learned.append([])
    said = [tokenizer.decode(turn).strip() for turn in learned if turn]
    assert said == ["three<|end|>", "you are welcome\nindeed<|end|>"]
    assert example.reply == CHAT[-1]["content"]
    assert example.prompt == tuple(CHAT[:-1])

    short = encode_data([{"messages": CHAT[:3]}], [{"messages": CHAT}], tokenizer, 500, 10)
    batch = collate([example, *short.train], data.pad_id)
    length = len(short.train[0].ids)
    assert batch["attention_mask"][1].tolist() == [1] * length + [0] * (len(example.ids) - length)
    assert (batch["labels"][1, length:] == IGNORED).all()


def test_mask_when_a_reply_opens_with_a_newline(make_tokenizer):
    """The template's newline and the reply's first are one token, which nobody said alone."""
    from chat_data import IGNORED, encode

    tokenizer = make_tokenizer(TEMPLATES["ends the text"], False)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\nb"}]
    _, labels = encode(chat, tokenizer)
    assert tokenizer.decode([i for i in labels if i != IGNORED]) == "\nb<|end|>"


def test_template_that_rewrites_earlier_turns_is_refused(make_tokenizer):
    from chat_data import InputError, encode_data

    counted = "{{ messages|length }}" + TEMPLATES["ends the text"]
    tokenizer = make_tokenizer(counted, False)
    with pytest.raises(InputError, match=r"conversation 1: .*rewrites earlier turns"):
        encode_data([{"messages": CHAT}], None, tokenizer, 500, 10)


def test_long_chats_are_truncated_and_counted(make_tokenizer):
    from chat_data import encode, encode_data

    tokenizer = make_tokenizer(TEMPLATES["ends the text"], False)
    short = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    long_reply = {"messages": [short["messages"][0], {"role": "assistant", "content": "b" * 50}]}
    long_prompt = {"messages": [{"role": "user", "content": "a" * 50}, short["messages"][1]]}
    longest = len(encode(short["messages"], tokenizer)[0])
    chats = [short, long_reply, long_prompt]
    data = encode_data(chats, [short], tokenizer, longest, 10)
    assert data.counts() == {"train": 2, "held_out": 1, "truncated": 2, "left_out": 1}
    assert [len(example.ids) for example in data.train] == [longest, longest]


def test_standard_library_is_read_the_same_every_time_and_never_imported():
    code = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import stdlib_docs
before = set(sys.modules)
docs = stdlib_docs.read_docs()
pairs = stdlib_docs.chat_pairs(docs)
known = ("encodings.", "_sysconfigdata")  # to decode the sources, and to find them
imported = {name for name in set(sys.modules) - before if not name.startswith(known)}
print(len(docs), hashlib.sha256(repr((docs, pairs)).encode()).hexdigest(), imported)
"""
    outputs = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(EXAMPLES)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.add(done.stdout)
    (output,) = outputs
    assert int(output.split()[0]) > 5000
    assert output.split(maxsplit=2)[2].strip() == "set()"


def test_quickstart(tmp_path):
    lines = (EXAMPLES / "quickstart.py").read_text().splitlines()
    assert len(lines) < 60
    done = scripts.run(
        EXAMPLES / "quickstart.py",
        folder=tmp_path / "printed",
        directory=tmp_path,
        environment=environment(tmp_path),
        filters="error",
    )
    assert done.returncode == 0, done.stderr
    printed = [float(line.split()[-1]) for line in done.stdout.splitlines() if "loss" in line]
    assert len(printed) == 5
    assert printed[-1] < 0.6 * printed[0]
    assert {path.name for path in tmp_path.iterdir()} == {"home", "printed"}
