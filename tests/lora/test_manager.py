"""Names, memory and the thread that reads: who is kept, who gives way, what is freed, and that nobody waits for ever."""

from __future__ import annotations

import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from quire.errors import AdapterError, InvalidRequest, NotFound
from quire.lora.manager import MOST_PASSES, AdapterManager, Lease
from quire.lora.serving import ServingSlots
from quire.lora.slots import Slots
from quire.weights.memory import give_back_freed
from tests.conftest import write_model
from tests.lora.making import LINEAR, random_adapter, save_adapter, tiny_model


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def use(manager: AdapterManager, name: str) -> None:
    lease = ask(manager, name)
    until(lambda: lease.settled)
    manager.give_back(lease)


@pytest.fixture
def folders(tiny_llama: Path, tmp_path: Path) -> list[Path]:
    return [save_adapter(tmp_path / f"a{seed}", tiny_llama, seed) for seed in range(5)]


@pytest.fixture
def manager(tiny_llama: Path) -> Iterator[AdapterManager]:
    made = AdapterManager(Slots(tiny_model(tiny_llama)), max_cpu_loras=2, max_rank=16)
    yield made
    made.close()


def ask(manager: AdapterManager, name: str) -> Lease:
    return manager.lease(name, manager.get(name).digest)


def test_the_least_recently_used_gives_way(manager: AdapterManager, folders: list[Path]) -> None:
    for folder in folders[:3]:
        manager.add(folder.name, folder)
    assert manager.names() == ["a0", "a1", "a2"]
    resident = [manager.in_memory(manager.get(name).digest) for name in manager.names()]
    assert resident == [False, True, True]
    manager.give_back(ask(manager, "a1"))  # a2 is now the one that nobody has used for longest
    lease = ask(manager, "a0")
    assert not lease.settled
    until(lambda: lease.settled)
    assert lease.error is None
    assert manager.leased(lease.digest).digest == manager.get("a0").digest
    assert [manager.in_memory(manager.get(name).digest) for name in manager.names()] == [True, True, False]
    manager.give_back(lease)
    manager.give_back(lease)  # again, which must change nothing
    assert manager.num_in_memory == 2
    assert manager.bytes_in_memory == 2 * manager.get("a0").bytes


def test_what_is_used_stays_and_others_wait(manager: AdapterManager, folders: list[Path]) -> None:
    for folder in folders:
        manager.add(folder.name, folder)
    first, second = ask(manager, "a3"), ask(manager, "a4")
    until(lambda: first.settled and second.settled)
    third = ask(manager, "a0")
    time.sleep(0.05)
    assert not third.settled
    again = ask(manager, "a3")  # is in memory and goes on
    assert again.settled
    manager.give_back(first)
    assert not third.settled
    manager.give_back(again)
    until(lambda: third.settled)
    assert manager.in_memory(second.digest)
    assert not manager.in_memory(first.digest)


def test_nobody_waits_for_memory_for_ever(manager: AdapterManager, folders: list[Path]) -> None:
    for folder in folders[:3]:
        manager.add(folder.name, folder)
    held = [ask(manager, "a1"), ask(manager, "a2")]
    late = ask(manager, "a0")
    passed = 0
    while (other := ask(manager, "a1")).settled:
        passed += 1
        assert passed <= MOST_PASSES
    assert passed == MOST_PASSES
    for lease in (held[0], other):
        manager.give_back(lease)
    assert not late.settled  # a1 is held by those that passed; a2 by one
    manager.give_back(held[1])
    until(lambda: late.settled)


def test_replacing_gives_new_content_to_those_who_ask_later(manager: AdapterManager, folders: list[Path]) -> None:
    old = manager.add("one", folders[0])
    with pytest.raises(InvalidRequest, match="already been loaded"):
        manager.add("one", folders[1])
    lease = ask(manager, "one")
    new = manager.add("one", folders[1], replace=True)
    assert old.digest != new.digest
    assert manager.leased(lease.digest).digest == old.digest
    late = manager.lease("one", old.digest)  # was looked up before the change, but the content is still there
    assert late.digest == old.digest
    for held in (lease, late):
        manager.give_back(held)
    assert not manager.in_memory(old.digest)
    after = manager.lease("one", old.digest)
    until(lambda: after.settled)
    assert (after.error, after.digest) == (None, new.digest)


def test_a_folder_that_changes_unseen_is_served_as_it_is(
    manager: AdapterManager, folders: list[Path], tiny_llama: Path
) -> None:
    for folder in folders[:3]:
        manager.add(folder.name, folder)
    old = manager.get("a0")
    save_adapter(folders[0], tiny_llama, 99)
    lease = ask(manager, "a0")
    until(lambda: lease.settled)
    assert lease.error is None
    assert lease.digest == manager.get("a0").digest != old.digest
    shutil.rmtree(folders[1])
    kept = ask(manager, "a2")
    manager.give_back(lease)
    until(lambda: kept.settled)
    manager.give_back(ask(manager, "a0"))
    while manager.in_memory(manager.get("a1").digest):  # until it gives way to others
        manager.give_back(ask(manager, "a2"))
        use(manager, "a0")
    lost = ask(manager, "a1")
    until(lambda: lost.settled)
    assert isinstance(lost.error, AdapterError)
    manager.give_back(lost)


