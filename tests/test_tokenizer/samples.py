"""Text for the tokenizer tests: a generated corpus, hand-picked edge cases and hypothesis strategies."""

import functools
import random

from hypothesis import strategies as st

LANGUAGES = {
    "english": "The quick brown fox jumps over the lazy dog. It's 3.14159, isn't it? HELLO World, McDonald iPhone.",
    "german": "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg. STRASSE Straße ẞ.",
    "french": "Dès Noël où un zéphyr haï me vêt de glaçons würmiens, je dîne d’exquis rôtis. ÇA VA?",
    "spanish": "¿Qué tal, señor? El pingüino Wenceslao hizo kilómetros. ¡OLÉ!",
    "polish": "Zażółć gęślą jaźń. ŻÓŁĆ Łódź.",
    "turkish": "Pijamalı hasta yağız şoföre çabucak güvendi. İstanbul IĞDIR ışık İİ ıı.",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ΌΣΟΣ Όσος ς Σ.",
    "russian": "Съешь же ещё этих мягких французских булок, да выпей чаю. ПРАВДА Правда.",
    "ukrainian": "Жебракують філософи при ґанку церкви в Гадячі, ще й шатро їхнє п'яне знаємо.",
    "hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא לו חברה.",
    "hebrew_niqqud": "בְּרֵאשִׁית בָּרָא אֱלֹהִים אֵת הַשָּׁמַיִם וְאֵת הָאָרֶץ",
    "arabic": "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر، ومغلف بجلد أزرق؟",
    "persian": "همهٔ افراد بشر آزاد زاده می‌شوند و از لحاظ حیثیت و کرامت و حقوق با هم برابرند.",
    "hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "bengali": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "tamil": "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "chinese": "天地玄黄,宇宙洪荒。日月盈昃,辰宿列张。寒来暑往,秋收冬藏。",
    "japanese": "いろはにほへと ちりぬるを 我が世誰ぞ 常ならむ。カタカナ、ﾊﾝｶｸ。",
    "korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "georgian": "ყველა ადამიანი იბადება თავისუფალი და თანასწორი. ᲧᲕᲔᲚᲐ",
    "armenian": "Բոլոր մարդիկ ծնվում են ազատ ու հավասար։ ԵՎ և",
    "cherokee": "Ꮒꭶꮣ ꭰꮒᏼꮻ ꭴꮎꮥꮕ ꭴꮎꮪꮣꮄꮕ",
    "vietnamese": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
    "code": "def f(x):\n    if x:\n\t\treturn {'a': [1, 2]}\r\n\n\n    # HTTPServer getValue XML2Json\n",
    "emoji": "👩‍👩‍👧‍👦 🇮🇱 ☃️ 🙂🙂🙂 \U0010ffff",
}

EDGE_CASES = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n ",
    "\n \n",
    "a \nb",
    "a\n b",
    "a  b   c    d",
    "\r\n\r\n",
    "\t \t\n\t",
    "\u00a0\u2003\u2028",
    "<PAD> <UNK> <EOS> <SP><NL> <UP>the <CAPS>the",
    "<0x0A> byte_12 _x <0xE2>",
    "the The THE tHE thE",
    "\x00\x00 \x00a\x00 \x01\x02\x0e\x0f\x7f",
    "\ud800 \udfff \ud83d\ude00 a\udc80b",
    "\ufeffBOM",
    "e\u0301 \u0301\u0301",
    "ß ẞ ŉ ǰ ΐ ﬁ Ǆ ǅ ǆ İ ı K Å",
    "a" * 100,
    "A" * 100,
    " " * 100,
    "\n" * 100,
    "/".join(["path"] * 30),
    "中" * 100,
    "!?" * 50,
]


@functools.cache
def corpus() -> str:
    """Return about 60 kB of varied text, the same in every process."""
    source = random.Random(7)
    words = [word for text in LANGUAGES.values() for word in text.split()]
    common = "the of and to in a is that it was for on are with as his they at be this from have or by one had not"
    parts = []
    for _ in range(6000):
        word = source.choice(common.split()) if source.random() < 0.6 else source.choice(words)
        style = source.random()
        if style < 0.03:
            word = word.upper()
        elif style < 0.15:
            word = word.capitalize()
        parts.append(word + source.choice([" ", " ", " ", " ", ", ", ". ", "\n", "\n\n", "\n    ", "  "]))
    return "".join(parts) + "\n".join(LANGUAGES.values()) * 4


_pieces = st.one_of(
    st.sampled_from(list(LANGUAGES.values())).flatmap(
        lambda text: st.tuples(st.integers(0, len(text)), st.integers(0, 12)).map(
            lambda start_and_length: text[start_and_length[0] : sum(start_and_length)]
        )
    ),
    st.sampled_from(["the", " of", " and", " The", " THE", "\n", " ", "  ", "\n\n", "    ", "\t", "\r\n", ", ", ". "]),
    st.sampled_from(EDGE_CASES),
    st.text(max_size=6),
    st.text(st.characters(codec=None, categories=("Cs", "Lu", "Ll", "Zs", "Mn", "Co", "Cc")), max_size=4),
)

any_text = st.one_of(st.text(st.characters(codec=None)), st.lists(_pieces, max_size=24).map("".join))
"""Any str, lone surrogates included, and mixtures of parts of the corpus with edge cases."""
