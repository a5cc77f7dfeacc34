"""TensorFlow's checkpoints, of both versions, read without TensorFlow; TF-slim's names.

A checkpoint is a table of sorted keys, in LevelDB's format (table_format.md in its repository),
whose values are protocol buffers. In version 2 they say where a variable lies in the data files
(tensorflow/core/protobuf/tensor_bundle.proto); in version 1 they are the variables themselves
(tensorflow/core/util/saved_tensor_slice.proto).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.files import open_regular, read_regular
from data.native import native
from irv2.network.forms import layers
from irv2.network.forms.base import State, Weights, WeightsError, in_one_line
from irv2.network.forms.pytorch import check_which

FOOTER = 48  # bytes at the end of a table
FLOAT = 1  # DT_FLOAT
INDEX, LARGEST_INDEX = ".index", 64 << 20  # bytes
SCOPE = "InceptionResnetV2/"
AVERAGE = "/ExponentialMovingAverage"
STACKS = {"repeat": "block35", "repeat_1": "block17", "repeat_2": "block8"}

# ------------------------------------------------------------------------ checksums

POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected
CRC_OF_BYTE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    CRC_OF_BYTE = (CRC_OF_BYTE >> 1) ^ np.where(CRC_OF_BYTE & 1, POLYNOMIAL, 0).astype(np.uint32)


@native
def _crc32c(data: np.ndarray, crc_of_byte: np.ndarray) -> int:
    crc = np.uint32(0xFFFFFFFF)
    for byte in data:
        crc = crc_of_byte[(crc ^ byte) & 0xFF] ^ (crc >> np.uint32(8))
    return crc ^ np.uint32(0xFFFFFFFF)


def _check(data: memoryview | np.ndarray, stored: bytes, what: str) -> None:
    """Raise ValueError unless data match their checksum, masked as LevelDB does (crc32c.h)."""
    crc = int(_crc32c(np.frombuffer(data, np.uint8), CRC_OF_BYTE))
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if masked.to_bytes(4, "little") != bytes(stored):
        raise ValueError(f"{what} does not match its checksum")


# ------------------------------------------------------------------------ protocol buffers


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """A number of variable length, and the place behind it."""
    number = shift = 0
    while True:
        byte = data[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (number, value) of a message's fields: whole numbers, or bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
        else:
            size, place = _varint(data, place) if kind == 2 else ({1: 8, 5: 4}[kind], place)
            value, place = data[place : place + size], place + size
            if len(value) < size:
                raise ValueError("a message is cut off")
        yield key >> 3, value


def _only(data: memoryview, wanted: int, default: int | bytes = b"") -> int | memoryview:
    """The last field of a number."""
    return dict(_fields(data)).get(wanted, default)


# ------------------------------------------------------------------------ tables


def _table(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the (key, value) pairs of a table."""
    place = len(data) - FOOTER
    for _ in range(2):  # the handle of an index of filters, then that of the index
        handle, place = _handle(data, place)
    end = 0
    for _, value in _block(data, handle):
        handle, _ = _handle(value, 0)
        if handle.offset < end:
            raise ValueError("blocks overlap")
        end = handle.offset + handle.size
        yield from _block(data, handle)


class Handle(NamedTuple):
    """Place of a block."""

    offset: int
    size: int


def _handle(data: memoryview, place: int) -> tuple[Handle, int]:
    offset, place = _varint(data, place)
    size, place = _varint(data, place)
    return Handle(offset, size), place


def _block(data: memoryview, handle: Handle) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the pairs of a block, whose keys share beginnings with those before them."""
    end = handle.offset + handle.size
    if data[end] != 0:
        raise ValueError("compressed by snappy, which TensorFlow's own savers do not use")
    _check(data[handle.offset : end + 1], data[end + 1 : end + 5], f"block {handle.offset}")
    block, key, place = data[handle.offset : end], b"", 0
    restarts = int.from_bytes(block[-4:], "little")
    entries = block[: len(block) - 4 * (restarts + 1)]
    while place < len(entries):
        shared, place = _varint(entries, place)
        own, place = _varint(entries, place)
        size, place = _varint(entries, place)
        key = key[:shared] + bytes(entries[place : place + own])
        yield key, entries[place + own : place + own + size]
        place += own + size


# ------------------------------------------------------------------------ checkpoints

Variables = dict[str, np.ndarray]


def prefix(source: str) -> str | None:
    """TensorFlow's name of a checkpoint of version 2, if this is one, or one of its files."""
    name = re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", source)
    return name if Path(name + INDEX).is_file() else None


