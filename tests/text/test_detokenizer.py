# ruff: noqa: RUF001
"""Streams of text: whole characters only, and joined exactly what decoding at once gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.text.detokenizer import Detokenizer
from serve.text.tokenizer import Tokenizer

TEXTS = {
    "Arabic": "مرحبا، كيف حالك اليوم؟ اللغة العربية جميلة ﷺ",
    "Bengali": "আপনি কেমন আছেন? আজ আবহাওয়া সুন্দর।",
    "Burmese": "မင်္ဂလာပါ၊ နေကောင်းလား။",
    "Chinese": "你好，今天天气怎么样？快速排序是一种算法。𠮷野家",
    "Czech": "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Danish": "Høj bly gom vandt fræk sexquiz på wc.",
    "Dutch": "Pa's wijze lynx bezag vroom het fikse aquaduct.",
    "English": "The quick brown fox — “jumps” over the lazy dog's back…",
    "Filipino": "Kumusta ka? Magandang umaga sa inyong lahat.",
    "Finnish": "Törkylempijävongahdus, hyvää päivää!",
    "French": "Voix ambiguë d'un cœur qui, au zéphyr, préfère les jattes de kiwis.",
    "German": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Greek": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία.",
    "Hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה.",
    "Hindi": "नमस्ते, आप कैसे हैं? क्षत्रिय ज्ञान।",
    "Hungarian": "Árvíztűrő tükörfúrógép.",
    "Indonesian": "Apa kabar? Selamat pagi semuanya.",
    "Italian": "Ma la volpe, col suo balzo, ha raggiunto il quieto Fido.",
    "Japanese": "いろはにほへと ちりぬるを。カタカナと漢字。が゙",
    "Khmer": "សួស្តី តើអ្នកសុខសប្បាយទេ?",
    "Korean": "안녕하세요? 다람쥐 헌 쳇바퀴에 타고파. 가",
    "Persian": "سلام، حال شما چطور است؟ می‌خواهم",
    "Polish": "Pchnąć w tę łódź jeża lub ośm skrzyń fig.",
    "Portuguese": "À noite, vovô Kowalsky vê o ímã cair no pé do pinguim.",
    "Russian": "Съешь же ещё этих мягких французских булок.",
    "Spanish": "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia.",
    "Thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า น้ำ",
    "Turkish": "Pijamalı hasta yağız şoföre çabucak güvendi. İı",
    "Vietnamese": "Do bạch kim rất quý nên sẽ dùng để lắp vô xương. Nguyễn",
    "emoji": "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇸🇪🇯🇵 🧑🏿‍🚀 ❤️‍🔥 #️⃣ 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "combining": "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢ e\u0301\u0327 \u0915\u094d\u0937 \u1100\u1161\u11a8",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_streamed_text_is_the_decoded_text(qwen: Tokenizer, text: str) -> None:
    token_ids = qwen.encode_markup(f"<|im_start|>{text}<|im_end|>")
    detokenizer = Detokenizer(qwen.token_bytes)
    pieces = [detokenizer.feed([token_id]) for token_id in token_ids]
    assert "\ufffd" not in "".join(pieces)
    assert detokenizer.flush() == ""
    assert "".join(pieces) == qwen.decode(token_ids)


def test_our_decoding_is_that_of_the_tokenizers_library(qwen: Tokenizer, qwen_folder) -> None:
    from tokenizers import Tokenizer as Reference

    reference = Reference.from_file(str(qwen_folder / "tokenizer.json"))
    for text in TEXTS.values():
        token_ids = qwen.encode_markup(f"<|im_start|>{text}<tool_call>")
        assert qwen.decode(token_ids) == reference.decode(token_ids, skip_special_tokens=True)


def test_there_are_29_languages() -> None:
    assert len(TEXTS) - 2 == 29


@settings(deadline=None)
@given(data=st.data())
def test_any_token_ids_stream_as_they_decode(small: Tokenizer, data: st.DataObject) -> None:
    ids = st.integers(0, small.num_real_tokens - 1)
    deltas = data.draw(st.lists(st.lists(ids, max_size=3), max_size=12))
    detokenizer = Detokenizer(small.token_bytes)
    pieces = [detokenizer.feed(delta) for delta in deltas]
    joined = "".join(pieces) + detokenizer.flush()
    assert joined == small.decode([token_id for delta in deltas for token_id in delta])


def test_an_unfinished_character_waits_and_is_replaced_at_the_end(small: Tokenizer) -> None:
    first, second, third = small.encode("\u20ac")  # three bytes, no merge in this vocabulary
    detokenizer = Detokenizer(small.token_bytes)
    assert [detokenizer.feed([token_id]) for token_id in (first, second, third)] == ["", "", "€"]
    assert detokenizer.feed([first]) == ""
    assert detokenizer.flush() == "\ufffd"
