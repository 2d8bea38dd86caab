"""Streaming detokenising against decoding everything at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdms.text_stream import TextStream
from tests.tiny_tokenizers import byte_level, sentencepiece, smollm2, word_pieces

SAMPLE = "Hello, wörld! 你好 👩‍👩‍👧‍👦 naïve\n\n\tx = 1; 한국어 🇫🇷 ﷽ end. the the thesis"


def full_text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut(text, stops):
    """The text before the stop that is completed first: the definition, in so many words."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


def stream(tokenizer, ids, stops=(), **options):
    """All pieces, with that of finish() as the last, and the stream."""
    text_stream = TextStream(tokenizer, stops, **options)
    pieces = [text_stream.push(token_id) for token_id in ids]
    return [*pieces, text_stream.finish()], text_stream


def check(tokenizer, ids, stops=()):
    pieces, text_stream = stream(tokenizer, ids, stops)
    expected, stopped = cut(full_text(tokenizer, ids), stops)
    assert "".join(pieces) == expected
    assert text_stream.text == expected
    assert text_stream.stopped == stopped


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def random_ids(tokenizer):
    """Ids from the whole vocabulary, special ones too, mixed with those of whole texts."""
    any_id = st.integers(0, len(tokenizer) - 1).map(lambda token_id: [token_id])
    texts = st.one_of(st.text(max_size=8), st.sampled_from(SAMPLE.split(" "))).map(
        lambda text: encoded(tokenizer, text)
    )
    return st.lists(st.one_of(any_id, texts), max_size=24).map(lambda parts: [i for part in parts for i in part])


@st.composite
def ids_and_stops(draw, tokenizer):
    ids = draw(random_ids(tokenizer))
    text = full_text(tokenizer, ids)
    spans = st.tuples(st.integers(0, len(text)), st.integers(1, 6)).map(lambda span: text[span[0] : sum(span)])
    stops = draw(st.lists(st.one_of(spans, spans.map(lambda s: s + "zzz"), st.text(max_size=3)), max_size=4))
    return ids, [stop for stop in stops if stop]


@given(data=st.data())
def test_random_ids_of_the_real_tokenizer(data):
    ids, stops = data.draw(ids_and_stops(smollm2()))
    check(smollm2(), ids, stops)


@given(data=st.data())
def test_random_bytes(data):
    """Every byte is a token here, so most sequences are broken UTF-8."""
    tokenizer = byte_level()
    ids, stops = data.draw(ids_and_stops(tokenizer))
    check(tokenizer, ids, stops)


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_overlapping_stops(text, stops):
    tokenizer = byte_level()
    check(tokenizer, encoded(tokenizer, text), stops)


@given(data=st.data())
def test_random_ids_of_a_sentencepiece_vocabulary(data):
    """Where bytes are no UTF-8, what is valid among them stays; elsewhere the text is the decoded one."""
    tokenizer = sentencepiece()
    ids = data.draw(random_ids(tokenizer))
    pieces, _ = stream(tokenizer, ids)
    tokens = [t for t in tokenizer.convert_ids_to_tokens(ids) if t not in ("<s>", "</s>", "<unk>")]
    spelled = b"".join(
        bytes([int(t[3:5], 16)]) if t.startswith("<0x") else t.replace("▁", " ").encode() for t in tokens
    )
    expected = spelled.decode("utf-8", errors="replace").removeprefix(" ")
    assert "".join(pieces) == expected
    if "\ufffd" not in expected:
        assert expected == full_text(tokenizer, ids)


@pytest.mark.parametrize("make", [smollm2, byte_level, sentencepiece])
def test_pieces_are_whole_characters_and_come_at_once(make):
    tokenizer = make()
    ids = encoded(tokenizer, SAMPLE)
    whole = full_text(tokenizer, ids)
    assert "\ufffd" not in whole
    pieces, _ = stream(tokenizer, ids)
    text, without_text = "", 0
    for piece in pieces[:-1]:
        text += piece
        without_text = 0 if piece else without_text + 1
        assert whole.startswith(text)
        assert without_text < 4, "a character has at most four bytes, a token at least one"
    assert text == whole


def test_an_unfinished_character_comes_out_at_the_end():
    tokenizer = byte_level()
    ids = encoded(tokenizer, "a👩")
    pieces, _ = stream(tokenizer, ids[:-1])
    assert pieces == ["a", "", "", "", "\ufffd"]


