"""Drafts in steps: what they may take, what becomes of them, and what they must not leave behind."""

from __future__ import annotations

import itertools

import pytest

from quire.request import BeamSearchParams, EngineRequest, SamplingParams
from quire.scheduler.blocks import BlockPool
from quire.scheduler.limits import Limits
from quire.scheduler.prefix import root_key
from quire.scheduler.scheduler import Scheduler, _Plan
from quire.scheduler.sequence import Sequence
from quire.scheduler.step import Step
from quire.speculation import Speculation

NUMBERS = itertools.count()
REPEATED = [1, 2, 3, 4, 5, 6, 1, 2, 3]  # 4, 5, 6 came after 1, 2, 3; in blocks of four, one token is in the third


def make(blocks: int = 32, seqs: int = 8, budget: int = 64, rows: int = 32, tokens: int = 3) -> Scheduler:
    limits = Limits(seqs, budget, 256, block_size=4, speculation=Speculation(tokens, 2, 4, most_rows=rows))
    return Scheduler(limits, BlockPool(blocks), lambda request: root_key("model"))


def add(scheduler: Scheduler, prompt: list[int], max_tokens: int = 20, **fields: object) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, n=fields.pop("n", 1))
    return scheduler.add(EngineRequest(str(next(NUMBERS)), tuple(prompt), params, 0.0, **fields))


def started(scheduler: Scheduler, prompt: list[int] = REPEATED, **fields: object) -> Sequence:
    """A sequence whose prompt is computed, and whose first token is the prompt's fourth, as it was before."""
    (sequence,) = all_started(scheduler, prompt, **fields)
    return sequence


def all_started(scheduler: Scheduler, *prompts: list[int], **fields: object) -> list[Sequence]:
    sequences = [add(scheduler, prompt, **fields) for prompt in prompts]
    draw(scheduler, scheduler.schedule(), {sequence.id: [sequence.tokens[3]] for sequence in sequences})
    return sequences


def draw(scheduler: Scheduler, step: Step, drawn: dict[int, list[int]]) -> None:
    scheduler.update(step, {number: drawn.get(number, [0]) for chunk in step.chunks for number in chunk.draws})


def drafts(step: Step) -> dict[int, tuple[int, ...]]:
    return {chunk.sequence: chunk.draft for chunk in step.chunks}


def test_a_draft_that_comes_true_is_kept_with_one_token_more() -> None:
    scheduler = make()
    sequence = started(scheduler)
    step = scheduler.schedule()
    (chunk,) = step.chunks
    assert (chunk.start, chunk.tokens, chunk.draft, chunk.draws) == (9, (4, 5, 6, 1), (5, 6, 1), (sequence.id,))
    draw(scheduler, step, {sequence.id: [5, 6, 1, 8]})
    assert sequence.tokens == [*REPEATED, 4, 5, 6, 1, 8]
    assert (sequence.num_computed, len(sequence.blocks)) == (13, 4)
    assert sequence.num_wanted == 1
    assert scheduler.speculated.accepted_at == [1, 1, 1]


@pytest.mark.parametrize(("drawn", "computed", "blocks"), [([7], 10, 3), ([5, 7], 11, 3), ([5, 6, 7], 12, 3)])
def test_what_did_not_come_true_is_rolled_back_with_its_blocks(drawn: list[int], computed: int, blocks: int) -> None:
    scheduler = make()
    sequence = started(scheduler)
    step = scheduler.schedule()
    assert (sequence.num_computed, len(sequence.blocks), scheduler.pool.num_held) == (13, 4, 4)
    draw(scheduler, step, {sequence.id: drawn})
    assert sequence.tokens == [*REPEATED, 4, *drawn]
    assert (sequence.num_computed, len(sequence.blocks), scheduler.pool.num_held) == (computed, blocks, blocks)
    assert scheduler.speculated.accepted == len(drawn) - 1
    (chunk,) = scheduler.schedule().chunks
    assert (chunk.start, chunk.tokens[0]) == (computed, drawn[-1])


def test_a_block_is_findable_only_when_its_tokens_are_verified() -> None:
    scheduler = make()
    sequence = started(scheduler)
    step = scheduler.schedule()  # its draft fills the third block
    assert sequence.num_registered == 2
    draw(scheduler, step, {sequence.id: [5, 7]})
    # The block is full by its count of tokens, 1..3, 4, 5, 7, but 7 itself is not computed: where it will lie, 6 was.
    assert (len(sequence.tokens), sequence.num_registered) == (12, 2)
    draw(scheduler, scheduler.schedule(), {sequence.id: [9]})
    assert sequence.num_registered == 3
    scheduler.finish(sequence.id)
    again = add(scheduler, [*REPEATED, 4, 5, 7, 9])
    scheduler.schedule()
    assert again.num_cached == 12


