"""Single behaviours of the scheduler, each in a situation small enough to read."""

from __future__ import annotations

import itertools

import pytest

from quire.errors import InvalidRequest
from quire.request import BeamSearchParams, EngineRequest, SamplingParams
from quire.scheduler import adapters
from quire.scheduler.blocks import BlockPool
from quire.scheduler.limits import Limits
from quire.scheduler.prefix import root_key
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import Sequence
from quire.scheduler.step import PLACEHOLDER, Step

NUMBERS = itertools.count()


def make(blocks: int = 32, seqs: int = 8, budget: int = 64, **limits: object) -> Scheduler:
    """A scheduler over blocks of 4 tokens."""
    return Scheduler(
        Limits(seqs, budget, max_model_len=256, block_size=4, **limits),
        BlockPool(blocks),
        lambda request: root_key("model", cache_salt=request.cache_salt),
    )


def add(scheduler: Scheduler, prompt: int | list[int], max_tokens: int = 8, **fields: object) -> Sequence:
    """Add a request of `prompt` tokens; a number means as many tokens that no other prompt has."""
    number = next(NUMBERS)
    tokens = [1000 * number + place for place in range(prompt)] if isinstance(prompt, int) else prompt
    sampling = {name: fields.pop(name) for name in ("n", "skip_reading_prefix_cache") if name in fields}
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return scheduler.add(EngineRequest(str(number), tuple(tokens), params, 0.0, **fields))


def run(scheduler: Scheduler, token: int = 7) -> Step:
    """One step, every draw giving `token`."""
    step = scheduler.schedule()
    scheduler.update(step, {number: [token] for chunk in step.chunks for number in chunk.draws})
    return step


def sizes(step: Step) -> dict[int, int]:
    return {chunk.sequence: len(chunk.tokens) for chunk in step.chunks}


def test_a_long_prompt_is_computed_in_chunks_beside_running_sequences() -> None:
    scheduler = make(budget=10)
    short = add(scheduler, 4)
    assert sizes(run(scheduler)) == {short.id: 4}
    long = add(scheduler, 24)
    steps = [run(scheduler) for _ in range(4)]
    assert [sizes(step)[long.id] for step in steps] == [9, 9, 6, 1]
    assert [bool(step.chunks[1].draws) for step in steps] == [False, False, True, True]
    assert all(step.num_tokens <= 10 for step in steps)


def test_the_threshold_leaves_room_for_the_next_prompt() -> None:
    scheduler = make(budget=10, long_prefill_token_threshold=6)
    first, second = add(scheduler, 20), add(scheduler, 20)
    assert sizes(run(scheduler)) == {first.id: 6, second.id: 4}


def test_a_step_that_has_enough_begins_no_further_prompt() -> None:
    scheduler = make(budget=40, enough_tokens=12)
    first, second, third = (add(scheduler, 10).id for _ in range(3))
    assert sizes(run(scheduler)) == {first: 10, second: 10}
    assert sizes(run(scheduler)) == {first: 1, second: 1, third: 10}
    long = add(scheduler, 60)
    # What is begun goes on, and a prompt that a step begins with is not cut.
    assert sizes(run(scheduler)) == {first: 1, second: 1, third: 1, long.id: 37}


def test_a_prompt_that_is_all_cached_still_computes_its_last_token() -> None:
    scheduler = make()
    tokens = list(range(8))
    scheduler.finish(add(scheduler, tokens).id)
    first = add(scheduler, tokens)
    assert sizes(run(scheduler)) == {first.id: 8}
    again = add(scheduler, tokens)
    step = run(scheduler)
    # Two blocks are known, only the first may be used: the last token's logits have to be computed.
    assert sizes(step)[again.id] == 4
    assert (again.num_cached, scheduler.counters.prefix_hits) == (4, 4)


def test_a_prefix_is_shared_already_in_the_step_that_computes_it() -> None:
    scheduler = make()
    first, second = add(scheduler, list(range(9))), add(scheduler, list(range(9)))
    assert sizes(run(scheduler)) == {first.id: 9, second.id: 1}
    assert list(first.blocks[:2]) == list(second.blocks[:2])
    assert first.blocks[2] != second.blocks[2]


@pytest.mark.parametrize("fields", [{"cache_salt": "mine"}, {"skip_reading_prefix_cache": True}])
def test_a_salt_isolates_and_a_request_may_decline_the_cache(fields: dict[str, object]) -> None:
    scheduler = make()
    add(scheduler, list(range(9)))
    run(scheduler)
    other = add(scheduler, list(range(9)), **fields)
    assert sizes(run(scheduler))[other.id] == 9


