"""A tokenizer of our own: byte pairs merged within words (Sennrich et al. 2016, arXiv 1508.07909).

A text is lower-cased and split into words and signs; a word is its UTF-8 bytes, of which merges,
learned from the training captions, join frequent neighbours. Any text has tokens, and the whole
vocabulary is the list of merges. It is called like the tokenizers of transformers.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

BYTES = 256
SPECIALS = ("<pad>", "<start>", "<end>")
_WORDS = re.compile(r"\w+|[^\w\s]")
_END_OF_WORD = BYTES
"""The symbol after each word's bytes, so that a word and the beginning of another one differ."""
Pair = tuple[int, int]


class Tokenizer:
    """Text to token ids.

    Ids: 0 to 2 are padding, start and end; 3 to 258 the bytes; 259 the end of a word; then one per
    merge, in the order in which they were learned.
    """

    pad_token_id, bos_token_id, eos_token_id = range(len(SPECIALS))

    def __init__(self, merges: Sequence[Pair]) -> None:
        """merges: pairs of symbols (byte, 256 for the end of a word, 257 + place of a merge).

        Raises:
            ValueError: a merge joins symbols that do not exist yet, or is there twice.
        """
        self.merges = tuple((int(a), int(b)) for a, b in merges)
        for place, pair in enumerate(self.merges):
            if not all(0 <= symbol <= BYTES + place for symbol in pair):
                raise ValueError(f"merge {place} joins unknown symbols, got {pair}")
        self._ranks = {pair: place for place, pair in enumerate(self.merges)}
        if len(self._ranks) != len(self.merges):
            raise ValueError("the merges of a tokenizer must be different")
        self._word = functools.lru_cache(maxsize=2**16)(self._merged)

    @classmethod
    def learn(cls, texts: Iterable[str], size: int) -> Tokenizer:
        """Learn merges from texts until there are `size` ids, or no pair occurs twice.

        The most frequent pair is merged first; of equally frequent ones, the smallest.

        Raises:
            ValueError: size is below the number of bytes and special tokens.
        """
        least = len(SPECIALS) + BYTES + 1
        if size < least:
            raise ValueError(f"a tokenizer has at least {least} ids, got {size}")
        counts = Counter(word for text in texts for word in words_of(text))
        return cls(_learned(counts, size - least))

    def __len__(self) -> int:
        """Number of ids."""
        return len(SPECIALS) + BYTES + 1 + len(self.merges)

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        """``{"input_ids": [...]}``; add_special_tokens: with start and end. verbose: ignored."""
        ids = [symbol + len(SPECIALS) for word in words_of(text) for symbol in self._word(word)]
        if add_special_tokens:
            ids = [self.bos_token_id, *ids, self.eos_token_id]
        return {"input_ids": ids}

    def get_vocab(self) -> dict[str, int]:
        """Token as text -> id. A merge is written as its bytes in hexadecimal, "." ends a word."""
        texts = [f"{byte:02x}" for byte in range(BYTES)] + ["."]
        for a, b in self.merges:
            texts.append(texts[a] + texts[b])
        named = {text: number for number, text in enumerate(SPECIALS)}
        for number, text in enumerate(texts, start=len(SPECIALS)):
            named.setdefault(text, number)
        return named

    def _merged(self, word: str) -> tuple[int, ...]:
        symbols = [*word.encode(), _END_OF_WORD]
        while len(symbols) > 1:
            pairs = itertools.pairwise(symbols)
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self.merges)))
            if best not in self._ranks:
                break
            symbols = _join(symbols, best, BYTES + 1 + self._ranks[best])
        return tuple(symbols)


def words_of(text: str) -> list[str]:
    """Lower-cased words and signs of a text in Unicode's form NFKC."""
    return _WORDS.findall(unicodedata.normalize("NFKC", text).lower())


def _learned(counts: Counter[str], limit: int) -> list[Pair]:
    words = [([*word.encode(), _END_OF_WORD], count) for word, count in sorted(counts.items())]
    pairs: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for place, (symbols, count) in enumerate(words):
        _count(symbols, count, place, pairs, places)
    merges: list[Pair] = []
    while len(merges) < limit and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        new = BYTES + 1 + len(merges)
        merges.append(best)
        for place in sorted(places[best]):
            symbols, count = words[place]
            _count(symbols, -count, place, pairs, places)
            words[place] = (_join(symbols, best, new), count)
            _count(words[place][0], count, place, pairs, places)
        del places[best]
        pairs = +pairs
    return merges


def _count(
    symbols: Sequence[int],
    count: int,
    place: int,
    pairs: Counter[Pair],
    places: defaultdict[Pair, set[int]],
) -> None:
    """Add a word's pairs, or with a negative count take them away."""
    for pair in itertools.pairwise(symbols):
        pairs[pair] += count
        if count > 0:
            places[pair].add(place)


def _join(symbols: Sequence[int], pair: Pair, new: int) -> list[int]:
    joined: list[int] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] = new
        else:
            joined.append(symbol)
    return joined
