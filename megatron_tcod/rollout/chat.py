"""Token-in, token-out chat: the only place where text becomes ids and where control tokens are put.

    tokenizer = TurnTokenizer.from_directory(hf_directory, chat_template="chatml", system_prompt="")
    ids = tokenizer.prompt(observation)                           # first turn, ready for sampling
    ids += sampled_ids                                            # kept as they are, whatever they decode to
    ids += tokenizer.bridge(finish_reason, next_observation, last_id=sampled_ids[-1])
    text = tokenizer.answer_text(sampled_ids)                     # without the stop token

A conversation only grows: nothing that was sampled is ever decoded and encoded again. What stands between two answers
(end of turn, headers, the next observation) is a fixed glue with one hole for the observation.

Text that is not ours - observations, tasks, the system prompt, recorded answers - goes through a second backend, built
from the same tokenizer.json with its added tokens removed. There the text "<|im_end|>" is just eight characters or so of
text; no string can become a control id, Qwen3's non-special `<think>` included. Each result is checked nevertheless.

Templates: `chatml` is built in and needs nothing from the directory. `model` (the directory's Jinja template) and a path
to a Jinja file are rendered a few times with sentinels to find the glue. A template that does not extend its own earlier
output, such as Qwen3's, which drops the thinking of earlier turns, is refused with both renderings shown.

It knows no tools, images or system messages between turns, and one conversation shape: user, assistant, user, ...
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's layout without tools, default system prompt or treatment of thinking."""

_SYSTEM, _USER = "\ue000system\ue001", "\ue000user\ue001"
_ANSWERS = ("first answer", "<think>\nfirst thought\n</think>\n\n<answer>second</answer>")


@dataclass(frozen=True)
class _Glue:
    """A piece of conversation with holes: control ids, and runs of text in which `_USER` and `_SYSTEM` mark holes.

    Example: `_Glue((7, "user\\n<hole>", 8, "\\n", 7, "assistant\\n"))`
    """

    parts: tuple[int | str, ...]

    @classmethod
    def parse(cls, text: str, controls: dict[str, int]) -> _Glue:
        """Cut `text` at the control tokens it contains, the longest first."""
        if not controls:
            return cls((text,) if text else ())
        pattern = "|".join(re.escape(control) for control in sorted(controls, key=len, reverse=True))
        pieces = re.split(f"({pattern})", text)
        return cls(tuple(controls.get(piece, piece) for piece in pieces if piece))


