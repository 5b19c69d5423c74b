"""The tokenizer tool from the command line: standard input in, a directory out, one line for a wrong size."""

import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from megatron_tcod.rollout.chat import TurnTokenizer

TOOL = Path(__file__).parents[2] / "tools" / "make_tokenizer.py"


def run(*arguments, text):
    return subprocess.run([sys.executable, str(TOOL), *arguments], input=text, capture_output=True, text=True)


def test_standard_input_becomes_a_directory_that_both_readers_agree_on(tmp_path):
    text = "go to desk 1\ntake lamp 2 from desk 1\n" * 5
    result = run("--vocab-size", "300", "--output-dir", str(tmp_path / "out"), text=text)
    assert result.returncode == 0 and "ids from 10 lines" in result.stdout
    ours = TurnTokenizer.from_directory(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(theirs) == ours.vocab_size <= 300
    assert theirs.eos_token_id == ours.end_of_turn_id
    assert ours.encode_plain("take lamp 2") == theirs("take lamp 2")["input_ids"]


def test_a_wrong_size_is_one_line_without_a_traceback(tmp_path):
    result = run("--vocab-size", "100", "--output-dir", str(tmp_path / "out"), text="x")
    assert result.returncode == 2
    assert result.stderr.strip() == ("error: vocab_size 100 is too small: 256 bytes and the control tokens need 259")
