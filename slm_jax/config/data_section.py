"""Options of the sections `data` and `tokenizer`: the text, and how it becomes tokens and batches."""

from typing import Literal

from slm_jax.config.option import Section, Strings, option


class DataConfig(Section):
    """Source of the text, and how it becomes batches."""

    source: str = option(
        "python-docs",
        "python-docs, python-qa or python-chat (part of every Python installation), files, a name such as tinystories "
        "(python -m slm_jax.data list), or hf:OWNER/NAME[:CONFIG][:SPLIT].",
        common=True,
    )
    files: Strings = option(
        (), "Text, JSONL or Parquet files, folders or globs ('my/**/*.txt'); implies source = files.", common=True
    )
    mix: Strings = option(
        (), "Several sources or globs with their shares of the batches: 'python-docs=1' 'my/*.txt=3'.", common=True
    )
    separator: str = option(
        "<|endoftext|>", "Text files: a line with only this text ends a document; empty: one document per file."
    )
    document: Literal["file", "line"] = option(
        "file", "Text files: each file (or each part up to a separator) or each line is a document."
    )
    encoding_errors: Literal["strict", "replace"] = option(
        "strict",
        "Bytes that are not UTF-8; strict: reject the text file, skip the row of other files; replace: read them as "
        "U+FFFD.",
    )
    format: Literal["auto", "text", "chat", "messages", "sharegpt", "alpaca", "dolly", "preferences"] = option(
        "auto",
        "JSONL, Parquet, hub: what a row holds. auto: text, or a conversation where there is no column text; chat: a "
        "conversation in one of the formats messages (OpenAI), sharegpt, alpaca and dolly; preferences: a chosen and a "
        "rejected one; text: no conversation.",
    )
    text_field: str = option(
        "", "JSONL, Parquet, hub: the column of the text, or of the conversation; empty: the source's own, or text."
    )
    template: str = option(
        "",
        "JSONL, Parquet, hub: alpaca, or a prompt with {column} placeholders ('{question}\\n'); empty: no prompts.",
    )
    response_field: str = option("", "With template: the column of the response; empty: output.")
    loss_on: Literal["response", "all"] = option(
        "response",
        "Instructions and conversations: predict the tokens of responses only, or those of prompts too.",
    )
    revision: str = option("", "Hub: a commit or branch; empty: the newest one when the text is prepared.")
    max_documents: int = option(0, "Maximum number of training documents per source; 0: no limit.", ge=0)
    max_tokens: int = option(0, "Maximum number of training tokens per source (approximate); 0: no limit.", ge=0)
    deduplicate: bool = option(True, "Drop exact duplicates of a document.")
    validation_fraction: float = option(
        0.05,
        "Fraction of the documents held out for validation, chosen by their hash, where the source has no validation "
        "split.",
        gt=0,
        lt=1,
    )
    max_validation_characters: int = option(
        20_000_000,
        "Maximum number of characters held out per source; later documents are trained on; 0: no limit.",
        ge=0,
    )
    mode: Literal["packed", "segmented", "best-fit", "padded"] = option(
        "packed",
        "packed: windows of full length across documents; segmented: the same, with attention within each document "
        "only; best-fit: whole documents packed into full rows, attention within each; padded: one document per "
        "sequence.",
        common=True,
    )
    cache: str = option(
        "",
        "Folder of prepared text, shared by all runs; empty: slm_jax/data in the user's cache folder.",
        per_host=True,
    )
    workers: int = option(0, "Processes that tokenize; 0: one per core.", per_host=True, ge=0)


class TokenizerConfig(Section):
    """Tokenizer: learned from the training text, or an existing one."""

    path: str = option(
        "",
        "A saved tokenizer, a tokenizer.json, or the name of a pretrained one (english-16k); empty: learn one from the "
        "training text.",
        common=True,
    )
    vocab_size: int = option(2048, "Learned tokenizer: maximum number of token ids.", common=True, ge=300, le=65536)
    portable: bool = option(
        False,
        "Learned tokenizer: segment as a stock tokenizer.json does, so that the export needs no code of its own; then "
        "lowercase, byte_limit and boundaries have no effect.",
    )
    lowercase: bool = option(True, "Learned tokenizer: the, The and THE share one entry (lossless).")
    byte_limit: int = option(4, "Learned tokenizer: longest base token, in UTF-8 bytes.", ge=1, le=16)
    boundaries: Literal["words", "spaces"] = option(
        "words",
        "Learned tokenizer; words: no token joins letters, digits and punctuation; spaces: tokens stop only at white "
        "space (fewer tokens).",
    )
