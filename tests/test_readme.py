"""Every Python block of the README runs; its table is the one that the measured rows give."""

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
WITH_CODE = [section for section in SECTIONS if "```python" in section]


@pytest.mark.filterwarnings("ignore:.*this adapter does nothing yet")  # the README does not train
@pytest.mark.parametrize("section", WITH_CODE, ids=lambda s: s.splitlines()[0])
def test_the_blocks_of_a_section_run_in_order(section, make_phi3, tmp_path, monkeypatch):
    """On a small checkpoint in the place of the Hub's name."""
    make_phi3().save_pretrained(tmp_path / "phi3")
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "LoRA": 5, "What": 6}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "phi3")
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(3, 13)[None]
    namespace = {"batches": [{"input_ids": ids, "labels": ids}]}
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        code = block.replace("microsoft/Phi-3-mini-4k-instruct", str(tmp_path / "phi3"))
        exec(compile(code, "README.md", "exec"), namespace)


def test_the_table_is_the_measured_one():
    tools = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))
    shown = README.partition(tools["BEGIN"])[2].partition(tools["END"])[0]
    assert shown.strip() == tools["table"]().strip()


def test_the_commands_name_extras_and_files_that_exist():
    for script in re.findall(r"python (\S+\.py)", README):
        assert (ROOT / script).is_file()
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    for extra in re.findall(r'pip install -e "\.\[(\w+)\]"', README):
        assert re.search(rf"^{extra} = \[", extras, flags=re.MULTILINE)