class TurnTokenizer:
    """See the module docstring. Built by `from_directory`."""

    def __init__(
        self, tokenizer_json: str, *, opening: str, between: str, extra_stops: tuple[str, ...], system_prompt: str
    ) -> None:
        """`opening` and `between` are literal conversations with holes: `opening` up to the first answer, `between` from
        the stop token after an answer up to the next answer."""
        specification = json.loads(tokenizer_json)
        self._full = Tokenizer.from_str(tokenizer_json)
        self.control_ids = {token["content"]: token["id"] for token in specification["added_tokens"]}
        self._control_set = frozenset(self.control_ids.values())
        self._plain = _plain_backend(specification, self.control_ids)
        self._specification = specification
        self._system_prompt = system_prompt
        self._opening = _Glue.parse(opening, self.control_ids)
        self._between = _Glue.parse(between, self.control_ids)
        if not self._between.parts or not isinstance(self._between.parts[0], int):
            raise ValueError(
                f"the chat template must end an answer with one of the tokenizer's added tokens, got {between[:40]!r}; "
                f"use chat_template='chatml' or add the token to tokenizer.json"
            )
        self.end_of_turn_id: int = self._between.parts[0]
        extra = (self.control_ids[name] for name in extra_stops if name in self.control_ids)
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys((self.end_of_turn_id, *extra)))
        glued = (*self._opening.parts, *self._between.parts, *self.stop_token_ids)
        self._structural = frozenset(part for part in glued if isinstance(part, int))
        self.vocab_size: int = 1 + max(self._full.get_vocab(with_added_tokens=True).values())
        self.num_system_tokens = self._count_system_tokens()

    @classmethod
    def from_directory(
        cls, directory: str | Path, *, chat_template: str = "chatml", system_prompt: str = ""
    ) -> TurnTokenizer:
        """From a Hugging Face directory. `chat_template`: `chatml`, `model`, or a path to a Jinja file.

        Raises ValueError for a missing tokenizer.json, missing control tokens, or a template that cannot be appended to.
        """
        try:
            return cls._read(Path(directory), chat_template, system_prompt)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:  # of types that no such file has
            raise ValueError(
                f"{directory}: tokenizer or chat template (chat_template = {chat_template!r}) cannot be understood "
                f"({type(error).__name__}: {error}); save the tokenizer again with save_pretrained, or mend the template"
            ) from error

    @classmethod
    def _read(cls, directory: Path, chat_template: str, system_prompt: str) -> TurnTokenizer:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"no tokenizer.json in {directory}; save the tokenizer there with save_pretrained")
        tokenizer_json = _checked_tokenizer(path)
        config = _read_json(directory / "tokenizer_config.json")
        source = _template_source(directory, config, chat_template)
        if chat_template == "chatml":
            known = {token["content"] for token in json.loads(tokenizer_json)["added_tokens"]}
            missing = {"<|im_start|>", "<|im_end|>"} - known
            if missing:
                raise ValueError(
                    f"chat_template 'chatml' needs the added tokens {sorted(missing)}, which {path} lacks; "
                    f"use chat_template='model'"
                )
        opening, between = _derive_glue(source, config, has_system=bool(system_prompt))
        stops = ("<|endoftext|>", _token_text(config.get("eos_token")))
        return cls(tokenizer_json, opening=opening, between=between, extra_stops=stops, system_prompt=system_prompt)

    def prompt(self, observation: str) -> list[int]:
        """Ids of system prompt, first observation and the header of the first answer."""
        return self._fill(self._opening.parts, observation)

    def bridge(self, finish_reason: str, observation: str, *, last_id: int | None = None) -> list[int]:
        """Ids between an answer and the next one. The end-of-turn id is added, unsampled, where the answer lacks it:
        `finish_reason` is not `stop`, or `last_id`, the last sampled id, is another stop id."""
        is_ended = finish_reason == "stop" and last_id in (None, self.end_of_turn_id)
        return self._fill(self._between.parts[1 if is_ended else 0 :], observation)

    def answer(self, text: str) -> list[int]:
        """Ids of a recorded answer, end-of-turn id included. Its text never becomes a control id."""
        return [*self.encode_plain(text), self.end_of_turn_id]

    def recorded_answer(self, text: str, token_ids: list[int]) -> list[int]:
        """Ids of a recorded answer that came with the recorder's own ids. Those are used where they are this tokenizer's
        spelling of `text` and hold no turn structure of their own; else the text is encoded like any other."""
        body = token_ids[:-1] if token_ids and token_ids[-1] in self.stop_token_ids else token_ids
        is_known = all(0 <= token < self.vocab_size for token in body)
        if body and is_known and not self._structural.intersection(body) and self.decode(body) == text:
            return [*body, self.end_of_turn_id]
        return self.answer(text)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of text that is not ours; never a control id."""
        ids = self._plain.encode(text, add_special_tokens=False).ids
        assert self._control_set.isdisjoint(ids), "the plain backend produced a control id"
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of all `ids`, control tokens spelled out."""
        return self._full.decode(ids, skip_special_tokens=False)

    def answer_text(self, ids: list[int]) -> str:
        """The text of sampled `ids` without the stop token."""
        return self.decode(ids[:-1] if ids and ids[-1] in self.stop_token_ids else ids)

    def fingerprint(self) -> str:
        """sha256 over vocabulary, merges and added tokens: equal fingerprints, equal meaning of every id."""
        canonical = json.dumps(list(self._identity().values()), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _identity(self) -> dict[str, object]:
        model = self._specification["model"]
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", [])]
        return {"vocabulary": model["vocab"], "merges": merges, "added tokens": self.control_ids}

    def _fill(self, parts: tuple[int | str, ...], observation: str) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self.encode_plain(_fill_text(part, observation, self._system_prompt))
        return ids

    def _count_system_tokens(self) -> int:
        """Ids before the control token that opens the first user turn."""
        parts = self._opening.parts
        hole = next(i for i, part in enumerate(parts) if isinstance(part, str) and _USER in part)
        opener = max((i for i in range(hole) if isinstance(parts[i], int)), default=0)
        return len(self._fill(parts[:opener], ""))


def check_same_tokenizer(left: TurnTokenizer, right: TurnTokenizer) -> None:
    """Raises ValueError naming the first id or merge on which student and teacher differ."""
    if left.fingerprint() == right.fingerprint():
        return
    ours, theirs = left._identity(), right._identity()
    differing = [name for name in ours if ours[name] != theirs[name]]
    name = differing[0]
    if name == "merges":
        pairs = enumerate(zip(ours[name], theirs[name], strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(ours[name]), len(theirs[name])))
        example = f"{len(ours[name])} and {len(theirs[name])} merges, the first difference is at merge {at}"
    else:
        keys = sorted(ours[name].keys() | theirs[name].keys())
        key = next(key for key in keys if ours[name].get(key) != theirs[name].get(key))
        example = f"{key!r} is {ours[name].get(key)} in one and {theirs[name].get(key)} in the other"
    raise ValueError(
        f"student and teacher must share one tokenizer, but {' and '.join(differing)} differ: {example}; "
        f"distillation compares ids, so use models with the same tokenizer.json"
    )


def _fill_text(text: str, observation: str, system_prompt: str) -> str:
    """Put the texts in their holes. Each hole is cut out first, so that a text may contain a sentinel."""
    pieces = re.split(f"({_USER}|{_SYSTEM})", text)
    return "".join({_USER: observation, _SYSTEM: system_prompt}.get(piece, piece) for piece in pieces)


def _plain_backend(specification: dict, controls: dict[str, int]) -> Tokenizer:
    """The same tokenizer without added tokens, which therefore cannot spell a control token.

    Raises ValueError where a control token is also the result of ordinary merges, or a byte has no token.
    """
    model = specification["model"]
    if model["type"] != "BPE":
        raise ValueError(f"tokenizer.json holds a {model['type']} model; expected BPE as in Qwen and Llama 3")
    merges = model["merges"]
    merged = {merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge) for merge in merges}
    spelled = sorted(merged & controls.keys())
    if spelled:
        raise ValueError(f"added tokens {spelled} of tokenizer.json are also results of merges: text could forge them")
    vocabulary = {token: index for token, index in model["vocab"].items() if token not in controls}
    missing = sorted(set(ByteLevel.alphabet()) - vocabulary.keys())
    if missing:
        raise ValueError(f"tokenizer.json is not byte-level: {len(missing)} of 256 bytes have no token, e.g. {missing[0]!r}")
    # A template post-processor would put its own control ids around the text.
    plain = specification | {
        "added_tokens": [],
        "post_processor": None,
        "model": model | {"vocab": vocabulary, "unk_token": None},
    }
    return Tokenizer.from_str(json.dumps(plain))


