"""Files of a tokenizer: in a run or another folder of this project, and in the Hugging Face layout."""

from pathlib import Path

HYBRID_FILE = "tokenizer.hybtok"
FOREIGN_FILE = "tokenizer.foreign.zip"
FOREIGN_JSON = "tokenizer.json"
TOKENIZER_FILES = (
    FOREIGN_JSON,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Files of a tokenizer in the Hugging Face layout."""


def tokenizer_file(folder: Path) -> Path:
    """Return the file of the tokenizer in a folder, and the name of the project's own where there is none."""
    foreign = folder / FOREIGN_FILE
    return foreign if foreign.is_file() else folder / HYBRID_FILE
