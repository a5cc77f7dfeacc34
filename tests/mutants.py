"""A sound file's content -> what accidents and strangers make of it, by a seeded generator."""

from __future__ import annotations

import argparse
import copy
import gzip
import io
import json
import os
import random
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

Mutate = Callable[[bytes, random.Random], bytes]

STRANGE: list[Any] = [
    *(None, True, False, -1, 0, 1, 10**9, 10**12, 10**40, -(2**63), 1.5, 1e308, float("nan")),
    *("", "x", "1", "a\nb\r\x1b[2Jtrain.py: finished", "\udcff", "\0", "/etc/passwd", "x" * 10_000),
    *([], {}, [[]], [None], {"": {}}, {"a": 1}, "../../x", float("inf"), list(range(1000))),
]


# ---------------------------------------------------------------------------------- bytes


def flip(content: bytes, rng: random.Random) -> bytes:
    """Flip one to eight bits."""
    harmed = bytearray(content or b"\0")
    for _ in range(rng.randint(1, 8)):
        harmed[rng.randrange(len(harmed))] ^= 1 << rng.randrange(8)
    return bytes(harmed)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def stretch(content: bytes, rng: random.Random) -> bytes:
    """Put bytes somewhere, as they come, or a part of the content again."""
    place, length = rng.randrange(len(content) + 1), rng.choice([1, 8, 512, 100_000])
    more = rng.choice([rng.randbytes(length), bytes(length), content[-length:], b"\n" * length])
    return content[:place] + more + content[place:]


def overwrite(content: bytes, rng: random.Random) -> bytes:
    place, length = rng.randrange(len(content) + 1), rng.choice([1, 4, 8, 64])
    more = rng.choice([b"\xff", b"\0", b"\x80", b"9", b"["]) * length
    return content[:place] + more + content[place + length :]


def other(content: bytes, rng: random.Random) -> bytes:
    """Something else altogether."""
    known = [b"", b"\n", b"\0" * 1000, b"<html>404</html>", b"PK\x03\x04", b"\x1f\x8b\x08", b"%!PS"]
    return rng.choice([*known, rng.randbytes(2000), b"\xff\xfe" + content, b"1" * 5000])


BYTES: list[Mutate] = [flip, cut, stretch, overwrite, other]


# ---------------------------------------------------------------------------------- trees


def deep(_content: bytes, rng: random.Random) -> bytes:
    """Brackets upon brackets, closed or not."""
    levels = rng.choice([40, 1000, 30_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b"- ", b""), (b"a: {", b"}")])
    return opening * levels + b"1" + closing * rng.choice([0, levels])


def numbers(content: bytes, rng: random.Random) -> bytes:
    """Another number in place of one, which may have thousands of digits."""
    places = [i for i, byte in enumerate(content) if chr(byte).isdecimal()]
    if not places:
        return content + b"1" * 5000
    place = rng.choice(places)
    number = rng.choice([b"1" * 5000, b"-1", b"1e999", b"NaN", b"true", b'"x"', b"0x1", b"1.", b""])
    return content[:place] + number + content[place + 1 :]


