"""Compare a portable tokenizer with other programs: python tests/benchmarks/portable_tokenizer.py [TOKENIZER | FILES]

    python tests/benchmarks/portable_tokenizer.py my.hybtok --texts 1000000     ids and texts, against `tokenizers` and
                                                                                llama.cpp, where they are installed

Requires the package `tokenizers`, or `llama-cpp-python` and `gguf`; names those that are not installed. Without a
tokenizer, one is learned from this project's sources. Exits with status 1 on any difference.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
# This script's own folder would hide the package: it has a file tokenizer.py.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]

from tokenizer import HybridTokenizer  # noqa: E402  # after the path is set
from tokenizer.portable.character_tables import LETTERS, NUMBERS, WHITE_SPACE  # noqa: E402
from tokenizer.portable.tokenizer_json import merge_names, to_tokenizer_json, token_names  # noqa: E402
from tokenizer.vocabulary import FIRST_BYTE  # noqa: E402

Encode = Callable[[list[str]], list[list[int]]]
Decode = Callable[[list[list[int]]], list[str]]
_GROUP = 10_000


def with_tokenizers(own: HybridTokenizer) -> tuple[Encode, Decode]:
    """Return functions of the package `tokenizers`."""
    import tokenizers

    theirs = tokenizers.Tokenizer.from_str(json.dumps(to_tokenizer_json(own._vocabulary)))

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in theirs.encode_batch(texts, add_special_tokens=False)]

    return encode, theirs.decode_batch


def write_vocabulary(own: HybridTokenizer, path: Path) -> None:
    """Write a GGUF file that has a vocabulary and no weights."""
    import gguf

    vocabulary = own.vocabulary
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(token_names(vocabulary))
    control = [gguf.TokenType.CONTROL] * FIRST_BYTE
    writer.add_token_types(control + [gguf.TokenType.NORMAL] * (own.vocab_size - FIRST_BYTE))
    writer.add_token_merges([f"{left} {right}" for left, right in merge_names(vocabulary)])
    writer.add_bos_token_id(own.token2id["<EOS>"])
    writer.add_eos_token_id(own.token2id["<EOS>"])
    writer.add_pad_token_id(own.token2id["<PAD>"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def with_llama_cpp(own: HybridTokenizer, folder: Path) -> tuple[Encode, Decode]:
    """Return functions of llama.cpp, with its own pre-tokenization."""
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    path = folder / "vocabulary.gguf"
    write_vocabulary(own, path)
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise SystemExit("llama.cpp cannot load the vocabulary")
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    kept_alive = (silence, model)
    room = ctypes.create_string_buffer(256)
    pieces = []
    for token in range(own.vocab_size):
        size = llama_cpp.llama_token_to_piece(vocabulary, token, room, len(room), 0, False)
        pieces.append(room.raw[:size])

    def encode(texts: list[str]) -> list[list[int]]:
        rows = []
        for text in texts:
            data = text.encode()
            room = (llama_cpp.llama_token * (len(data) + 1))()
            count = llama_cpp.llama_tokenize(vocabulary, data, len(data), room, len(room), False, False)
            assert count >= 0, kept_alive
            rows.append(room[:count])
        return rows

    def decode(rows: list[list[int]]) -> list[str]:
        # As its programs print tokens. `llama_detokenize` would remove spaces before punctuation ("clean_spaces").
        return [b"".join(pieces[token] for token in row).decode() for row in rows]

    return encode, decode


def random_texts(own: HybridTokenizer, count: int, seed: int) -> Iterator[str]:
    """Yield strings of random entries and characters, without surrogates."""
    source = random.Random(seed)
    entries = [text for text in own._vocabulary.texts if text]
    entries += [" ", " ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "'\u017f", "123", "...", "\u00a0", "\u0085"] * 10
    for _ in range(count):
        parts = source.choices(entries, k=source.randrange(1, 10))
        if source.random() < 0.5:
            parts.insert(0, chr(source.choice((source.randrange(0xD800), source.randrange(0xE000, 0x110000)))))
        source.shuffle(parts)
        yield "".join(parts)


def character_texts() -> Iterator[str]:
    """Yield every character in contexts that show its class, 64 characters at a time."""
    codes = [code for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(codes), 64):
        yield "".join(f"a{chr(c)}b {chr(c)}{chr(c)}1.{chr(c)}\n {chr(c)}" for c in codes[start : start + 64])


def compare(name: str, own: HybridTokenizer, encode: Encode, decode: Decode, texts: Iterator[str]) -> int:
    """Print and return the number of texts with other ids or another decoded text."""
    count = wrong = 0
    group: list[str] = []

    def check() -> None:
        nonlocal count, wrong
        rows = encode(group)
        for text, ids, expected, back in zip(group, rows, own.encode_arrays(group), decode(rows), strict=True):
            if ids != expected.tolist() or back != text:
                wrong += 1
                if wrong <= 5:
                    print(f"  {text[:80]!r}: {ids[:20]}, here {expected.tolist()[:20]}; decoded alike: {back == text}")
        count += len(group)
        group.clear()

    start = time.process_time()
    for text in texts:
        group.append(text)
        if len(group) == _GROUP:
            check()
    check()
    print(f"{name}: {count:,} texts, {wrong:,} differ ({time.process_time() - start:.0f} s)", flush=True)
    return wrong


def main() -> None:
    """Run the comparison.

    Raises:
        SystemExit: Nothing can be compared, or there are differences (status 1).
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", nargs="?", help="a portable tokenizer (default: learn one from these sources)")
    parser.add_argument("--texts", type=int, default=10_000, help="random texts (default: 10,000)")
    parser.add_argument("--files", nargs="*", default=[], help="UTF-8 text files to compare on as well, by paragraphs")
    options = parser.parse_args()
    if options.tokenizer:
        own = HybridTokenizer.load(options.tokenizer)
    else:
        own = HybridTokenizer(portable=True)
        own.add_files([str(ROOT / "tokenizer/**/*.py"), str(ROOT / "tests/test_tokenizer/*.py")])
        own.freeze_vocab(vocab_size=4096)
    ranges = sum(len(table.split()) for table in (LETTERS, NUMBERS, WHITE_SPACE))
    print(f"{own}, {ranges} ranges of characters")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        backends = {}
        if importlib.util.find_spec("tokenizers"):
            backends["tokenizers"] = with_tokenizers(own)
        if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
            backends["llama.cpp"] = with_llama_cpp(own, Path(folder))
        for name in {"tokenizers", "llama.cpp"} - backends.keys():
            print(f"{name}: not installed, not compared")
        if not backends:
            raise SystemExit("pip install tokenizers, or llama-cpp-python and gguf")
        for name, (encode, decode) in backends.items():
            for path in options.files:
                paragraphs = Path(path).read_bytes().decode("utf-8").split("\n\n")
                wrong += compare(f"{name}, {Path(path).name}", own, encode, decode, iter(paragraphs))
            wrong += compare(f"{name}, every character", own, encode, decode, character_texts())
            wrong += compare(f"{name}, random", own, encode, decode, random_texts(own, options.texts, 1))
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
