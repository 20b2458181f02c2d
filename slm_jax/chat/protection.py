"""Contents that contain names of special tokens: encoded as text where a tokenizer would recognize the names.

In contents, the first character of each name is replaced by a stand-in before a template is rendered. What is a name
afterwards was written by the template. This is verified: with contents that have no parts of names, it must write
the same ones. Such a text is encoded by a copy of the tokenizer in which the tokens have other, secret names: the
template's are replaced by these, then the stand-ins by their characters, and the names in contents are ordinary text.
"""

import functools
import json
import re
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from slm_jax.chat.messages import Message
from slm_jax.utils.errors import UserError
from slm_jax.utils.tokenizer_files import FOREIGN_JSON

if TYPE_CHECKING:
    from slm_jax.utils.foreign_tokenizer import ForeignTokenizer

_STAND_INS = tuple(map(chr, range(0xFDD0, 0xFDEE)))
"""Noncharacters of Unicode; those that stand for characters are not in any text at hand."""
_HARMLESS = "\ufdee"
"""Noncharacter in place of characters of which names could be made."""
_FRAME = "\ufdef"
"""Noncharacter around a secret name."""


class Protection:
    """Protects the contents of conversations with one tokenizer and template.

    Attributes:
        named_ids: The ids of tokens that are recognized by name, other than white space.
    """

    def __init__(self, tokenizer: "ForeignTokenizer", source: str):
        """Choose the names to protect.

        Args:
            tokenizer: The tokenizer.
            source: The template. Tokens that it writes are protected in contents even if they do not count as special,
                but not in the assistant's, which may consist of them (``<think>``).
        """
        added = {name: special for name, special in tokenizer.added_tokens.items() if not name.isspace()}
        stops = {tokenizer.id2token.get(id_) for id_ in tokenizer.stop_ids}
        special = [name for name, is_special in added.items() if is_special or name in stops]
        names = list(dict.fromkeys([*special, *(name for name in added if name in source)]))
        self.named_ids = frozenset(tokenizer.token2id[name] for name in added)
        self.tokenizer = tokenizer
        self._source = source
        self._special = _pattern(special)
        self._special_ids = [tokenizer.token2id[name] for name in special]
        characters = {each for name in special for each in name if not (each.isalnum() or each.isspace())}
        self._parts = re.compile("[" + re.escape("".join(sorted(characters))) + "]" if characters else "(?!)")
        self._names = _pattern(names)
        secret = secrets.token_hex(8)
        self._secret_names = {name: f"{_FRAME}{secret}-{number}{_FRAME}" for number, name in enumerate(names)}

    def guard(self, messages: Sequence[Message]) -> "Guard":
        """Return the messages with contents that contain no protected name, and what encodes their text.

        Raises:
            UserError: There are not enough noncharacters.
        """
        contents = "".join(message.content for message in messages)
        marked = []
        stand_ins: dict[str, str] = {}
        free = iter([each for each in _STAND_INS if each not in contents and each not in self._source])

        def interrupt(match: re.Match[str]) -> str:
            first = match[0][0]
            if first not in stand_ins:
                stand_ins[first] = next(free, "")
            if not stand_ins[first] or _FRAME in contents:
                raise UserError("the conversation has names of special tokens and noncharacters: remove either")
            return stand_ins[first] + match[0][1:]

        for role, content in messages:
            pattern = self._pattern_for(role)
            while pattern.search(content):  # a name may contain another one
                content = pattern.sub(interrupt, content)
            marked.append(Message(role, content))
        return Guard(marked, self, {stand_in: first for first, stand_in in stand_ins.items()})

    def harmless(self, messages: Sequence[Message]) -> list[Message] | None:
        """Return the messages without characters of which names could be made; None if they have none."""
        result = [Message(role, self._parts.sub(_HARMLESS, content)) for role, content in messages]
        return None if result == list(messages) else result

    def names_in(self, text: str) -> list[str]:
        """Return the special names in a text, in order."""
        return self._special.findall(text)

    def recognizes(self, ids: np.ndarray, names: Sequence[str]) -> bool:
        """Return whether the special tokens among ids are the named ones."""
        expected = [self.tokenizer.token2id[name] for name in names]
        return ids[np.isin(ids, self._special_ids)].tolist() == expected

    def _pattern_for(self, role: str) -> re.Pattern[str]:
        return self._special if role == "assistant" else self._names

    def rename(self, text: str) -> str:
        """Return a text with secret names in place of the protected ones."""
        return self._names.sub(lambda match: self._secret_names[match[0]], text)

    @functools.cached_property
    def renamed(self) -> "ForeignTokenizer":
        """A copy of the tokenizer in which the protected tokens have their secret names.

        Raises:
            UserError: A name is ordinary text as well, or the copy has other ids.
        """
        content = json.loads(self.tokenizer.files[FOREIGN_JSON])
        pieces = _pieces_of_merges(content["model"].get("merges") or ())
        for name in self._secret_names:
            if name in pieces:
                raise _ordinary_text_error(name)
        for token in content["added_tokens"]:
            token["content"] = self._secret_names.get(token["content"], token["content"])
        model = content["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {self._secret_names.get(name, name): id_ for name, id_ in model["vocab"].items()}
        elif isinstance(model.get("vocab"), list):
            model["vocab"] = [[self._secret_names.get(name, name), score] for name, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._secret_names.get(model["unk_token"], model["unk_token"])
        content["post_processor"] = None  # it only adds tokens at the ends, which templates write themselves
        copy = self.tokenizer.with_json(json.dumps(content).encode())
        for name, secret in self._secret_names.items():
            if copy.token2id.get(secret) != self.tokenizer.token2id[name]:
                raise UserError(f"a text with {name!r} cannot be encoded with this tokenizer: remove it from the text")
            if len(name) == 1 and not copy.decode(copy.encode(name)).strip():  # a letter of a byte: nothing else is
                raise _ordinary_text_error(name)
        return copy


class Guard:
    """The protected contents of one conversation.

    Attributes:
        messages: The messages, with stand-ins in names of special tokens.
    """

    def __init__(self, messages: list[Message], protection: Protection, characters: dict[str, str]):
        self.messages = messages
        self._protection = protection
        self._characters = str.maketrans(characters)
        self._is_renamed = bool(characters)

    def restore(self, text: str) -> str:
        """Return a rendered text without stand-ins, for `encode`; the beginning of a text gives that of the result."""
        if not self._is_renamed:
            return text
        return self._protection.rename(text).translate(self._characters)

    def encode(self, restored: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a restored text, int32 [T], and the characters [start, end) of each, int [T, 2]."""
        tokenizer = self._protection.renamed if self._is_renamed else self._protection.tokenizer
        return tokenizer.encode_with_offsets(restored)

    def rename(self) -> None:
        """Encode with secret names from now on, also if no name is in the contents as it is written."""
        self._is_renamed = True


def _pieces_of_merges(merges: Sequence[str | Sequence[str]]) -> set[str]:
    """Return the names that merges join and make."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return {name for pair in pairs for name in (*pair, "".join(pair))}


def _ordinary_text_error(name: str) -> UserError:
    return UserError(
        f"the special token {name!r} is ordinary text of this tokenizer as well, so a message with it cannot be "
        "encoded as text: remove it from the message, or use a tokenizer whose special tokens have other names"
    )


def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern of any of the names, the longest first; of nothing without names."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")
