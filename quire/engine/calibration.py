"""How large keys and values get: observed once at start, on a fixed text, for the scales of a cache of one byte per number.

Fixed before the first request is served, so that a request's bits do not depend on who came first; and the same at every
start, since nothing here is drawn. Why this text, these bounds and this margin: docs/decisions/0008-quantized-kv.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.batch import Batch
from quire.engine.kv import allocate
from quire.models.config import ModelConfig
from quire.models.decoder import CausalLM
from quire.text.tokenizer import Tokenizer

LENGTH = 256
MARGIN = 1.5
BLOCK_SIZE = 16
# Prose, dialogue, code, numbers, markup and other scripts: what a model is asked to read.
TEXT = """\
The morning train left the harbour town at twenty past six, and by the time it reached the plain the fog had lifted from the
fields. "Have you ever been this far north?" asked the woman by the window. He shook his head, folded the newspaper and put it
away. Outside, between two rows of poplars, a river ran beside the line; then came a mill, a church without a tower, and at
last the long grey sheds where, until 1987, ships' engines had been built.

Question: A shop sells pencils in boxes of 12. Mrs. Novak buys 7 boxes, gives 31 pencils away and loses 4. How many are left?
Answer: 7 * 12 = 84 pencils. 84 - 31 - 4 = 49. She has 49 pencils left.

```python
class Stack(Generic[T]):
    def __init__(self, items: Iterable[T] = ()) -> None:
        self._items = list(items)

    def pop(self, default: T | None = None) -> T:
        if not self._items and default is None:
            raise IndexError(f"pop from an empty stack (limit {self.limit!r})")
        return self._items.pop() if self._items else default

for index, (name, value) in enumerate(sorted(table.items()), start=1):
    print(f"{index:>4}  {name:<20} {value / 1e3:8.2f} %")
```

{"id": 40213, "tags": ["new", "sale"], "price": 19.99, "stock": null, "dimensions": {"width": 2.5, "height": 0.75}}
<ul class="menu"><li><a href="https://example.org/about?lang=en&page=2">About us</a></li></ul>
SELECT city, COUNT(*) AS n FROM users WHERE age BETWEEN 18 AND 65 GROUP BY city HAVING n > 10 ORDER BY n DESC LIMIT 5;

# Release notes, version 2.4.1
* Fixed: a crash when the list was empty (#1182).
* Changed: `timeout` is now 30 seconds!!! See section 3.2 ... and §7.

Le lendemain, elle écrivit à sa sœur qu'il ne fallait plus l'attendre avant Noël. Über den Dächern lag Schnee.
Все счастливые семьи похожи друг на друга. 今日はとても良い天気ですね。 这本书是昨天从图书馆借来的。 🙂

E = m c^2, where c = 299,792,458 m/s; the integral of x^2 from 0 to 3 equals 9. AAAAAAAA 0000 ---- ==== \t\t\n\n
"""


def calibration_tokens(tokenizer: Tokenizer, config: ModelConfig) -> list[list[int]]:
    """Sequences of the fixed text, each from a start of its own, as prompts are: the same whatever the limits."""
    text = [token for token in tokenizer.encode(TEXT, add_special_tokens=False) if token < config.vocab_size]
    begin = [] if config.bos_token_id is None else [config.bos_token_id]
    length = max(1, min(LENGTH, config.max_position_embeddings) - len(begin))
    return [begin + text[start : start + length] for start in range(0, len(text), length)]


@torch.inference_mode()
def observed_bounds(
    model: CausalLM, sequences: Sequence[Sequence[int]], dtype: torch.dtype, most_tokens: int = LENGTH
) -> list[Tensor]:
    """For each layer [2, K], float32: the largest magnitude of each head's keys and values in these sequences.

    most_tokens: of one step, for its memory; changes no bit of the result.

    Rotation turns pairs of a key's numbers by angles that grow with the position, and positions go further than this text:
    so of a key the length of a pair counts, which is what either number may become.
    """
    config = model.config
    blocks = max(-(-len(sequence) // BLOCK_SIZE) for sequence in sequences)
    kv = allocate(config, blocks, BLOCK_SIZE, dtype)
    bounds = [torch.zeros(2, config.num_kv_heads) for _ in range(config.num_layers)]
    for sequence in sequences:
        count = len(sequence)
        slots = torch.arange(BLOCK_SIZE, BLOCK_SIZE + count)
        table = torch.arange(1, blocks + 1)[None]
        for start in range(0, count, most_tokens):
            end = min(start + most_tokens, count)
            tokens, positions = torch.tensor(sequence[start:end]), torch.arange(start, end)
            last = torch.tensor([end - start - 1])
            model(Batch(tokens, positions, (0, end - start), (end,), kv, table, slots[start:end], last))
        for layer, rope in enumerate(config.layer_ropes):
            k, v = (cache[layer].flatten(0, 1)[slots].float() for cache in (kv.keys, kv.values))
            if rope is not None:
                half = rope.rotary_dim // 2
                pairs = torch.hypot(k[..., :half], k[..., half : 2 * half])
                k = torch.cat([pairs, k[..., 2 * half :]], dim=-1)
            seen = torch.stack([k.abs().amax((0, 2)), v.abs().amax((0, 2))])
            bounds[layer] = torch.maximum(bounds[layer], seen)
    return bounds


def scales_of(bounds: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What a stored 1 stands for, so that MARGIN times the bound is the type's largest number; 1 where nothing was seen."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    return [torch.where((bound > 0) & bound.isfinite(), bound * MARGIN / largest, 1.0) for bound in bounds]
