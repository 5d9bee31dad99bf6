"""Writes down the native calls of a computation, so that they can be made again without Python in between.

A computation can be repeated like that if everything it computes is a native call: torch may only make room and look at it in
other ways. Whoever repeats it writes new inputs into the same tensors first. Knows calls and memory, no meaning.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quire.ops.cpu import library

MOST_ARGUMENTS = 12
_aten = torch.ops.aten
# What makes room.
ROOM = frozenset({_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.new_empty_strided})


class _Call(ctypes.Structure):
    """`quire_call`."""

    _fields_ = (("function", ctypes.c_int64), ("arguments", ctypes.c_int64 * MOST_ARGUMENTS))


class Tape:
    """The calls of `compute()`, made once while they are written down. refused: what made that impossible, or None.

    live: tuples that the computation passes on to native calls and that may differ when it is repeated.
    """

    def __init__(self, compute: Callable[[], Tensor], live: Sequence[tuple[int, ...]] = ()) -> None:
        self.refused: str | None = None
        self._live = [(values, (ctypes.c_int64 * len(values))(*values)) for values in live]
        self._kept: list[Any] = []
        self._room: dict[int, list[torch.UntypedStorage]] = {}
        self._calls: list[_Call] = []
        with library.written_to(self), _Watch(self):
            self.result = compute()
        self._array = (_Call * len(self._calls))(*self._calls)
        self.bytes = sum(size * len(storages) for size, storages in self._room.items()) + ctypes.sizeof(self._array)
        self._calls.clear()

    def replay(self, *live: tuple[int, ...]) -> Tensor:
        """Make the calls again, with these numbers for `live`. The result is the same tensor each time."""
        for (_, array), values in zip(self._live, live, strict=True):
            array[:] = values
        library.call("replay", self._array, len(self._array))
        return self.result

    def write(self, name: str, arguments: Sequence[object]) -> None:
        """Called by `library.call`."""
        number = library.function_number(name)
        if number < 0:
            self.refused = self.refused or f"quire_{name}"
            return
        words = [self._word(kind, given) for kind, given in zip(library.SIGNATURES[name], arguments, strict=True)]
        self._calls.append(_Call(number, (ctypes.c_int64 * MOST_ARGUMENTS)(*words)))

    def numbers(self, values: tuple[int, ...]) -> int | None:
        """The address of numbers that may differ when the calls are repeated; None for others."""
        return next((ctypes.addressof(array) for known, array in self._live if known is values), None)

    def _word(self, kind: type, given: Any) -> int:
        if kind is ctypes.c_float:
            return struct.unpack("i", struct.pack("f", given))[0]
        if given is None or isinstance(given, int):
            return given or 0
        if isinstance(given, bytes):
            given = ctypes.create_string_buffer(given, len(given))
        self._kept.append(given)
        return ctypes.addressof(given)

    def room(self, tensor: Tensor) -> Tensor:
        """`tensor`, which has just been made, in memory that stays: of a tensor that is gone by now, where there is one."""
        size = tensor.untyped_storage().nbytes()
        for storage in self._room.setdefault(size, []):
            if _holders(storage) == 1:
                return tensor.set_(storage, 0, tensor.shape, tensor.stride())
        self._room[size].append(tensor.untyped_storage())
        return tensor


class _Watch(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True, torch's default, imports its compiler when the first step is written down: a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in ROOM:
            return self.tape.room(made)
        if not func.is_view:
            self.tape.refused = self.tape.refused or str(func)
        return made


def _holders(storage: torch.UntypedStorage) -> int:
    """How many tensors and storages share this memory, this one included."""
    return torch._C._storage_Use_Count(storage._cdata)