def test_removed_while_waited_for(manager: AdapterManager, folders: list[Path]) -> None:
    for folder in folders[:3]:
        manager.add(folder.name, folder)
    held = [ask(manager, "a1"), ask(manager, "a2")]
    lease = ask(manager, "a0")
    manager.remove("a0")
    manager.give_back(held[0])
    until(lambda: lease.settled)
    assert isinstance(lease.error, NotFound)
    with pytest.raises(NotFound, match="a0"):
        manager.get("a0")
    manager.add("translate", folders[3])
    with pytest.raises(NotFound, match='Did you mean "translate"'):
        manager.remove("translat")


def test_one_content_under_two_names(manager: AdapterManager, folders: list[Path]) -> None:
    first, second = manager.add("one", folders[0]), manager.add("two", folders[0])
    assert first.digest == second.digest
    assert manager.num_in_memory == 1
    manager.remove("one")
    lease = ask(manager, "two")
    assert lease.settled
    manager.give_back(lease)
    manager.remove("two")
    assert manager.num_in_memory == 0


def test_what_was_made_in_memory_stays_there(manager: AdapterManager, folders: list[Path], tiny_llama: Path) -> None:
    adapters = [random_adapter(tiny_llama, seed) for seed in range(10, 14)]
    for number, adapter in enumerate(adapters):
        manager.add(f"made{number}", adapter)
    for folder in folders:
        manager.add(folder.name, folder)
    assert manager.num_in_memory == 4 + 2
    assert all(ask(manager, f"made{number}").settled for number in range(4))
    manager.add("backed", adapters[0], folder=folders[0])
    assert manager.get("backed").digest == manager.get("made0").digest


def test_ranks_names_and_combinations(manager: AdapterManager, folders: list[Path], tiny_llama: Path) -> None:
    with pytest.raises(AdapterError, match="LoRA rank 20 is greater than max_lora_rank 16"):
        manager.add("big", random_adapter(tiny_llama, 1, r=20))
    for name in ("", " ", "a\nb", "x" * 201, 5):
        with pytest.raises(InvalidRequest, match="lora_name"):
            manager.add(name, folders[0])  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        manager.add("none", folders[0].parent)
    manager.add("a", folders[0])
    manager.add("b", folders[1])
    facts = manager.combine("both", {"a": 0.5, "b": -2.0}, "cat")
    assert facts.rank == 8
    a, b, both = (manager.adapter(name) for name in ("a", "b", "both"))
    for name, part in both.parts.items():
        expected = sum(
            weight * one.parts[name].scale * one.parts[name].b.T @ one.parts[name].a for weight, one in ((0.5, a), (-2.0, b))
        )
        torch.testing.assert_close(part.scale * part.b.T @ part.a, expected)


def test_slots_follow_memory(manager: AdapterManager, folders: list[Path]) -> None:
    slots = ServingSlots(manager._slots, manager, 1)
    manager.add("a", folders[0])
    manager.add("b", folders[1])
    leases = [ask(manager, "a"), ask(manager, "b")]
    a, b = (lease.digest for lease in leases)
    assert slots.of({"", a}) == {"": -1, a: 0}
    assert slots.of({b}) == {"": -1, b: 0}
    assert slots.num_used == 1
    for lease in leases:
        manager.give_back(lease)
    manager.remove("b")
    slots.sweep()
    assert slots.num_used == 0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_removing_frees_the_memory(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", hidden_size=256, intermediate_size=2048, num_hidden_layers=4)
    slots = Slots(tiny_model(base))
    manager = AdapterManager(slots, max_cpu_loras=8, max_rank=512)
    serving = ServingSlots(slots, manager, 2)
    watched = []
    for round_ in range(3):
        save_adapter(tmp_path / "large", base, round_, r=256, targets=LINEAR)
        facts = manager.add("large", tmp_path / "large")
        lease = ask(manager, "large")
        serving.of({lease.digest})
        watched.append(weakref.ref(next(iter(manager.leased(lease.digest).parts.values())).a))
        give_back_freed()
        full = resident_bytes()
        manager.remove("large")
        serving.sweep()
        assert watched[-1]() is not None  # a request still uses it
        manager.give_back(lease)
        serving.sweep()
        assert watched[-1]() is None
        assert facts.bytes > 30 << 20
        until(lambda full=full, facts=facts: full - resident_bytes() > 0.8 * facts.bytes)
    assert manager.num_in_memory == manager.bytes_in_memory == serving.num_used == 0
    manager.close()


def test_many_threads(manager: AdapterManager, folders: list[Path], tiny_llama: Path) -> None:
    """Names come, change and go in four threads while a fifth leases; afterwards nothing is held."""
    adapters = [random_adapter(tiny_llama, seed) for seed in range(20, 24)]
    faults: list[BaseException] = []

    def change(number: int) -> None:
        try:
            for turn in range(30):
                source = folders[(number + turn) % 5] if turn % 2 else adapters[number]
                manager.add(f"n{number}", source, replace=True)
                if turn % 7 == 6:
                    manager.remove(f"n{number}")
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=change, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    held: list[Lease] = []
    while any(thread.is_alive() for thread in threads):
        for name in manager.names():
            facts = manager._names.get(name)
            if facts is not None:
                held.append(manager.lease(name, facts.digest))
        for lease in held[:-8]:
            manager.give_back(lease)
        del held[:-8]
        time.sleep(0.001)
    for lease in held:
        manager.give_back(lease)
    assert not faults
    for name in manager.names():
        manager.remove(name)
    until(lambda: not manager._contents)
    assert not manager._queue
    assert not manager._kept
