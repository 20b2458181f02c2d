"""UTF-8 text with NUL bytes and UTF-16 are distinguished, for random texts of many scripts."""

import random

import pytest

from slm_jax.data.sources.sniffing import HEAD_SIZE, describe_binary

ALPHABETS = {
    "English": "etaoinshrdlucmfwypvbgkjxqz" * 3 + "ETAOINSHRDLU.,'\"0123456789",
    "French": "esaitnrulodcmpévqfbghjàxèyêzçôùâûîœ.,’«»",
    "Vietnamese": "nhtgicaàáảãạăằắẳẵặâầấẩẫậeèéẻẽẹêềếểễệđoòóỏõọơờớởỡợ.,",
    "Russian": "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё.,—",
    "Greek": "αοιετσνηυρπκμλωδγχθφβξζψάέήίόύώ.,·",
    "Hebrew": "אבגדהוזחטיכלמנסעפצקרשתםןץףך.,־",
    "Arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهويىة،.؟",
    "Hindi": "कखगघचछजझटठडढणतथदधनपफबभमयरलवशषसहािीुूेैोौंः्।",
    "Thai": "กขคงจชซญดตถทนบปผพฟมยรลวสหอะาิีึืุูเแโใไ่้",
    "Chinese": "的一是不了人我在有他这中大来上个国到说们为子和你地出道也时年得就，。",
    "Japanese": "のにはをたがでとしてれさあるいかもこりアイスントルリラク日本人大年一国　、。",
    "Korean": "이다는을의에가고하지로서한은기를도사인자시리어나대그보정수아해있전부상일들주장",
}


def random_text(rng, alphabet, length):
    """Words of random characters, in lines."""
    text = "".join(rng.choice(alphabet) for _ in range(length))
    words = [text[i : i + 6] for i in range(0, length, 6)]
    return "".join(word + rng.choice("    \n") for word in words)


def with_nuls(rng, data, every):
    """The lines of a text with NUL bytes at exactly, or about, regular distances of at least three bytes."""
    size = len(data)
    places = range(every - 1, size, every) if rng.random() < 0.5 else sorted(rng.sample(range(size), size // every))
    text = bytearray()
    last = 0
    for place in places:
        while place < size and data[place] & 0xC0 == 0x80:  # within a character
            place += 1
        text += data[last:place] + b"\0"
        last = place
    return bytes(text + data[last:])


@pytest.mark.parametrize("language", ALPHABETS)
def test_random_texts_are_recognized(language):
    rng = random.Random(language)
    for length in [*[60, 100, 300, 1000] * 8, HEAD_SIZE]:
        text = random_text(rng, ALPHABETS[language], length)
        assert describe_binary(text.encode()) is None
        for every in (3, 4, 6, 20, 1000):
            head = with_nuls(rng, text.encode(), every)[:HEAD_SIZE]
            assert describe_binary(head) is None, (every, head[:200])
        for order in ("LE", "BE"):
            head = text.encode(f"utf-16-{order}")[:HEAD_SIZE]
            name, remedy = describe_binary(head) or ("text", "")
            assert name == "UTF-16 without a byte order mark", (order, text[:100])
            assert f"iconv -f UTF-16{order} " in remedy, text[:100]


def test_latin_1_text_with_nul_bytes_is_not_called_utf_16():
    """Read as UTF-16 it is mostly Chinese, which iconv would make of it."""
    rng = random.Random(0)
    words = "café était fermé cause fête élève très déçu église où allés ça".split()
    for _ in range(50):
        head = "\0".join(rng.choices(words, k=40)).encode("latin-1")
        name, _ = describe_binary(head) or ("text", "")
        assert name.startswith("binary data")
