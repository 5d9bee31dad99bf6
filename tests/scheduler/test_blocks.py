"""The pool: three states of a block, least recently used first out, and loud refusal of what must not happen."""

from __future__ import annotations

import pytest

from quire.scheduler.blocks import BlockPool


def cached(pool: BlockPool, keys: list[bytes]) -> list[int]:
    """A table whose blocks are full, registered and given back."""
    blocks = [pool.take() for _ in keys]
    for block, key in zip(blocks, keys, strict=True):
        pool.register(block, key)
    pool.release_all(blocks)
    return blocks


def test_blocks_are_numbered_from_one_and_the_null_block_is_never_given() -> None:
    pool = BlockPool(3)
    assert sorted(pool.take() for _ in range(3)) == [1, 2, 3]
    with pytest.raises(AssertionError, match="nothing free"):
        pool.take()


def test_the_oldest_table_is_evicted_first_and_from_its_tail() -> None:
    pool = BlockPool(4)
    old, young = cached(pool, [b"a0", b"a1"]), cached(pool, [b"b0", b"b1"])
    assert [pool.take() for _ in range(4)] == [old[1], old[0], young[1], young[0]]
    assert all(pool.find(key) is None for key in (b"a0", b"a1", b"b0", b"b1"))
    pool.check()


def test_a_hit_makes_a_block_the_last_to_go() -> None:
    pool = BlockPool(3)
    first, second, third = (cached(pool, [key])[0] for key in (b"1", b"2", b"3"))
    pool.share(first)
    pool.release(first)
    assert [pool.take() for _ in range(3)] == [second, third, first]


def test_empty_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(2)
    (kept,) = cached(pool, [b"k"])
    assert pool.take() != kept
    assert pool.find(b"k") == kept


def test_a_block_released_too_often_is_an_error() -> None:
    pool = BlockPool(1)
    block = pool.take()
    pool.release(block)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(block)


def test_a_second_block_of_equal_content_stays_without_a_key() -> None:
    pool = BlockPool(2)
    first, second = pool.take(), pool.take()
    pool.register(first, b"same")
    pool.register(second, b"same")
    pool.release_all([first, second])
    assert (pool.num_cached, pool.find(b"same")) == (1, first)
    pool.check()


def test_forgetting_empties_cached_blocks_and_leaves_held_ones_to_their_holders() -> None:
    pool = BlockPool(3)
    cached(pool, [b"gone"])
    held = pool.take()
    pool.register(held, b"held")
    pool.forget()
    assert (pool.num_cached, pool.num_held, pool.find(b"held"), pool.find(b"gone")) == (0, 1, None, None)
    pool.release(held)
    assert pool.num_free == 3
    pool.check()
