"""Unigram and bigram models of token streams: what quire-tiny's loss is held against.

The bigram model is interpolated with a lower order by Kneser-Ney's absolute discounting, the strongest simple bigram;
both are counted on all training tokens. Knows token ids only, no model and no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

DISCOUNT = 0.75


class Bigram:
    """Counts of one training stream, and the bits per token that they give to another."""

    def __init__(self, tokens: Sequence[int], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.single = Counter(tokens)
        self.total = len(tokens)
        self.pairs = Counter(pairwise(tokens))
        self.before = Counter(tokens[:-1])
        self.followers = Counter(left for left, _ in self.pairs)
        self.preceding = Counter(right for _, right in self.pairs)

    def unigram(self, token: int) -> float:
        """Add-one smoothed frequency."""
        return (self.single[token] + 1) / (self.total + self.vocabulary)

    def continuation(self, token: int) -> float:
        """In how many contexts a token was seen, add-one smoothed: Kneser-Ney's lower order."""
        return (self.preceding[token] + 1) / (len(self.pairs) + self.vocabulary)

    def probability(self, left: int, token: int) -> float:
        count = self.before[left]
        if not count:
            return self.continuation(token)
        kept = max(self.pairs[left, token] - DISCOUNT, 0.0) / count
        return kept + DISCOUNT * self.followers[left] / count * self.continuation(token)

    def unigram_bits(self, tokens: Sequence[int]) -> float:
        """Bits per token, the first one excepted."""
        return sum(-math.log2(self.unigram(token)) for token in tokens[1:]) / (len(tokens) - 1)

    def bigram_bits(self, tokens: Sequence[int]) -> float:
        pairs = pairwise(tokens)
        return sum(-math.log2(self.probability(left, token)) for left, token in pairs) / (len(tokens) - 1)
