"""Other tokenizers, where they are installed, behind one small interface, learned from the same text."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The pattern of GPT-4's tokenizer (cl100k_base) as tiktoken ships it, with possessive quantifiers.
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
# The same for the regular expressions of Hugging Face tokenizers.
GPT4_PATTERN_HF = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Rival:
    """A tokenizer to compare with: `encode` gives something with a length, `decode` takes that."""

    name: str
    encode: Callable[[str], Any]
    decode: Callable[[Any], str]


def installed() -> list[str]:
    """Which of the rivals are installed."""
    names = {"tokenizers": "Hugging Face tokenizers", "tiktoken": "tiktoken", "sentencepiece": "sentencepiece"}
    return [name for module, name in names.items() if importlib.util.find_spec(module) is not None]


def train_hugging_face(texts: list[str], vocab_size: int) -> Any:
    """A Hugging Face byte-level BPE with the GPT-4 pattern: `tokenizers.Tokenizer`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(GPT4_PATTERN_HF), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def hugging_face(tokenizer: Any) -> Rival:
    """A trained `tokenizers.Tokenizer` as a rival."""
    return Rival("Hugging Face BPE", lambda text: tokenizer.encode(text).ids, tokenizer.decode)


def tiktoken_of(tokenizer: Any) -> Rival:
    """tiktoken with the merges of a Hugging Face byte-level BPE and its own shipped pattern."""
    import tiktoken

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    byte_of = {chr(value): value for value in printable}
    byte_of.update({chr(256 + index): value for index, value in enumerate(others)})
    ranks = {bytes([value]): value for value in range(256)}
    for pair in json.loads(tokenizer.to_str())["model"]["merges"]:
        left, right = pair if isinstance(pair, list) else pair.split(" ")
        token = bytes(byte_of[letter] for letter in left + right)
        ranks.setdefault(token, len(ranks))
    encoding = tiktoken.Encoding("same merges", pat_str=GPT4_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return Rival("tiktoken", lambda text: encoding.encode_to_numpy(text, disallowed_special=()), encoding.decode)


def train_sentencepiece(texts: list[str], vocab_size: int) -> Rival:
    """A sentencepiece BPE with byte fallback and no normalisation."""
    import sentencepiece

    model = io.BytesIO()
    lines = (line[:4000] for text in texts for line in text.split("\n") if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["\n"],
        input_sentence_size=200_000,
        shuffle_input_sentence=True,
        num_threads=1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return Rival("sentencepiece BPE", processor.encode, processor.decode)