def test_a_stop_over_two_tokens():
    tokenizer = smollm2()
    ids = encoded(tokenizer, "The capital of France is Paris. It lies on the Seine.")
    text = full_text(tokenizer, ids)
    first = len(full_text(tokenizer, ids[:3]))
    stop = text[first - 2 : first + 2]
    pieces, text_stream = stream(tokenizer, ids, [stop])
    assert text_stream.stopped
    assert "".join(pieces) == text[: text.index(stop)]
    assert text_stream.push(ids[0]) == ""


def test_what_was_held_back_for_a_stop_is_not_lost():
    tokenizer = smollm2()
    ids = encoded(tokenizer, "The capital of France is Paris")
    text = full_text(tokenizer, ids)
    for stops in ([text[-1] + "zzz"], [text[-5:] + "zzz", "qq"]):
        pieces, text_stream = stream(tokenizer, ids, stops)
        assert not text_stream.stopped
        assert "".join(pieces[:-1]) == text[: -len(stops[0]) + 3]
        assert "".join(pieces) == text


def test_the_end_inside_a_half_match():
    tokenizer = smollm2()
    ids = encoded(tokenizer, "one two three four")
    text = full_text(tokenizer, ids)
    for count in range(1, len(ids)):
        pieces, text_stream = stream(tokenizer, ids[:count], [text[2:]])
        assert not text_stream.stopped
        assert "".join(pieces) == full_text(tokenizer, ids[:count])


@pytest.mark.parametrize("stops", [["is", "is Paris"], ["is Paris", "is"]])
def test_of_a_stop_and_its_beginning_the_shorter_ends_the_text(stops):
    tokenizer = smollm2()
    check(tokenizer, encoded(tokenizer, "The capital of France is Paris."), stops)
    assert stream(tokenizer, encoded(tokenizer, "It is Paris."), stops)[1].text == "It "


def test_a_stop_among_the_flushed_text():
    tokenizer = byte_level()
    ids = encoded(tokenizer, "ab👩")[:-1]
    check(tokenizer, ids, ["b\ufffd"])


def test_stops_before_min_tokens_do_not_count():
    tokenizer = byte_level()
    ids = encoded(tokenizer, "xaxaxa")
    assert stream(tokenizer, ids, "xa", min_tokens=4)[1].text == "xa"
    assert stream(tokenizer, ids, "xa", min_tokens=5)[1].text == "xaxa"
    assert stream(tokenizer, ids, "xa", min_tokens=7)[1].text == "xaxaxa"
    assert stream(tokenizer, encoded(tokenizer, "xxx"), "xx", min_tokens=3)[1].text == "x"


def test_special_tokens_give_no_text():
    tokenizer = smollm2()
    ids = [1, *encoded(tokenizer, "hi"), 2, 2, *encoded(tokenizer, " there"), 0]
    assert "".join(stream(tokenizer, ids)[0]) == "hi there"


@pytest.mark.parametrize("make", [sentencepiece, word_pieces])
def test_the_first_space_is_kept_after_a_prompt(make):
    tokenizer = make()
    whole = encoded(tokenizer, "hello world hello" if make is sentencepiece else "the cat plays the cat")
    for split in range(1, len(whole)):
        prompt, ids = whole[:split], whole[split:]
        pieces, _ = stream(tokenizer, ids, prompt_ids=prompt)
        assert full_text(tokenizer, prompt) + "".join(pieces) == full_text(tokenizer, whole)
        assert "".join(stream(tokenizer, ids)[0]) == full_text(tokenizer, ids)
    first = stream(tokenizer, whole, prompt_ids=[1, 1])[0]
    assert "".join(first) == full_text(tokenizer, whole), "special tokens are no text"


@pytest.mark.parametrize("make", [smollm2, byte_level, sentencepiece])
def test_no_text_is_ever_decoded_again(make, monkeypatch):
    tokenizer = make()
    ids = encoded(tokenizer, SAMPLE)
    expected = full_text(tokenizer, ids)
    monkeypatch.setattr(type(tokenizer), "decode", None)
    assert "".join(stream(tokenizer, ids)[0]) == expected


def test_other_vocabularies_decode_only_a_short_window(monkeypatch):
    tokenizer = word_pieces()
    decoded = []
    real = type(tokenizer).decode

    def counting(self, ids, **options):
        decoded.append(len(ids))
        return real(self, ids, **options)

    monkeypatch.setattr(type(tokenizer), "decode", counting)
    ids = encoded(tokenizer, "the cat plays playing.") * 20
    text = "".join(stream(tokenizer, ids)[0])
    assert sum(decoded) < 6 * len(ids)
    assert text == real(tokenizer, ids)
