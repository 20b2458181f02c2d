"""Small tokenizers of other kinds, made with the package `tokenizers`."""

import json
from pathlib import Path

TEXT = "".join(f"Line {i}: the quick fox sees {i * 7 % 13} dogs, naïve café, שלום עולם 🙂\n" for i in range(300))
EOS = "<|endoftext|>"
TURN = "<|im_end|>"
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def byte_level(folder: Path, bos: bool = False, vocab_size: int = 400) -> Path:
    """Write a byte-level BPE tokenizer as Qwen2 has it, or with a token before each text as Llama 3 does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([EOS, "<|im_start|>", TURN, "<|begin|>"])
    tokenizer.add_tokens(["<tool>"])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if bos else "Qwen2Tokenizer",
        "eos_token": EOS,
        "pad_token": EOS,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    if bos:
        config["bos_token"] = {"__type": "AddedToken", "content": "<|begin|>", "special": True}
        begin = tokenizer.token_to_id("<|begin|>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    turn = tokenizer.token_to_id(TURN)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [turn, tokenizer.token_to_id(EOS)]}))
    return folder / "tokenizer.json"


def byte_fallback(folder: Path) -> Path:
    """Write a BPE tokenizer with bytes for unknown characters, as SentencePiece models become (Llama 2, Mistral)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator([TEXT[:2000]], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def metaspace(folder: Path) -> Path:
    """Write a Unigram tokenizer with the normalization and the decoder of SentencePiece (T5, later Llama files)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, show_progress=False, special_tokens=["<unk>", "</s>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator([TEXT[:5000]], trainer)
    return _write_with_eos(tokenizer, folder, "</s>")


def word_piece(folder: Path) -> Path:
    """Write a tokenizer with parts of words after "##" (BERT)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, show_progress=False, special_tokens=["[UNK]", "[SEP]"])
    tokenizer.train_from_iterator([TEXT[:5000]], trainer)
    return _write_with_eos(tokenizer, folder, "[SEP]")


def _write_with_eos(tokenizer, folder: Path, eos: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder / "tokenizer.json"