def _read_json(path: Path) -> dict:
    """The object in a JSON file, empty where there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}); save the tokenizer again with save_pretrained") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected an object; save the tokenizer again")
    return found


def _checked_tokenizer(path: Path) -> str:
    """The text of a tokenizer.json that the tokenizers library can load."""
    fix = "save the tokenizer again with save_pretrained"
    if "added_tokens" not in _read_json(path):
        raise ValueError(f"{path} has no added_tokens, expected a tokenizer of the tokenizers library; {fix}")
    text = path.read_text(encoding="utf-8")
    try:
        Tokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path} is no tokenizer ({error}); {fix}") from None
    return text


def _token_text(token: str | dict | None) -> str:
    return (token.get("content", "") if isinstance(token, dict) else token) or ""


def _template_source(directory: Path, config: dict, chat_template: str) -> str:
    if chat_template == "chatml":
        return CHATML
    if chat_template != "model":
        path = Path(chat_template)
        if not path.is_file():
            raise ValueError(f"chat_template {chat_template!r} is neither 'chatml', 'model' nor a file")
        return path.read_text(encoding="utf-8")
    beside = directory / "chat_template.jinja"
    source = beside.read_text(encoding="utf-8") if beside.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    if not source:
        raise ValueError(f"{directory} has no chat template; use chat_template='chatml' or give a file")
    return source


def _derive_glue(source: str, config: dict, *, has_system: bool) -> tuple[str, str]:
    """What a template puts before the first answer and between two answers, with sentinels for the holes."""
    render = _renderer(source, config)
    system = [{"role": "system", "content": _SYSTEM}] if has_system else []
    user = {"role": "user", "content": _USER}
    messages = [*system, user]
    opening = rendered = render(messages)
    if rendered.count(_USER) != 1 or rendered.count(_SYSTEM) != int(has_system):
        raise ValueError(f"the chat template must show each message once, it renders {rendered!r}")
    betweens = []
    for answer in (*_ANSWERS, _ANSWERS[0]):
        messages = [*messages, {"role": "assistant", "content": answer}, user]
        longer = render(messages)
        if not longer.startswith(rendered + answer):
            raise ValueError(
                "the chat template does not extend its own output: history would have to be tokenised again and no "
                "longer be what was sampled. Use chat_template='chatml' or a template that only appends.\n"
                f"  before, with the answer: {rendered + answer!r}\n  one turn later:          {longer!r}"
            )
        betweens.append(longer[len(rendered + answer) :])
        rendered = longer
    if len(set(betweens)) != 1 or betweens[0].count(_USER) != 1:
        raise ValueError(f"the chat template joins turns in more than one way: {sorted(set(betweens))}")
    return opening, betweens[0]


def _renderer(source: str, config: dict):
    """`render(messages) -> str` with the generation prompt, in a sandbox."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    names = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error}") from error

    def render(messages: list[dict[str, str]]) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=True, **names)
        except TemplateError as error:
            raise ValueError(f"the chat template failed on a plain conversation: {error}") from error

    return render
