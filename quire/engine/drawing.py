"""From a step's logits to tokens: which rows draw, with which history behind them, and how far a draft came true.

A draft is verified by drawing. Each of its rows is drawn from exactly as if the tokens before it were the sequence's own: with
its own seed, position, history and logits. As long as they are, they are - the draw is a function of these and of nothing else
- so what is kept is bit for bit what would have been drawn one token at a time. Knows no blocks and no queues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from quire.engine.progress import Progress
from quire.engine.runner import Result
from quire.sampling.rows import SampledRow, SamplingRow
from quire.sampling.sampler import sample
from quire.scheduler.scheduler import Scheduler


def draw(result: Result, scheduler: Scheduler, progress: Mapping[str, Progress]) -> dict[int, list[SampledRow]]:
    """The next token of each sequence that draws from this step, or, with a draft, the next few. Beams draw nothing here."""
    places: list[int] = []
    rows: list[SamplingRow] = []
    drafts: dict[int, tuple[int, ...]] = {}
    for chunk, place in result.rows.draws:
        for number in chunk.draws:
            sequence = scheduler.sequence(number)
            request = sequence.group.request
            if request.beam is not None:
                continue
            own, drafts[number] = progress[request.request_id], chunk.draft
            for count in range(chunk.drafts + 1):
                places.append(place + count)
                rows.append(sampling_row(own, sequence.index, chunk.draft[:count]))
    if not rows:
        return {}
    logits = result.logits if places == list(range(len(result.logits))) else result.logits[places]
    drawn = iter(sample(logits, rows))
    return {number: good(list(islice(drawn, len(draft) + 1)), draft) for number, draft in drafts.items()}


def sampling_row(progress: Progress, index: int, draft: Sequence[int] = ()) -> SamplingRow:
    """What to draw by for one sample's next token after its own ones and `draft`."""
    request, drawn_by = progress.request, progress.samples[index]
    return SamplingRow(
        params=request.params,
        seed=drawn_by.seed,
        position=len(drawn_by.token_ids) + len(draft),
        prompt_ids=request.prompt_token_ids,
        output_ids=[*drawn_by.token_ids, *draft] if draft else drawn_by.token_ids,
        stop_ids=request.stop_token_ids,
        bad_words=request.bad_words,
    )


def good(rows: list[SampledRow], draft: Sequence[int]) -> list[SampledRow]:
    """The rows up to the first that did not draw the draft's token: all after it stand on a history that never was."""
    for count, (row, token) in enumerate(zip(rows, draft, strict=False), 1):
        if row.corrupted or row.token != token:
            return rows[:count]
    return rows
