"""Train a byte-level BPE tokenizer with Qwen's control tokens and write it as a Hugging Face directory.

    python tools/make_tokenizer.py --vocab-size 512 --output-dir runs/tokenizer corpus.txt
    some_command | python tools/make_tokenizer.py --vocab-size 512 --output-dir runs/tokenizer

The input is plain text, one training text a line. The directory holds tokenizer.json and tokenizer_config.json (chatml
template, `<|im_end|>` as end, `<|endoftext|>` as padding), which `TurnTokenizer` and transformers' AutoTokenizer read.
All 256 bytes have a token and there is no normaliser, so that any text decodes to itself. The control tokens take the
highest ids and are in no merge. The result depends on the texts and the size only.

It trains no other kind of tokenizer and extends no existing one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_BYTES = 256
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Qwen2's pre-tokenisation, words with their leading space, runs of punctuation, line ends, but single digits keep their
leading space too: the worlds here number their things."""
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, output_dir: str | Path, *, control_tokens: tuple[str, ...] = CONTROL_TOKENS
) -> int:
    """Train on `texts`, write the directory, and return the number of ids, control tokens included.

    That number is below `vocab_size` where the texts have too few distinct words. Raises ValueError for a `vocab_size`
    that cannot hold the 256 bytes and the control tokens.
    """
    smallest = NUM_BYTES + len(control_tokens)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and the control tokens need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(control_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control_tokens])
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output_dir / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
    }
    (output_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size(with_added_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer with Qwen's control tokens.")
    parser.add_argument("text", nargs="?", help="file with one text a line; standard input where absent")
    parser.add_argument("--vocab-size", type=int, default=512, help="ids in all, control tokens included")
    parser.add_argument("--output-dir", required=True)
    args = parser.parse_args()
    try:
        lines = Path(args.text).read_text(encoding="utf-8").splitlines() if args.text else sys.stdin.read().splitlines()
        size = train_tokenizer(lines, args.vocab_size, args.output_dir)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{args.output_dir}: {size} ids from {len(lines)} lines")


if __name__ == "__main__":
    main()
