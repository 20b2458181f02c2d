"""Load the data of a run that has been prepared: its tokenizer and its corpus."""

from pathlib import Path

from slm_jax.data.corpus.corpus import CHAT_FORMAT, open_corpus, read_manifest
from slm_jax.data.corpus.stream import TokenStream
from slm_jax.data.turns import boundary_ids, stream_pieces
from slm_jax.run.directory import Run
from slm_jax.utils import tokenizer_loading
from slm_jax.utils.errors import UserError
from slm_jax.utils.text_tokenizer import TextTokenizer
from tokenizer import HybridTokenizer, TokenizerError

_PROMPT_DOCUMENTS = 50  # documents that `example_prompt` tries
_PROMPT_TOKENS = 50  # tokens of each
_PROMPT_CHARACTERS = 32  # of a prompt, at most
_DEFAULT_PROMPT = "The"
_DEFAULT_QUESTION = "Hello"


def load_tokenizer(name: str) -> TextTokenizer:
    """Load a tokenizer.

    Args:
        name: The path of a saved one or of a `tokenizer.json`, or the name of one that comes with the project.

    Raises:
        UserError: There is none, or it is damaged.
    """
    try:
        return tokenizer_loading.load_tokenizer(name) if Path(name).exists() else HybridTokenizer.pretrained(name)
    except TokenizerError as error:
        raise UserError(f"tokenizer.path: {error}") from None


def example_prompt(run: Run) -> str:
    """Return a prompt to try a run's model with.

    Returns:
        The first two to four words of a held-out document; of instructions, a whole held-out prompt, as the model was
        trained to answer it; of conversations, the first message of a held-out one; "The" if the run has no data, or no
        document begins so.
    """
    try:
        tokenizer = load_tokenizer(str(run.tokenizer))
        stream = open_corpus(run.corpus, tokenizer, verify=False).validation
    except UserError:  # a run may be kept without its text
        return _DEFAULT_PROMPT
    if stream.has_conversations:
        return _shortest_question(stream, tokenizer) or _DEFAULT_QUESTION
    if stream.has_prompts:
        return _shortest_prompt(stream, tokenizer) or _DEFAULT_PROMPT
    ends = stream.ends[:_PROMPT_DOCUMENTS].tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        ids = stream[start : min(end - 1, start + _PROMPT_TOKENS)]  # without the <EOS>
        line = tokenizer.decode(ids.tolist()).strip().partition("\n")[0]
        words = line.split(" ")[:4]
        while len(words) > 2 and len(" ".join(words)) > _PROMPT_CHARACTERS:
            words.pop()
        text = " ".join(words)
        if len(words) > 1 and len(text) <= _PROMPT_CHARACTERS and text.isprintable():
            return text
    return _DEFAULT_PROMPT


def _shortest_prompt(stream: TokenStream, tokenizer: TextTokenizer) -> str:
    """Return the shortest prompt of the first documents, "" if none can be shown on a terminal."""
    documents = stream.shards[0].documents[:_PROMPT_DOCUMENTS]
    ends = documents["end"].tolist()
    prompts = []
    for start, length in zip([0, *ends], documents["prompt"].tolist(), strict=False):
        prompts.append(tokenizer.decode(stream[start : start + length].tolist()))
    return min(filter(_is_showable, prompts), key=len, default="")


def _shortest_question(stream: TokenStream, tokenizer: TextTokenizer) -> str:
    """Return the shortest first message of the user in the first conversations, "" if none can be shown."""
    if not isinstance(tokenizer, HybridTokenizer):  # the texts of another template are not only messages
        return ""
    ends = stream.ends[:_PROMPT_DOCUMENTS].tolist()
    boundaries = boundary_ids(tokenizer)
    questions = []
    for start, end in zip([0, *ends], ends, strict=False):
        texts = stream_pieces(stream, start, end, tokenizer, boundaries)
        first = next((number for number, piece in enumerate(texts) if piece.is_response), 0)
        if first:
            questions.append(texts[first - 1].text)
    return min(filter(_is_showable, questions), key=len, default="")


def _is_showable(text: str) -> bool:
    """Return whether a text can be shown on a terminal."""
    return bool(text.strip()) and all(character.isprintable() or character == "\n" for character in text)


def has_conversations(run: Run) -> bool:
    """Return whether a run was trained on conversations; False if it has no data."""
    try:
        manifest = read_manifest(run.corpus)
        folders = [run.corpus / entry["folder"] for entry in manifest.get("mix", ())] or [run.corpus]
        return any(read_manifest(folder)["format"] == CHAT_FORMAT for folder in folders)
    except UserError:  # a run may be kept without its text
        return False
