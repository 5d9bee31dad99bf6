"""From logits to tokens: one function per step, in the order that `sampler.py` states.

This room knows rows of logits and what each row's request asked for. It knows no scheduler, no cache, no tokenizer
file and no random state: a draw is a pure function of (logits of the row, parameters of the row, seed, position).
"""

from quire.sampling.processors import bad_word_ids
from quire.sampling.rows import SampledRow, SamplingRow
from quire.sampling.sampler import sample, score, top_candidates

__all__ = ["SampledRow", "SamplingRow", "bad_word_ids", "sample", "score", "top_candidates"]