def test_samples_share_the_prompt_and_copy_the_last_block_when_they_write() -> None:
    scheduler = make()
    first = add(scheduler, 6, n=3)
    step = run(scheduler)
    samples = scheduler.sequences_of(first.group.request.request_id)
    assert step.chunks[0].draws == tuple(sample.id for sample in samples)
    assert len({tuple(sample.blocks) for sample in samples}) == 1
    tail = first.blocks[1]
    step = run(scheduler)
    # Two of three copy; the last one has the original for itself.
    assert [source for source, _ in step.copies] == [tail, tail]
    assert {sample.blocks[1] for sample in samples} == {tail, *(target for _, target in step.copies)}
    assert len({sample.blocks[0] for sample in samples}) == 1
    assert scheduler.pool.num_held == 4
    assert run(scheduler).copies == ()


def test_samples_without_a_place_wait_and_find_the_prompt_again() -> None:
    scheduler = make(seqs=1)
    first = add(scheduler, 9, n=2, max_tokens=1)
    run(scheduler)
    _, second = scheduler.sequences_of(first.group.request.request_id)
    assert (scheduler.num_running, scheduler.num_waiting, second.tokens[-1]) == (1, 1, 7)
    scheduler.finish(first.id)
    assert sizes(run(scheduler)) == {second.id: 2}


def test_a_sample_is_not_let_in_by_the_step_that_draws_its_first_token() -> None:
    scheduler = make(blocks=5, seqs=2, long_prefill_token_threshold=4)
    first, other = add(scheduler, 12, n=2, max_tokens=4), add(scheduler, 8)
    run(scheduler)
    run(scheduler)
    step = run(scheduler)
    # The other gives way, which leaves a seat and blocks, but the sample that has just parted has nothing to compute yet.
    assert (sizes(step), step.preempted) == ({first.id: 4}, (other.id,))
    sample = scheduler.sequences_of(first.group.request.request_id)[1]
    assert sizes(run(scheduler)) == {first.id: 1, sample.id: 1}


def test_who_was_preempted_comes_back_before_who_came_later() -> None:
    scheduler = make(blocks=6)
    first, second = add(scheduler, 8, max_tokens=16), add(scheduler, 12, max_tokens=12)
    run(scheduler)
    third = add(scheduler, 4)
    step = run(scheduler)
    assert step.preempted == (second.id,)
    assert (sizes(step), scheduler.counters.preemptions) == ({first.id: 1}, 1)
    scheduler.finish(first.id)
    step = run(scheduler)
    assert [chunk.sequence for chunk in step.chunks] == [second.id, third.id]
    assert second.tokens[-2:] == [7, 7]


def test_by_priority_the_least_and_latest_gives_way() -> None:
    scheduler = make(seqs=3, policy="priority")
    low, lowest, latest = add(scheduler, 4, priority=1), add(scheduler, 4, priority=2), add(scheduler, 4, priority=2)
    run(scheduler)
    urgent = add(scheduler, 4, priority=0)
    step = run(scheduler)
    assert step.preempted == (latest.id,)
    assert [chunk.sequence for chunk in step.chunks] == [urgent.id, low.id, lowest.id]


def test_by_priority_the_budget_goes_to_the_urgent_first() -> None:
    scheduler = make(budget=2, policy="priority")
    lows = [add(scheduler, 1, priority=1) for _ in range(2)]
    assert set(sizes(run(scheduler))) == {low.id for low in lows}
    urgent = add(scheduler, 2, priority=0)
    step = run(scheduler)
    assert (sizes(step), step.preempted) == ({urgent.id: 2}, ())


def test_first_come_first_served_knows_no_priority() -> None:
    scheduler = make(seqs=1)
    first = add(scheduler, 4, priority=9)
    run(scheduler)
    add(scheduler, 4, priority=0)
    assert set(sizes(run(scheduler))) == {first.id}


def test_a_request_that_can_never_fit_is_refused_with_numbers() -> None:
    scheduler = make(blocks=3)
    with pytest.raises(InvalidRequest, match="13 tokens need 4 KV blocks, there are 3") as caught:
        add(scheduler, 5, max_tokens=8)
    assert caught.value.parameter == "max_tokens"
    assert not scheduler.has_work()
    add(scheduler, 4, max_tokens=8)


def test_a_request_id_in_use_is_refused() -> None:
    scheduler = make()
    request = add(scheduler, 4).group.request
    with pytest.raises(InvalidRequest, match="already in use"):
        scheduler.add(request)


def test_steps_are_planned_before_their_tokens_are_known() -> None:
    scheduler = make()
    sequence = add(scheduler, 3, max_tokens=3)
    steps = [scheduler.schedule() for _ in range(4)]
    assert [step and step.chunks[0].tokens for step in steps[1:]] == [(PLACEHOLDER,), (PLACEHOLDER,), None]
    for token, step in enumerate(steps[:3], 50):
        scheduler.update(step, {sequence.id: [token]})
    assert sequence.tokens[3:] == [50, 51, 52]


