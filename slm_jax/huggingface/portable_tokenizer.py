"""The tokenizer files of a portable run, which need no code of this project; they are compared with the run's own."""

import importlib.util
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_jax.chat.template import ChatTemplate
from slm_jax.huggingface.chat_files import CHAT_TEMPLATE, add_chat, verify_chat
from slm_jax.utils.errors import UserError
from slm_jax.utils.extras import install_command
from tokenizer import HybridTokenizer
from tokenizer.vocabulary import FIRST_LEARNED

logger = logging.getLogger(__name__)

TOKENIZER_JSON = "tokenizer.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_RANDOM_TEXTS = 2000
_TEXTS = (
    "The quick brown fox doesn't JUMP; it's 12,345.67 metres away!\n\n  - Where?\r\n\tHere.",
    "def f(x):\n    if x:\n\t\treturn {'a': [1, 2]}\r\n\n\n    # HTTPServer getValue XML2Json\n",
    "כָּל בְּנֵי הָאָדָם נוֹלְדוּ בְּנֵי חוֹרִין. يولد جميع الناس أحرارًا، ۱۲۳۴",
    "Все люди рождаются свободными. Όλοι οι άνθρωποι γεννιούνται ελεύθεροι. Բոլոր մարդիկ ծնվում են ազատ։",
    "सभी मनुष्यों को गौरव और अधिकार प्राप्त है। সমস্ত মানুষ স্বাধীনভাবে சகலரும் สุดประเสริฐเลิศคุณค่า",
    "天地玄黄,宇宙洪荒。日月盈昃。いろはにほへと カタカナ、ﾊﾝｶｸ。모든 인간은 자유롭다. ყველა ადამიანი",
    "Tất cả mọi người sinh ra đều được tự do. Ça alors, où êtes-vous? Straße ŁÓDŹ ǅ ﬁ",
    "👩‍👩‍👧‍👦 🇮🇱 ☃️ 🙂🙂🙂 \U0010ffff e\u0301 \u0301\u0301 \ufeff \u00a0\u2003\u2028\u0085 \x00\x1f\x7f",
    "<PAD> <UNK> <CLS> <SEP> <MASK> <EOS> <RES> <SP><NL> <UP>the <0x0A> 'S 'Ll '\u017f \u1c89 \U00010d40",
    "",
    " ",
    "   \n \n\n\t \r\n  x  ",
)


def write_tokenizer(tokenizer: HybridTokenizer, folder: Path, length: int, is_chat: bool = False) -> None:
    """Write the files of a portable tokenizer for transformers; see `write_tokenizer_json` for the comparison.

    Args:
        tokenizer: A portable tokenizer.
        folder: The folder of the export.
        length: Maximum number of tokens of a text.
        is_chat: Whether to write the chat template, for which names of special tokens are recognized in a text.

    Raises:
        UserError: A text has other ids, or is decoded to another text.
    """
    write_tokenizer_json(tokenizer, folder, is_chat)
    names = _special_names(tokenizer)
    settings = {
        **names,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": not is_chat,  # if True, "<EOS>" in a text is five characters
        "model_max_length": length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    if is_chat:
        settings["chat_template"] = ChatTemplate.of(tokenizer).source
        (folder / CHAT_TEMPLATE).write_text(settings["chat_template"], encoding="utf-8")
    for name, content in (("tokenizer_config.json", settings), (SPECIAL_TOKENS_MAP, names)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tokenizer_json(tokenizer: HybridTokenizer, folder: Path, is_chat: bool = False) -> None:
    """Write ``tokenizer.json`` and compare its ids and texts with those of the tokenizer; log whether that was done.

    Args:
        tokenizer: A portable tokenizer.
        folder: The folder of the export.
        is_chat: Whether to write it for a chat template.

    Raises:
        UserError: A text or a conversation has other ids, or a text is decoded to another one.
    """
    path = folder / TOKENIZER_JSON
    tokenizer.save_tokenizer_json(path)
    if is_chat:
        content = add_chat(json.loads(path.read_text(encoding="utf-8")), tokenizer)
        path.write_text(json.dumps(content), encoding="utf-8")
    if importlib.util.find_spec("tokenizers") is None:
        logger.warning(
            "%s was written, but its ids were not compared with those of the run, which needs the package tokenizers: "
            "%s",
            TOKENIZER_JSON,
            install_command("tokenizers"),
        )
        return
    count = verify(tokenizer, path)
    logger.info(
        "%s: ids and decoded texts equal those of the run's tokenizer on %s texts", TOKENIZER_JSON, f"{count:,}"
    )
    if is_chat:
        count = verify_chat(tokenizer, path, _TEXTS)
        logger.info("%s: ids equal those of the run's tokenizer on %s conversations", TOKENIZER_JSON, f"{count:,}")


def _special_names(tokenizer: HybridTokenizer) -> dict[str, Any]:
    """Return the roles of the special tokens in transformers."""
    names: dict[str, Any] = {
        f"{role}_token": f"<{role.upper()}>" for role in ("pad", "unk", "cls", "sep", "mask", "eos")
    }
    turn_tokens = [tokenizer.id2token[id_] for id_ in tokenizer.vocabulary.special_ids if id_ >= FIRST_LEARNED]
    return {**names, "bos_token": "<EOS>", "additional_special_tokens": ["<RES>", "<SP>", "<NL>", *turn_tokens]}


def verify(tokenizer: HybridTokenizer, path: Path) -> int:
    """Compare a ``tokenizer.json`` with the tokenizer that it was made from.

    Args:
        tokenizer: The tokenizer.
        path: The file.

    Returns:
        The number of texts compared: samples of scripts and code, every entry, and random strings.

    Raises:
        UserError: A text has other ids, or is decoded to another text.
    """
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True  # names of special tokens are text, also where a chat template has them
    texts = list(_verification_texts(tokenizer))
    encoded = [encoding.ids for encoding in theirs.encode_batch(texts, add_special_tokens=False)]
    decoded = theirs.decode_batch(encoded)
    for text, ids, own, back in zip(texts, encoded, tokenizer.encode_arrays(texts), decoded, strict=True):
        if ids != own.tolist() or back != text:
            raise UserError(
                f"{path.name} does not match the run's tokenizer: the text {text[:80]!r} has the ids {ids[:20]} there, "
                f"{own.tolist()[:20]} here, and is decoded to {back[:80]!r}; please report this, with the versions of "
                "slm_jax and tokenizers"
            )
    return len(texts)


def _verification_texts(tokenizer: HybridTokenizer) -> Iterator[str]:
    yield from _TEXTS
    entries = [data.decode("utf-8", "replace") for data in tokenizer.token_bytes if data]
    yield from entries
    source = random.Random(1)
    for _ in range(_RANDOM_TEXTS):
        words = source.choices(entries, k=source.randrange(1, 12))
        characters = [chr(source.choice((source.randrange(0xD800), source.randrange(0xE000, 0x110000))))]
        yield "".join(words + characters * source.randrange(2) + source.choices(entries, k=2))