def test_a_sequence_waits_for_what_becomes_of_its_draft() -> None:
    scheduler = make()
    sequence, other = started(scheduler), add(scheduler, [9, 8])
    step = scheduler.schedule()
    assert drafts(step) == {sequence.id: (5, 6, 1), other.id: ()}
    ahead = scheduler.schedule()
    assert drafts(ahead) == {other.id: ()}
    assert ahead.chunks[0].tokens == (-1,)
    draw(scheduler, step, {sequence.id: [7]})
    draw(scheduler, ahead, {})
    assert sequence.tokens[-1] == 7


def test_a_sequence_that_gives_way_while_its_draft_is_in_flight_takes_its_tokens_and_begins_anew() -> None:
    scheduler = make()
    sequence = started(scheduler)
    step = scheduler.schedule()
    scheduler._preempt(sequence, _Plan(0))
    assert scheduler.pool.num_held == 0
    assert scheduler.schedule() is None  # how many tokens it has, nobody knows yet
    draw(scheduler, step, {sequence.id: [5, 6, 7]})
    assert (sequence.num_computed, sequence.num_wanted) == (0, 13)
    (chunk,) = scheduler.schedule().chunks
    assert chunk.tokens[-3:] == (5, 6, 7)


def test_drafts_share_the_rows_that_a_small_step_has_left() -> None:
    scheduler = make(rows=7)
    first, second, third = all_started(scheduler, REPEATED, list(range(100, 109)), [token + 50 for token in REPEATED])
    # Of four rows the first may have two and the second none that it needs: what it leaves goes to the third.
    assert drafts(scheduler.schedule()) == {first.id: (5, 6), second.id: (), third.id: (55, 56)}


def test_more_is_asked_of_a_draft_in_a_larger_step() -> None:
    prompts = [[token + 50 * number for token in REPEATED] for number in range(16)]
    scheduler = make(blocks=128, seqs=16, budget=256)
    all_started(scheduler, *prompts)
    # Each has two of the 32 rows. At first a token comes true in seven of ten cases, one after it in half of them; beside 16
    # rows that is enough for one token, beside 28 for none.
    assert [len(draft) for draft in drafts(scheduler.schedule()).values()] == [1] * 13 + [0] * 3


def test_a_step_with_a_prompt_or_many_sequences_has_no_drafts() -> None:
    scheduler = make(rows=16)
    sequence = started(scheduler)
    prompt = add(scheduler, list(range(100, 116)))
    assert drafts(scheduler.schedule()) == {sequence.id: (), prompt.id: ()}
    scheduler = make(rows=2)
    all_started(scheduler, REPEATED, [token + 50 for token in REPEATED])
    assert list(drafts(scheduler.schedule()).values()) == [(), ()]


def test_drafts_stay_within_the_budget_and_take_only_free_blocks() -> None:
    scheduler = make()
    sequence = started(scheduler)
    scheduler.limits.max_num_batched_tokens = 3
    assert drafts(scheduler.schedule()) == {sequence.id: (5, 6)}
    scheduler = make(blocks=8)
    sequence, large = all_started(scheduler, REPEATED, list(range(100, 117)), max_tokens=3)
    assert scheduler.pool.num_free == 0
    sequence.max_length = 100  # as far as the blocks go that it has
    step = scheduler.schedule()
    assert (drafts(step), step.preempted) == ({sequence.id: (), large.id: ()}, ())


def test_no_token_is_drafted_beyond_max_tokens() -> None:
    scheduler = make()
    sequence = started(scheduler, max_tokens=3)
    step = scheduler.schedule()
    assert drafts(step) == {sequence.id: (5,)}
    scheduler = make()
    sequence = started(scheduler, max_tokens=2)
    assert drafts(scheduler.schedule()) == {sequence.id: ()}


def test_neither_beams_nor_samples_that_part_have_drafts() -> None:
    scheduler = make()
    beams = add(scheduler, REPEATED, beam=BeamSearchParams(2, 8))
    step = scheduler.schedule()
    (child, _) = scheduler.branch(beams.group.request.request_id, [(beams.id, 4), (beams.id, 5)])
    assert drafts(scheduler.schedule())[child.id] == ()
    scheduler = make()
    first = add(scheduler, [*REPEATED, 4], n=2)
    step = scheduler.schedule()
    samples = [sample.id for sample in scheduler.sequences_of(first.group.request.request_id)]
    assert step.chunks[0].draws == tuple(samples)
    draw(scheduler, step, {number: [5] for number in samples})
    # From then on each is on its own, and drafts for itself, beside the copy of the block that they shared.
    step = scheduler.schedule()
    assert drafts(step) == dict.fromkeys(samples, (6, 1, 2))
    assert len(step.copies) == 1
    draw(scheduler, step, {samples[0]: [6, 1, 2, 3], samples[1]: [7]})
    assert [scheduler.sequence(number).tokens[11:] for number in samples] == [[6, 1, 2, 3], [7]]
    scheduler.pool.check()
