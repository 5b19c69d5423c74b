"""Tokenizers trained for the tests: a small one of our own kind, and one with Qwen3's added tokens."""

import json
from pathlib import Path

from megatron_tcod.rollout.chat import TurnTokenizer
from tools.make_tokenizer import train_tokenizer

CORPUS = [
    "You are in the middle of a room. Looking around you, you see a cabinet 1, a desk 2 and a fridge 1.",
    "go to cabinet 1", "open fridge 1", "take apple 1 from fridge 1", "put apple 1 in cabinet 2",
    "On the desk 2, you see a lamp 1, a pencil 3 and nothing else.", "system user assistant", "think action answer",
    "Your task is to: heat some egg and put it in the garbage can.", "Nothing happens.", "im_start im_end endoftext",
] * 3  # fmt: skip

QWEN3_ADDED = (
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"]
    + ["<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
    + ["<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"]
    + ["<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"]
    + ["<think>", "</think>"]
)
QWEN3_NOT_SPECIAL = set(QWEN3_ADDED[14:])


def small_tokenizer(directory: Path, **options) -> TurnTokenizer:
    train_tokenizer(CORPUS, 600, directory)
    return TurnTokenizer.from_directory(directory, **options)


def qwen3_like_tokenizer(directory: Path, **options) -> TurnTokenizer:
    """Qwen3's added tokens, special or not as there, and its NFC normaliser, over a small vocabulary."""
    train_tokenizer(CORPUS, 600, directory, control_tokens=tuple(QWEN3_ADDED))
    path = directory / "tokenizer.json"
    specification = json.loads(path.read_text())
    specification["normalizer"] = {"type": "NFC"}
    for token in specification["added_tokens"]:
        token["special"] = token["content"] not in QWEN3_NOT_SPECIAL
    path.write_text(json.dumps(specification))
    return TurnTokenizer.from_directory(directory, **options)