def read(source: str, which: str | None) -> Weights:
    """Read TF-slim's Inception-ResNet-v2 of a checkpoint; which: as of `weights.read`.

    Raises WeightsError.
    """
    try:
        name = prefix(source)
        variables = _version_1(source) if name is None else _version_2(name)
    except (OSError, LookupError, OverflowError, TypeError, ValueError) as error:
        reason = in_one_line(error)
        raise WeightsError(f"{source}: damaged or not a checkpoint ({reason})") from None
    are_averaged = any(name.endswith(AVERAGE) for name in variables)
    check_which(which, None if are_averaged else "raw", source)
    remarks, metadata = [], {}
    if are_averaged:
        kind = "raw" if which == "raw" else "ema"
        metadata["result"] = json.dumps({"weights": kind})
        words = "raw weights are taken" if kind == "raw" else "moving averages are taken"
        remarks.append(f"{source}: its {words}, not the others beside them")
        if kind == "ema":
            variables |= {
                name.removesuffix(AVERAGE): values
                for name, values in variables.items()
                if name.endswith(AVERAGE)
            }
    try:
        return Weights(_in_timms(variables), metadata, remarks)
    except (KeyError, ValueError) as error:
        reason = f"no {error} in it" if isinstance(error, KeyError) else in_one_line(error)
        raise WeightsError(f"{source}: not TF-slim's Inception-ResNet-v2 ({reason})") from None


def _version_2(name: str) -> Variables:
    """Read the variables of an index and its data files that are float32."""
    pairs = dict(_table(memoryview(read_regular(name + INDEX, LARGEST_INDEX))))
    shards = _only(pairs.pop(b""), 1, 0)
    files: dict[int, np.ndarray] = {}
    variables = {}
    for key, value in pairs.items():
        entry = dict(_fields(value))
        if entry.get(1) != FLOAT:
            continue
        if 7 in entry:
            raise ValueError(f"{key.decode()} is in several parts")
        shard, offset = entry.get(3, 0), entry.get(4, 0)
        if shard not in files:
            path = f"{name}.data-{shard:05d}-of-{shards:05d}"
            files[shard] = _mapped(path)
        content = files[shard][offset : offset + entry.get(5, 0)]
        _check(content, entry.get(6, b""), key.decode())
        variables[key.decode()] = content.view("<f4").reshape(_shape(entry.get(2, b"")))
    return variables


def _mapped(path: str) -> np.ndarray:
    """Map a file's bytes into memory: uint8 [size]. Raises OSError for a pipe or a device, too."""
    with open_regular(path) as file:
        return np.memmap(file, np.uint8, "r")


def _version_1(path: str) -> Variables:
    """Read the float32 variables of a table."""
    pairs = dict(_table(memoryview(_mapped(path))))
    shapes: dict[bytes, tuple[int, ...]] = {}
    for number, tensor in _fields(_only(pairs.pop(b""), 1)):
        entry = dict(_fields(tensor))
        if number == 1 and entry.get(3) == FLOAT:
            shapes[bytes(memoryview(entry[1]))] = _shape(entry.get(2, b""))
    variables = {}
    for value in pairs.values():
        stored = dict(_fields(_only(value, 2)))
        if (name := bytes(memoryview(stored[1]))) in shapes:
            values = np.frombuffer(_only(stored[3], 5), "<f4")
            variables[name.decode()] = values.reshape(shapes[name])
    return variables


def _shape(message: memoryview) -> tuple[int, ...]:
    """Read a TensorShapeProto."""
    return tuple(_only(dim, 1, 0) for number, dim in _fields(message) if number == 2)


# ------------------------------------------------------------------------ TF-slim's names


def _in_timms(variables: Variables) -> State:
    """Give variables timm's names. Raises KeyError for a missing one, ValueError for odd layers."""
    own = {n.removeprefix(SCOPE): v for n, v in variables.items() if n.startswith(SCOPE)}
    if not own:
        raise ValueError(f"no variables of {SCOPE}; Keras' are read from .h5 and .keras")
    convolutions = [n.removesuffix("/weights") for n in own if n.endswith("/weights")]
    state: State = {}
    for name, place in _places(convolutions).items():
        bias = own.get(f"{place}/biases")
        state |= layers.convolution(name, own[f"{place}/weights"], bias)
        if bias is None:
            norm = f"{place}/BatchNorm"
            values = [own[f"{norm}/{key}"] for key in ("beta", "moving_mean", "moving_variance")]
            state |= layers.batch_norm(name, own.get(f"{norm}/gamma"), *values)
    for name, place in {"classif": "Logits/Logits", "aux.classif": "AuxLogits/Logits"}.items():
        if place == "Logits/Logits" or place in convolutions:
            state |= layers.linear(name, own[f"{place}/weights"], own[f"{place}/biases"])
    return state


def _places(convolutions: list[str]) -> dict[str, str]:
    """timm's names of convolutions -> TF-slim's. In a branch, "Conv2d_0a_1x1" comes first."""
    aux = {"aux.conv_1b": "AuxLogits/Conv2d_1b_1x1", "aux.conv_2a": "AuxLogits/Conv2d_2a_5x5"}
    places = {name: place for name, place in aux.items() if place in convolutions}
    for block, branches in layers.layers().by_block():
        stack, _, number = block.partition(".")
        scope = stack.capitalize()
        if number:
            scope += f"/{STACKS[stack]}_{int(number) + 1}"
        for branch, units in enumerate(branches):
            begin = f"{scope}/Branch_{branch}/" if ".branch" in units[0] else f"{scope}_"
            theirs = sorted(name for name in convolutions if name.startswith(begin))
            places |= layers.paired(units, theirs)
        if f"{block}.conv2d" in layers.layers().ends:
            places[f"{block}.conv2d"] = f"{scope}/Conv2d_1x1"
    return places
