"""The native library as ctypes sees it: csrc/quire.h in Python. Knows addresses and numbers, no meaning.

A call releases the GIL. Threads follow torch's setting, so that one number rules both.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire import envs
from quire.errors import ConfigError

PATH = Path(__file__).with_name("_native.so")
VERSION = 2
F32, BF16, F16, E4M3, E5M2, I8 = range(6)
TYPES = {
    torch.float32: F32,
    torch.bfloat16: BF16,
    torch.float16: F16,
    torch.float8_e4m3fn: E4M3,
    torch.float8_e5m2: E5M2,
    torch.int8: I8,
}
DENSE, INT8, INT4 = range(3)

_int, _long, _float, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class WeightStruct(ctypes.Structure):
    """`quire_weight`."""

    _fields_ = (
        ("form", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("outputs", _long),
        ("inputs", _long),
        ("group_size", _long),
        ("data", _pointer),
        ("scales", _pointer),
        ("zeros", _pointer),
    )


class LoraPartStruct(ctypes.Structure):
    """`quire_lora_part`."""

    _fields_ = (("a", _pointer), ("b", _pointer), ("rank", _long), ("scale", _float))


class LoraTableStruct(ctypes.Structure):
    """`quire_lora_table`."""

    _fields_ = (("inputs", _long), ("outputs", _long), ("slots", _long), ("parts", _pointer))


# What a call builds anew each time is packed in one go, which takes a fraction of what a ctypes structure does.
_HEADS, _KV = "Pqq", "iqqqPPqqqqP"
HEADS = struct.Struct(_HEADS)  # quire_heads: data, token, head
KV = struct.Struct(_KV)  # quire_kv: type, kv_heads, size, slots, keys, values, k_token, k_head, v_token, v_head, scales
# quire_attention: type, heads, q, out, kv, sequences, starts, lengths, tables, table_stride, block_size, scale, softcap, window
ATTENTION = struct.Struct(f"iq{_HEADS}P{_KV}qPPPqqffq")

_weight = ctypes.POINTER(WeightStruct)
SIGNATURES = {
    "version": (),
    "set_isa": (ctypes.c_char_p,),
    "check_isa": (ctypes.c_char_p,),
    "set_threads": (_int,),
    "pack": (_weight, _pointer, _long),
    "linear": (_weight, _int, _long, _pointer, _long, _pointer, _pointer, _long),
    "linears": (_int, _pointer, _int, _long, _pointer, _long, _pointer, _pointer, _pointer),
    "weight_rows": (_weight, _int, _long, _pointer, _pointer),
    "rms_norm": (_int, _int, _long, _long, _pointer, _long, _pointer, _float, _float, _pointer),
    "layer_norm": (_int, _int, _long, _long, _pointer, _long, _pointer, _pointer, _float, _pointer),
    "activation": (_int, _int, _long, _long, _pointer, _long, _pointer, _long, _pointer),
    "add": (_int, _long, _pointer, _pointer, _pointer),
    "gather_rows": (_long, _pointer, _pointer, _long, _long, _long, _pointer),
    "rope": (_int, _long, _long, _long, _long, _pointer, _long, _long, _pointer, _pointer, _pointer),
    "write_kv": (_pointer, _int, _long, _pointer, _pointer, _pointer),
    "rope_and_write": (_pointer, _int, *[_long] * 3, *[_pointer] * 6),
    "attend": (_pointer,),
    "linears_backward": (_int, _pointer, _int, _int, _long, *[_pointer] * 3, _long),
    "rms_norm_backward": (_int, _int, _long, _long, *[_pointer, _long] * 2, _pointer, _float, _float, _pointer),
    "layer_norm_backward": (_int, _int, _long, _long, *[_pointer, _long] * 2, _pointer, _float, _pointer),
    "activation_backward": (_int, _int, _long, _long, *[_pointer, _long] * 3, _pointer, _pointer),
    "attend_backward": (_pointer,) * 5,
    "lora": (_pointer, _int, _long, _pointer, _long, _pointer, _long, _pointer),
    "loras": (_int, _pointer, _int, _long, _pointer, _long, _pointer, _pointer, _pointer),
    "peaks": (_int, _long, _long, _pointer, _long, _pointer, _pointer),
    "masses": (_int, _long, _long, _pointer, _long, _pointer, _pointer),
    "cross_entropy": (_int, _long, _long, _pointer, _long, *[_pointer] * 4, _long),
    "draw": (_long, _long, _pointer, _long, *[_pointer] * 6),
    "replay": (_pointer, _long),
    "function": (ctypes.c_char_p,),
    "lora_backward": (_pointer, _int, _long, *[_pointer, _long] * 2, *[_pointer] * 4),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The library with its signatures, set to QUIRE_ISA. Raises OSError where it was not built or is of another version."""
    native = ctypes.CDLL(str(PATH))
    for name, arguments in SIGNATURES.items():
        function = getattr(native, f"quire_{name}", None)
        if function is None:
            raise OSError(f"{PATH.name} has no {name}: install Quire again.")
        function.argtypes, function.restype = arguments, _int
    for name in ("isa", "isas", "isa_note"):
        getattr(native, f"quire_{name}").restype = ctypes.c_char_p
    native.quire_packed_bytes.argtypes, native.quire_packed_bytes.restype = (_int, _int, _long, _long), _long
    if native.quire_version() != VERSION:
        raise OSError(f"{PATH.name} is of another version: install Quire again.")
    wanted, known = envs.isa(), native.quire_isas().decode()
    if wanted and native.quire_set_isa(wanted.encode()):
        raise ConfigError(f"QUIRE_ISA must be one of {known.replace(',', ', ')} on this machine, got {wanted!r}.")
    return native


