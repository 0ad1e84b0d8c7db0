"""Every Python block of the README and of the guides runs; tables are those that measured rows give."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SECTIONS = re.split(r"^## ", README, flags=re.MULTILINE)
WITH_CODE = {text.splitlines()[0]: text for text in SECTIONS if "```python" in text}
GUIDES = {
    name: (ROOT / "docs" / name).read_text()
    for name in ("phi3.md", "qlora.md", "training.md", "variants.md")
}
# As Phi-3's own: every turn between its role and an end.
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"


@pytest.fixture
def small_phi3(make_phi3, tmp_path):
    """A folder with a model and a tokenizer, to stand for the Hub's name."""
    make_phi3().save_pretrained(tmp_path / "phi3")
    known = ["[UNK]", "<s>", "</s>", "<|user|>", "<|assistant|>", "LoRA", "What", "<|end|>"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="[UNK]", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(tmp_path / "phi3")
    return str(tmp_path / "phi3")


@pytest.fixture
def one_of_one(monkeypatch):
    """What torchrun tells a process, of which there is one; the group that it makes ends."""
    told = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*this adapter does nothing yet")  # the README does not train
@pytest.mark.parametrize("name", [*WITH_CODE, *GUIDES])
def test_the_blocks_run_in_order(name, small_phi3, one_of_one, tmp_path, monkeypatch):
    """Of a section of the README, or of a whole guide."""
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(3, 13)[None]
    namespace = {"batches": [{"input_ids": ids, "labels": ids}]}
    text = (WITH_CODE | GUIDES)[name]
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        code = block.replace("microsoft/Phi-3-mini-4k-instruct", small_phi3)
        exec(compile(code, name, "exec"), namespace)


TOOLS = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))


@pytest.mark.parametrize("file", TOOLS["TABLES"])
def test_the_table_is_the_measured_one(file):
    shown = (ROOT / file).read_text().partition(TOOLS["BEGIN"])[2].partition(TOOLS["END"])[0]
    assert shown.strip() == TOOLS["TABLES"][file]().strip()


def test_the_commands_name_extras_and_files_that_exist():
    for script in re.findall(r"python (\S+\.py)", README):
        assert (ROOT / script).is_file()
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    for extra in re.findall(r'pip install -e "\.\[(\w+)\]"', README):
        assert re.search(rf"^{extra} = \[", extras, flags=re.MULTILINE)
