"""Other tokenizers, where they are installed, trained on the same text for comparison."""

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
# The same pattern in the syntax of Hugging Face tokenizers.
GPT4_PATTERN_HF = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
HUGGING_FACE = "Hugging Face tokenizers"
TIKTOKEN = "tiktoken"
SENTENCEPIECE = "sentencepiece"
_MODULES = {"tokenizers": HUGGING_FACE, "tiktoken": TIKTOKEN, "sentencepiece": SENTENCEPIECE}


@dataclass(frozen=True)
class Baseline:
    """A tokenizer to compare with.

    Attributes:
        name: Its name in the table.
        encode: Text to ids, as anything with a length.
        decode: What `encode` returns, or a list of ids, to text.
    """

    name: str
    encode: Callable[[str], Any]
    decode: Callable[[Any], str]


def installed_libraries() -> list[str]:
    """Return the names of the tokenizer libraries that are installed."""
    return [name for module, name in _MODULES.items() if importlib.util.find_spec(module) is not None]


def train_hugging_face(texts: list[str], vocab_size: int) -> Any:
    """Train a byte-level BPE with the GPT-4 pattern; return a `tokenizers.Tokenizer`."""
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


def hugging_face(tokenizer: Any) -> Baseline:
    """Wrap a trained `tokenizers.Tokenizer`."""
    return Baseline("Hugging Face BPE", lambda text: tokenizer.encode(text).ids, tokenizer.decode)


def tiktoken_from(tokenizer: Any) -> Baseline:
    """Return tiktoken with the merges of a Hugging Face byte-level BPE and its own version of the pattern."""
    import tiktoken

    # The byte-level alphabet of GPT-2: printable bytes stand for themselves, the others for characters from 256 on.
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
    return Baseline("tiktoken", lambda text: encoding.encode_to_numpy(text, disallowed_special=()), encoding.decode)


def train_sentencepiece(texts: list[str], vocab_size: int) -> Baseline:
    """Train a sentencepiece BPE with byte fallback and without normalization.

    Raises:
        RuntimeError: sentencepiece cannot train on this text, for example because it has too many characters.
    """
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
    return Baseline("sentencepiece BPE", processor.encode, processor.decode)
