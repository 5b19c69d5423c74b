"""Whether a server's teacher speaks of the same ids as the student, found out before the first token is scored.

    await check_teacher(server, tokenizer, max_context=16_384)          # ValueError with what differs and the fix

Asked of the server: the text of every id, its longest request and, where the directory that it names is readable here, the
size of its vocabulary. Ids beyond that size would end an SGLang server, so they must never be sent.

It does not compare chat templates: only ids go to the teacher.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_tcod.rollout.chat import TurnTokenizer
from megatron_tcod.rollout.http_json import ServerError

logger = logging.getLogger(__name__)

IDS_A_PROBE = 8192
"""Ids compared in one request."""


class Server(Protocol):
    """One SGLang server over HTTP, as `sglang_client.SGLangClient` has it."""

    url: str

    async def get(self, path: str) -> Any: ...

    async def post(self, path: str, body: dict[str, Any]) -> Any: ...

    async def close(self) -> None: ...


async def check_teacher(server: Server, tokenizer: TurnTokenizer, *, max_context: int) -> None:
    """Raises ValueError where ids, the size of the vocabulary, or the longest request do not suit the student's rows."""
    info = await server.get("/model_info")
    name = f"the teacher {info.get('model_path')} at {server.url}"
    longest = (await server.get("/server_info")).get("max_req_input_len")
    if longest and longest < max_context:
        raise ValueError(
            f"{name} takes {longest} tokens, rows may have {max_context}; serve it with a larger --context-length and "
            f"--max-total-tokens, or lower rollout_max_context_len"
        )
    num_ids = _vocabulary_of(info.get("model_path"))
    if num_ids is None:
        logger.info("config.json of %s is not readable here: the size of its vocabulary is taken from its tokenizer", name)
    elif num_ids < tokenizer.vocab_size:
        raise ValueError(
            f"{name} has {num_ids} ids, the student's tokenizer {tokenizer.vocab_size}; the others would end the server: "
            f"serve a teacher that was made for the student's tokenizer"
        )
    for first in range(0, tokenizer.vocab_size, IDS_A_PROBE):
        await _check_ids(server, tokenizer, range(first, min(first + IDS_A_PROBE, tokenizer.vocab_size)), name)


async def _check_ids(server: Server, tokenizer: TurnTokenizer, ids: Sequence[int], name: str) -> None:
    """Each id alone must be the same text on both sides, but for spaces, which some tokenizers tidy up."""
    try:
        answer = await server.post("/detokenize", {"tokens": [[token] for token in ids], "skip_special_tokens": False})
    except ServerError as error:
        answer = error
    texts = answer.get("text") if isinstance(answer, dict) else None
    if not isinstance(texts, list) or len(texts) != len(ids):
        raise ValueError(
            f"{name} does not tell the text of its ids: /detokenize answered {str(answer)[:200]}; serve it with its "
            f"tokenizer (without --skip-tokenizer-init)"
        )
    for token, theirs in zip(ids, texts, strict=True):
        ours = tokenizer.decode([token])
        if "".join(ours.split()) != "".join(str(theirs).split()):
            raise ValueError(
                f"student and teacher must share one tokenizer, but id {token} is {ours!r} to the student and {theirs!r} "
                f"to {name}; distillation compares ids, so serve a teacher with the student's tokenizer.json"
            )


def _vocabulary_of(model_path: Any) -> int | None:
    """`vocab_size` of the config.json below a directory of this machine; None where there is none."""
    config = Path(str(model_path)) / "config.json"
    if not config.is_file():
        return None
    found = json.loads(config.read_text(encoding="utf-8"))
    return found.get("vocab_size") or found.get("text_config", {}).get("vocab_size")