def tree(value: Any, rng: random.Random) -> Any:
    """Change one to three places of a nested value."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return strange(rng)
        holder, key = rng.choice(places)
        deed = rng.randrange(5)
        if deed == 0:
            del holder[key]
        elif deed == 1 and isinstance(holder, dict):
            holder[rng.choice(["a\nb", "", "x" * 200, "__class__", "0"])] = strange(rng)
        elif deed == 2 and isinstance(holder, list):
            holder.extend(holder[key : key + 1] * rng.choice([1, 1000]))
        else:
            holder[key] = strange(rng)
    return value


def strange(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(STRANGE))  # which the next change may change


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(the mapping or list, the key or number) of everything within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner)


def as_json(content: bytes, rng: random.Random) -> bytes:
    return json.dumps(tree(json.loads(content), rng)).encode()


def as_json_lines(content: bytes, rng: random.Random) -> bytes:
    """Change lines, each by itself."""
    lines = content.splitlines()
    for _ in range(rng.randint(1, 3)):
        number = rng.randrange(len(lines))
        lines[number] = rng.choice([as_json, deep, numbers, flip])(
            content.splitlines()[number], rng
        )
    return b"\n".join(lines)


def as_yaml(content: bytes, rng: random.Random) -> bytes:
    changed = tree(yaml.safe_load(content), rng)
    more = [
        b"",
        b"a: &a [*a]\n",
        b"b: !!python/object:os.system {}\n",
        b"--- 1\n",
        b"\x00",
        b"\xff",
    ]
    text = yaml.dump(changed, allow_unicode=True).encode("utf-8", "surrogateescape")
    return text + rng.choice([b"", *more])


def as_lines(content: bytes, rng: random.Random) -> bytes:
    """Change lines of text."""
    lines = content.splitlines()
    odd = [b"", b" ", b"\xff", b"9" * 5000, b"\x1b[2J", b"a\tb\tc", b"x" * 100_000, b"\0", lines[0]]
    for _ in range(rng.randint(1, 3)):
        lines[rng.randrange(len(lines))] = rng.choice(odd)
    return b"\n".join(lines)


def as_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Change the header, or the number that says its length."""
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.2:
        said = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
        return said.to_bytes(8, "little") + content[8:]
    header = json.loads(content[8 : 8 + length])
    for key, text in header.get("__metadata__", {}).items():
        if rng.random() < 0.3:
            header["__metadata__"][key] = rng.choice([as_json, deep, numbers])(
                text.encode(), rng
            ).decode("utf-8", "replace")
    if rng.random() < 0.7:
        header = tree(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def as_torch(content: bytes, rng: random.Random) -> bytes:
    """Change something in a trainer's checkpoint: a key, an argument, a tensor."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        value = torch.load(io.BytesIO(content), weights_only=True)
    if rng.random() < 0.3:
        vars(value["args"]).update(tree(vars(value["args"]), rng))
    elif rng.random() < 0.5:
        state = value[rng.choice(["state_dict", "state_dict_ema"])]
        name = rng.choice(list(state))
        state[name] = rng.choice(
            [state[name].to(torch.int8), state[name].flatten(), torch.tensor(1.0), None, 7]
        )
    else:
        value = tree(value, rng)
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def as_tar(content: bytes, rng: random.Random) -> bytes:
    """Change a header's field, with a checksum that is right."""
    blocks = [i for i in range(0, len(content), 512) if content[i + 257 : i + 262] == b"ustar"]
    place = rng.choice(blocks)
    header = bytearray(content[place : place + 512])
    begin, length = rng.choice([(0, 100), (124, 12), (156, 1), (157, 100), (345, 155)])
    value = rng.choice([b"\0", b"7", b"\x80", b"\xff", b"L", b"x", b"g", b"S", b"../", b"-"])
    header[begin : begin + length] = (value * length)[:length]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    chain = bytes(header) * rng.choice([1, 1, 3000])
    return content[:place] + chain + content[place + 512 :]


def as_tar_gz(content: bytes, rng: random.Random) -> bytes:
    return gzip.compress(as_tar(gzip.decompress(content), rng))


def as_zip(content: bytes, rng: random.Random) -> bytes:
    """Change a field of a member's header, of the directory, or of its end."""
    fields = {b"PK\x03\x04": 30, b"PK\x01\x02": 46, b"PK\x05\x06": 22}
    signature = rng.choice(list(fields))
    places = [match.start() for match in re.finditer(re.escape(signature), content)]
    place = rng.choice(places) + rng.randrange(4, fields[signature] - 2, 2)
    value = rng.choice([b"\0\0", b"\xff\xff", b"\x01\0", b"\x08\0", b"\0\x80", b"\xff\xff\xff\x7f"])
    return content[:place] + value + content[place + len(value) :]


def at_the_end(content: bytes, rng: random.Random) -> bytes:
    """Change bytes of the last kilobyte or two, where parquet files say what is in them."""
    place = max(len(content) - 2000, 0)
    return content[:place] + rng.choice(BYTES)(content[place:], rng)


JSON, YAML = [*BYTES, deep, numbers, *[as_json] * 6], [*BYTES, deep, numbers, *[as_yaml] * 6]
JSON_LINES, LINES = [*BYTES, deep, *[as_json_lines] * 5], [*BYTES, deep, *[as_lines] * 3]
TORCH = [*BYTES, *[as_torch] * 8]
TAR_GZ, ZIP = [*BYTES, *[as_tar_gz] * 5], [*BYTES, *[as_zip] * 5]
PARQUET = [*BYTES, *[at_the_end] * 5]
SAFETENSORS, TAR = [*BYTES, *[as_safetensors] * 8], [*BYTES, *[as_tar] * 5]


# ---------------------------------------------------------------------------------- what is no file


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def circle(path: Path) -> None:
    path.symlink_to(path)


def vast(path: Path) -> None:
    """A file of a terabyte that takes no room."""
    with path.open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)


def unnamed(path: Path) -> None:
    """Nothing."""


THINGS: list[Callable[[Path], None]] = [pipe, folder, endless, circle, vast, unnamed]


def long_names(levels: int) -> bytes:
    """A tar whose headers announce each other."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 5
    return (info.tobuf(tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0")) * levels + bytes(1024)