def test_a_sequence_whose_last_token_is_in_flight_holds_nobody_up() -> None:
    scheduler = make(blocks=3)
    first, ending = add(scheduler, 3, max_tokens=5), add(scheduler, 7, max_tokens=1)
    step, _ = scheduler.schedule(), scheduler.schedule()
    # The first needs another block; the ending one gives way, although its only token is about to come.
    assert scheduler.schedule().preempted == (ending.id,)
    third = add(scheduler, 2, max_tokens=1)
    assert set(sizes(scheduler.schedule())) == {first.id, third.id}
    assert scheduler.update(step, {first.id: [7], ending.id: [8]}) == [first, ending]
    assert ending.tokens[-1] == 8


@pytest.mark.parametrize("limits", [{"seqs": 2}, {"blocks": 4}], ids=["few seats", "few blocks"])
def test_beams_that_do_not_fit_together_take_turns(limits: dict[str, int]) -> None:
    scheduler = make(**limits)
    only = add(scheduler, 6, max_tokens=4, beam=BeamSearchParams(4, 4))
    request_id, step = only.group.request.request_id, scheduler.schedule()
    assert step.chunks[0].draws == (only.id,)
    beams = scheduler.branch(request_id, [(only.id, token) for token in range(4)])
    offered: list[int] = []
    for _ in range(12):
        step = scheduler.schedule()
        if step is None:
            break
        offered += [number for chunk in step.chunks for number in chunk.draws]
    # Every beam offers exactly once; who has offered and lost its blocks does not come back to offer again.
    assert sorted(offered) == [beam.id for beam in beams]
    children = scheduler.branch(request_id, [(beams[3].id, 1), (beams[0].id, 2)])
    assert [child.tokens[-2:] for child in children] == [[3, 1], [0, 2]]
    scheduler.abort(request_id)
    assert scheduler.pool.num_held == 0


def test_what_was_forgotten_is_not_found_nor_what_stands_on_it() -> None:
    scheduler = make()
    tokens = list(range(9))
    first = add(scheduler, tokens)
    run(scheduler)
    scheduler.forget_prefixes()
    for _ in range(5):
        run(scheduler)
    assert len(first.tokens) > 12
    later = add(scheduler, first.tokens[:13])
    assert sizes(run(scheduler))[later.id] == 13


def test_aborts_in_every_state_return_every_block() -> None:
    scheduler = make(blocks=12, seqs=2, budget=10)
    waiting, running, chunked = (add(scheduler, size, n=2) for size in (4, 4, 20))
    for request in (running, chunked, waiting):
        step = scheduler.schedule()
        scheduler.abort(request.group.request.request_id)
        scheduler.update(step, {number: [7] for chunk in step.chunks for number in chunk.draws})
        scheduler.pool.check()
    scheduler.abort("never heard of")
    assert not scheduler.has_work()
    assert scheduler.pool.num_held == 0


def test_so_many_adapters_at_a_time_and_nobody_waits_for_ever() -> None:
    limits = Limits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64, max_loras=1)
    scheduler = Scheduler(limits, BlockPool(64), lambda request: root_key("model", request.adapter))
    numbers = iter(range(1000))

    def ask(adapter: str, tokens: int = 3) -> Sequence:
        params = SamplingParams(max_tokens=tokens)
        return scheduler.add(EngineRequest(str(next(numbers)), (1, 2, 3), params, 0.0, adapter=adapter))

    def turn() -> set[str]:
        step = scheduler.schedule()
        for sequence in scheduler.update(step, {number: [7] for chunk in step.chunks for number in chunk.draws}):
            if len(sequence.tokens) == sequence.max_length:
                scheduler.finish(sequence.id)
        return {chunk.adapter for chunk in step.chunks}

    ask("a")
    late, base = ask("b"), ask("")
    assert turn() == {"a", ""}  # the base needs no place, and passes
    assert not late.running
    assert base.running
    turns = 0
    while "b" not in turn():
        ask("a")  # comes again and again, and keeps its place
        turns += 1
        assert turns <= adapters.MOST_PASSES + 4
    assert late.num_passed == adapters.MOST_PASSES


def test_priority_takes_an_adapters_place() -> None:
    limits = Limits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64, policy="priority", max_loras=2)
    scheduler = Scheduler(limits, BlockPool(64), lambda request: root_key("model", request.adapter))
    added = [
        scheduler.add(EngineRequest(str(number), (1, 2, 3), SamplingParams(max_tokens=9), 0.0, priority=rank, adapter=name))
        for number, (rank, name) in enumerate([(1, "a"), (5, "b"), (4, "b"), (9, "")])
    ]
    step = scheduler.schedule()
    scheduler.update(step, {chunk.sequence: [7] for chunk in step.chunks})
    urgent = scheduler.add(EngineRequest("u", (4, 5), SamplingParams(max_tokens=3), 0.0, priority=2, adapter="c"))
    step = scheduler.schedule()
    assert set(step.preempted) == {added[1].id, added[2].id}  # all of b, none of the base
    assert {chunk.adapter for chunk in step.chunks} == {"a", "c", ""}
    assert urgent.running