@functools.cache
def available() -> bool:
    try:
        library()
    except OSError:
        return False
    return True


_threads = 0


@functools.cache
def _function(name: str) -> Callable[..., int]:
    return getattr(library(), f"quire_{name}")


def call(name: str, *arguments: object) -> None:
    """Call `quire_<name>` with as many threads as torch has. Arguments that it refuses are our own mistake."""
    global _threads
    count = torch.get_num_threads()
    if count != _threads:
        library().quire_set_threads(count)
        _threads = count
    result = _function(name)(*arguments)
    assert result == 0, f"quire_{name} does not support {arguments}"
    if _writing.tape is not None:
        _writing.tape.write(name, arguments)


class _Writing(threading.local):
    """What this thread's calls are told to."""

    tape: Any = None


_writing = _Writing()


@contextmanager
def written_to(tape: Any) -> Iterator[None]:
    """Every call that this thread makes meanwhile is told to `tape.write`."""
    assert _writing.tape is None
    _writing.tape = tape
    try:
        yield
    finally:
        _writing.tape = None


def live_numbers(values: tuple[int, ...]) -> int | None:
    """The address of `values` where a tape has a place for them."""
    return None if _writing.tape is None else _writing.tape.numbers(values)


@functools.cache
def function_number(name: str) -> int:
    """What a written call of quire_<name> begins with; -1 if it cannot be written."""
    return _function("function")(name.encode())


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def isa() -> str:
    """The instruction set in use."""
    return library().quire_isa().decode()


def isas() -> tuple[str, ...]:
    """Those that this machine can run, best first; the last may be `amx-emulated`, which is for tests."""
    return tuple(library().quire_isas().decode().split(","))


def isa_note() -> str:
    """Why one that the processor has is not among them, or nothing."""
    return library().quire_isa_note().decode()


def right(name: str) -> bool:
    """Whether its products agree with another one's where every order of the sums gives the same. Milliseconds."""
    return library().quire_check_isa(name.encode()) == 0


def set_isa(name: str) -> None:
    """For tests: use another one."""
    assert library().quire_set_isa(name.encode()) == 0, name
