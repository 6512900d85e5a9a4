"""Conversations: turns in any of the forms that data sets write, as plain text or by a chat template."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mm.errors import ConfigError, DataError
from megatron_mm.ingest.document import Segment, SpecialToken, TextSegment

PLACEHOLDER = re.compile(r"<(image|audio|video)>\n?")
"""What stands in a turn for a medium."""
SPEAKERS = {"human": "User", "user": "User", "gpt": "Assistant", "assistant": "Assistant", "system": "System"}
ROLES = {"human": "user", "gpt": "assistant"}
"""LLaVA's and ShareGPT's names of what chat templates know."""

Turns = Sequence[tuple[str, str]]
"""(role, text) of each turn."""
Render = Callable[[Turns], list[Segment]]
"""What a conversation is written by: text, and special tokens of the tokenizer between it."""


def plainly(turns: Turns) -> list[Segment]:
    """Return a conversation as text: each turn behind the name of its speaker."""
    return [TextSegment("\n".join(f"{SPEAKERS.get(role, role)}: {text.strip()}" for role, text in turns) + "\n")]


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template that lies beside a tokenizer.json, as transformers' `apply_chat_template` renders it."""

    template: str
    """In Jinja's language."""
    special_tokens: tuple[str, ...]
    """What it may write that is one token and no text."""
    named: tuple[tuple[str, str], ...]
    """bos_token and the like, which a template may ask for by name."""

    def __call__(self, turns: Turns) -> list[Segment]:
        """Return a conversation as the template writes it. Raises DataError if it refuses, or a turn forges a token."""
        for _, text in turns:
            if forged := next((token for token in self.special_tokens if token in text), None):
                raise DataError(f"a turn spells {forged}, which stands for the structure of conversations")
        messages = [{"role": ROLES.get(role, role), "content": text.strip()} for role, text in turns]
        try:
            text = _compiled(self.template).render(messages=messages, add_generation_prompt=False, **dict(self.named))
        except Exception as error:  # templates raise what they like of an order of roles that they do not know
            raise DataError(f"the chat template does not take it: {error}") from error
        return list(self._split(text))

    def _split(self, text: str) -> Iterator[Segment]:
        pattern = "|".join(re.escape(token) for token in sorted(self.special_tokens, key=len, reverse=True))
        for number, piece in enumerate(re.split(f"({pattern})", text) if pattern else [text]):
            if piece:
                yield SpecialToken(piece) if number % 2 else TextSegment(piece)

    def fingerprint(self) -> str:
        """Return what differs if conversations may."""
        said = json.dumps([self.template, self.special_tokens, self.named])
        return hashlib.sha256(said.encode()).hexdigest()


@functools.cache
def _compiled(template: str):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)


def load_template(tokenizer: Path) -> ChatTemplate:
    """Return the chat template beside a tokenizer.json: chat_template.jinja, or that in tokenizer_config.json.

    Raises ConfigError if there is none.
    """
    settings_file, template_file = (
        tokenizer.with_name("tokenizer_config.json"),
        tokenizer.with_name("chat_template.jinja"),
    )
    settings = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
    template = template_file.read_text() if template_file.is_file() else settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((one["template"] for one in template if one.get("name") == "default"), None)
    if not isinstance(template, str):
        raise ConfigError(
            f"--conversations template: neither {template_file} is there, nor a chat_template in {settings_file}. Copy "
            "them from the model that the tokenizer belongs to, or write conversations plainly."
        )
    added = json.loads(tokenizer.read_text()).get("added_tokens") or []
    special = tuple(token["content"] for token in added if token.get("special"))
    names = [name for name in ("bos_token", "eos_token", "unk_token", "pad_token") if settings.get(name)]
    named = tuple((name, _content_of(settings[name])) for name in names)
    return ChatTemplate(template, special, named)


def _content_of(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def turns_of(turns: Any) -> list[tuple[str, str]]:
    """Return (role, text) of each turn of a conversation; media are placeholders in it. Raises DataError."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("its conversation is not a list of turns")
    found: list[tuple[str, str]] = []
    for turn in turns:
        if "user" in turn and "assistant" in turn:
            found += [("user", str(turn["user"])), ("assistant", str(turn["assistant"]))]
            continue
        role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if isinstance(content, list):
            content = "".join(_piece(one) for one in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"a turn has {sorted(turn)}, not `from` and `value` or `role` and `content`")
        found.append((role, content))
    return found


def _piece(piece: Any) -> str:
    """Return a piece of a turn as text; a medium as its placeholder."""
    if isinstance(piece, str):
        return piece
    if not isinstance(piece, dict):
        raise DataError(f"a piece of a turn is {type(piece).__name__}, neither text nor an object")
    placeholder = f"<{piece.get('type')}>"
    if PLACEHOLDER.fullmatch(placeholder):
        return placeholder
    text = piece.get("text")
    if not isinstance(text, str):
        raise DataError(f"a piece of a turn has {sorted(piece)}, and neither text nor a type that is a medium")
    return text
