"""Compiled loops over tensors' memory, run on the threads of PyTorch's own OpenMP pool.

A second pool, such as Numba's own threads, would compete with PyTorch's for the cores, which idle
threads do not give up while they wait for the next operation. So a loop is compiled to a C function
and handed to the OpenMP library that PyTorch has loaded. It gets an array of int64: the addresses
and numbers that `run` was given.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic
from torch import Tensor

from data.native import KeptCode

_THREAD_NUMBER = "irv2_thread_number"
_SIGNATURE = types.void(types.CPointer(types.int64))

inlined = numba.njit(nogil=True, error_model="numpy", inline="always")


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Return the OpenMP library that PyTorch calls; None if it has no GNU interface.

    Other packages may have loaded another one, so it is looked up through PyTorch's own library.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        number = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p).value
        library.GOMP_parallel  # noqa: B018 - LLVM's and Intel's libraries have it, too
    except (OSError, AttributeError):  # not Linux, or PyTorch without OpenMP
        return None
    binding.add_symbol(_THREAD_NUMBER, number)
    return library


def available() -> bool:
    """True if loops can run here, on as many threads as are asked for, or shares would be lost."""
    library = _openmp()
    return (
        library is not None
        and not library.omp_get_dynamic()
        and library.omp_get_max_active_levels() > 0
        and library.omp_get_thread_limit() >= torch.get_num_threads()
    )


def compiled(loop: Callable) -> int:
    """Compile a loop, or take it from the user's cache; returns its machine code's address."""
    if _openmp() is None:
        raise RuntimeError("PyTorch's threads were not found: ask available() first")
    options = {"nogil": True, "error_model": "numpy"}
    function = CFunc(loop, (_SIGNATURE.args, _SIGNATURE.return_type), {}, options)
    function._cache = KeptCode(loop, f"native-{_source_hash()}")
    function.compile()
    _kept.append(function)
    return function.address


@functools.cache
def _source_hash() -> str:
    """Hash of this folder's sources, so that each version of them has its own machine code.

    Numba looks only at the file that a loop stands in, not at those of the functions it calls.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(sources).hexdigest()[:16]


_kept: list = []  # machine code lives as long as these do


def run(loop: int, words: Sequence[int | Tensor]) -> None:
    """Run a compiled loop once on each of PyTorch's threads; a tensor stands for its address."""
    values = [word.data_ptr() if isinstance(word, Tensor) else word for word in words]
    arguments = (ctypes.c_int64 * len(values))(*values)
    _openmp().GOMP_parallel(ctypes.c_void_p(loop), arguments, torch.get_num_threads(), 0)


# ------------------------------------------------------------------- what compiled loops may call

_thread_number = types.ExternalFunction(_THREAD_NUMBER, types.int32())
_INT16, _INT32 = ir.IntType(16), ir.IntType(32)


@inlined
def share(count, threads):
    """Return this thread's number, and its own range of `count` things."""
    number = _thread_number()
    return number, count * number // threads, count * (number + 1) // threads


@intrinsic
def elements(_context, _address, _index, kept):
    """Return a pointer to element `index` of the array of type `kept` at an address."""
    kind = kept.instance_type

    def generate(context, builder, _, arguments):
        first = builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(kind)))
        return builder.gep(first, [arguments[1]])

    return types.CPointer(kind)(types.int64, types.int64, kept), generate


@inlined
def float32(address, shape):
    return carray(elements(address, 0, np.float32), shape)


@inlined
def float64(address, shape):
    return carray(elements(address, 0, np.float64), shape)


@intrinsic
def loaded(_context, kept):
    """Convert a number in memory, float32 or bfloat16 (as uint16), to float32."""

    def widen(_, builder, __, arguments):
        upper = builder.shl(builder.zext(arguments[0], _INT32), ir.Constant(_INT32, 16))
        return builder.bitcast(upper, ir.FloatType())

    return types.float32(kept), widen if kept == types.uint16 else lambda _, b, s, given: given[0]


@intrinsic
def stored(_context, _value, kept):
    """Convert float32 for memory: unchanged, or for uint16 the nearest bfloat16 (ties to even)."""

    def narrow(_, builder, __, arguments):
        bits = builder.bitcast(arguments[0], _INT32)
        sixteen = ir.Constant(_INT32, 16)
        odd = builder.and_(builder.lshr(bits, sixteen), ir.Constant(_INT32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(_INT32, 0x7FFF)))
        result = builder.trunc(builder.lshr(rounded, sixteen), _INT16)
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.select(is_nan, ir.Constant(_INT16, 0x7FC0), result)

    kind = kept.instance_type
    return kind(types.float32, kept), narrow if kind == types.uint16 else lambda _, b, s, a: a[0]
