"""Our tokenizer beside the library `tokenizers` on the same merges, and beside merges by hand."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdiff.data.scenes import scenes
from fastdiff.models.tokenizer import Tokenizer, _learned, words_of

CAPTIONS = [scene.caption for scene in scenes(200)]
LEARNED = Tokenizer.learn(CAPTIONS, 400)
FIRST = 3
"""Special tokens before the bytes."""


def test_merges_of_the_papers_example() -> None:
    """Sennrich et al. 2016, section 3.2, by hand: frequent pairs first, of equals the smallest."""
    counts = Counter({"low": 5, "lower": 2, "newest": 6, "widest": 3})
    end, e, s, t, l, o, w = 256, *b"estlow"
    es, t_end, lo = 257, 258, 260
    expected = [(e, s), (t, end), (es, t_end), (l, o), (lo, w)]
    assert _learned(counts, 5) == expected
    tokenizer = Tokenizer(expected)
    assert tokenizer("lowest", add_special_tokens=False)["input_ids"] == [261 + 3, 259 + 3]


def test_rare_pairs_are_not_merged() -> None:
    assert Tokenizer.learn(["ab"], 1000).merges == ()
    once_more = Tokenizer.learn(["ab", "ab"], 1000)
    assert len(once_more.merges) == 2  # a b, and its end
    assert len(once_more) == 3 + 256 + 1 + 2


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
@example(text="a red apple, NOTO style")
@example(text="")
@example(text="\x00\u202e\U0001f34e")
@example(text="ﬁne Ⅷ")
def test_words_are_merged_as_by_the_library(text: str) -> None:
    library = pytest.importorskip("tokenizers")

    def letter(symbol: int) -> str:
        return chr(0x4E00 + symbol)

    names = [letter(symbol) for symbol in range(257)]
    for a, b in LEARNED.merges:
        names.append(names[a] + names[b])
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [(names[a], names[b]) for a, b in LEARNED.merges]
    peer = library.models.BPE(vocabulary, merges)
    theirs = []
    for word in words_of(text):
        spelled = "".join(map(letter, [*word.encode(), 256]))
        theirs += [token.id + FIRST for token in peer.tokenize(spelled)]
    assert LEARNED(text, add_special_tokens=False)["input_ids"] == theirs


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_no_word_is_lost(text: str) -> None:
    """The bytes of all tokens are those of the words."""
    texts = [bytes([byte]) for byte in range(256)] + [b" "]
    for a, b in LEARNED.merges:
        texts.append(texts[a] + texts[b])
    ids = LEARNED(text, add_special_tokens=False)["input_ids"]
    spelled = b"".join(texts[number - FIRST] for number in ids)
    assert spelled.decode() == "".join(f"{word} " for word in words_of(text))


def test_captions_take_few_tokens() -> None:
    """Frequent words are one token each, and start and end stand around them."""
    ids = LEARNED("a red circle left of a blue square")["input_ids"]
    assert ids[0] == LEARNED.bos_token_id
    assert ids[-1] == LEARNED.eos_token_id
    assert len(ids) == 8 + 2


def test_the_vocabulary_tells_tokenizers_apart() -> None:
    assert LEARNED.get_vocab()["<pad>"] == 0
    assert LEARNED.get_vocab() == Tokenizer(LEARNED.merges).get_vocab()
    assert LEARNED.get_vocab() != Tokenizer(LEARNED.merges[:-1]).get_vocab()


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ([(97, 257)], "merge 0 joins unknown symbols"),
        ([(97, -1)], "merge 0 joins unknown symbols"),
        ([(97, 98), (97, 98)], "must be different"),
    ],
)
def test_wrong_merges(merges: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer(merges)


def test_a_vocabulary_below_the_bytes() -> None:
    with pytest.raises(ValueError, match="at least 260 ids, got 259"):
        Tokenizer.learn(CAPTIONS, 259)
