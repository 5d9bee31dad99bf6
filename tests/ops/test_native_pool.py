"""The kernels' threads: callers at the same time, forks, and another number of threads, all with the same result."""

from __future__ import annotations

import os
import threading

import torch

from quire.ops import cpu
from quire.ops.weights import DenseWeight
from tests.ops.shapes import threads

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(512, 256, generator=GENERATOR)
X = torch.randn(40, 256, generator=GENERATOR)


def test_callers_at_the_same_time() -> None:
    packed = cpu.pack(DenseWeight(WEIGHT))
    expected, wrong = cpu.packed_linear(X, packed), []

    def ask() -> None:
        for _ in range(200):
            if not torch.equal(cpu.packed_linear(X, packed), expected):
                wrong.append(threading.current_thread().name)

    with threads(2):
        callers = [threading.Thread(target=ask) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
            assert not caller.is_alive()
    assert not wrong


def test_a_forked_child_computes() -> None:
    """The child has none of the threads, and must not wait for them."""
    packed = cpu.pack(DenseWeight(WEIGHT))
    with threads(2):
        expected = cpu.packed_linear(X, packed)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(cpu.packed_linear(X, packed), expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(cpu.packed_linear(X, packed), expected)


def test_the_number_of_threads_may_change() -> None:
    packed = cpu.pack(DenseWeight(WEIGHT))
    results = []
    for count in (1, 2, 3, 1, 4, 2):
        with threads(count):
            results.append(cpu.packed_linear(X, packed))
    assert all(torch.equal(result, results[0]) for result in results)
