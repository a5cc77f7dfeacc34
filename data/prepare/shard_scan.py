"""Index of tar shards that anyone made in WebDataset's layout, without rewriting them.

A sample is the members of one shard that share their name up to the first dot of its last part:
KEY.jpg (or another image), KEY.cls with the label as text, and perhaps KEY.json. Nothing is
extracted: names within the archives stay names.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data import strict_json
from data.errors import DataError
from data.files import open_regular, read_user_text
from data.image_formats import image_extensions
from data.prepare.members import TarInfo
from data.prepare.processes import run_all, take_in_hand
from data.shards import index as shard_index
from data.shards.index import BLOCK, COLUMNS, INDEX, PLAN, Index, Shard

MAX_TEXT = 1 << 20  # bytes of a .cls or .json
MAX_LABEL = 1 << 20
MAX_FILLING = 64 << 20  # bytes after the end; archives are filled up to 10 kB, some to 1 MB
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_SYNSET = re.compile(r"\bn\d{8}(?!\d)")


class Sample(NamedTuple):
    """An image in a shard."""

    key: str
    label: int
    block: int  # where its bytes begin, in blocks of tar
    size: int  # bytes
    crc32: int


@dataclass
class Scan:
    """Content of a shard: its samples, and the names that its metadata give the labels."""

    shard: Shard
    samples: list[Sample] = field(default_factory=list)
    names: dict[int, set[str]] = field(default_factory=dict)


def image_kinds() -> set[str]:
    """Extensions of the members that are images."""
    return {extension.removeprefix(".") for extension in image_extensions()}


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            take_in_hand(str(path))
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


# ---------------------------------------------------------------------------------- one shard


def scan(path: Path) -> Scan:
    """Read a shard. Raises DataError, naming shard and key, for a sample that is not whole."""
    try:
        with open_regular(path) as file:
            by_key = _by_key(path, _members(path, file))
            scanned = Scan(Shard(path.name, path.stat().st_size, sha256_of(path)))
            for key, members in by_key.items():
                take_in_hand(f"{path}: key {key!r}")
                sample, name = _sample(path, file, key, members)
                scanned.samples.append(sample)
                if name is not None:
                    scanned.names.setdefault(sample.label, set()).add(name)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return scanned


def _by_key(path: Path, members: list[tarfile.TarInfo]) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Sort members by key and extension; like WebDataset, leave out names of another form.

    Raises DataError for an extension that a key has twice.
    """
    parts: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        match = _MEMBER.fullmatch(member.name)
        if match is None:
            continue
        key, extension = match[1], match[2].lower()
        if extension in parts.setdefault(key, {}):
            raise DataError(f"{path}: key {key!r}: has two members .{extension}")
        parts[key][extension] = member
    return parts


def _members(path: Path, file: BinaryIO) -> list[tarfile.TarInfo]:
    """List the files in a tar. Raises DataError for a damaged or truncated one."""
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=TarInfo) as tar:
            members = tar.getmembers()
            end = tar.offset
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{path}: not a whole tar archive ({error}); copy it anew") from None
    # tarfile takes anything but a header for the archive's end.
    if os.pread(file.fileno(), BLOCK, end) != bytes(BLOCK):
        raise DataError(f"{path}: not a whole tar archive (no end at byte {end:,}); copy it anew")
    if (more := os.fstat(file.fileno()).st_size - end) > MAX_FILLING:
        raise DataError(f"{path}: goes on for {more:,} bytes after the archive's end; copy it anew")
    for member in members:
        if not member.isdir() and (not member.isreg() or member.issparse()):
            raise DataError(f"{path}: {member.name!r} is not a plain file")
    return [member for member in members if not member.isdir()]


def _sample(
    path: Path, file: BinaryIO, key: str, members: dict[str, tarfile.TarInfo]
) -> tuple[Sample, str | None]:
    """Read a sample and, where its metadata say so, its class's name."""
    where = f"{path}: key {key!r}"
    images = sorted(members.keys() & image_kinds())
    if len(images) != 1:
        what = f"two images (.{images[0]}, .{images[1]})" if images else "no image"
        raise DataError(f"{where}: {what}; expected one of {', '.join(sorted(image_kinds()))}")
    if "cls" not in members:
        raise DataError(f"{where}: no label (a member .cls)")
    text = _content(file, members["cls"])[:64].decode("ascii", "replace").strip()
    if not text.isdecimal() or int(text) >= MAX_LABEL:
        raise DataError(f"{where}: .cls holds {text!r}, not a label (0, 1, 2, …)")
    image = members[images[0]]
    if image.size >= 1 << 32 or image.offset_data % BLOCK or image.offset_data >= BLOCK << 32:
        raise DataError(f"{where}: .{images[0]} is too large, or begins at an odd place")
    described = _content(file, members["json"]) if "json" in members else b"{}"
    content = os.pread(file.fileno(), image.size, image.offset_data)
    sample = Sample(key, int(text), image.offset_data // BLOCK, image.size, zlib.crc32(content))
    return sample, _class_name(described, key)


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    """Read the first MAX_TEXT bytes of a member."""
    return os.pread(file.fileno(), min(member.size, MAX_TEXT), member.offset_data)


def _class_name(described: bytes, key: str) -> str | None:
    """Find a class's name in a sample's .json or its key.

    That is "class", as shards written here have it, or a synset in "filename" or the key.
    """
    try:
        content = strict_json.parse(described)
    except ValueError:
        content = None
    content = content if isinstance(content, dict) else {}
    if isinstance(content.get("class"), str):
        return content["class"]
    match = _SYNSET.search(str(content.get("filename", ""))) or _SYNSET.search(key)
    return match[0] if match else None


# ---------------------------------------------------------------------------------- many shards


def index_folder(
    root: Path, given: list[str] | None, workers: int, done: Callable[[Scan], None]
) -> Index:
    """Write the index of a folder of shards and return it.

    `given`: class names in the order of the labels, where the shards' own are not to be taken.
    `done` gets each shard. Raises DataError, or OSError where the index cannot be written.
    """
    paths = shards_in(root)
    scans = run_all([partial(scan, path) for path in paths], workers, done)
    names: dict[int, set[str]] = {}
    for scanned in scans:
        for label, some in scanned.names.items():
            names.setdefault(label, set()).update(some)
    largest = max((s.label for scanned in scans for s in scanned.samples), default=-1)
    index = build_index(root, scans, name_classes(root, largest + 1, names, given), None)
    shard_index.save(index, root)
    return index


def shards_in(root: Path) -> list[Path]:
    """List the tar files of a folder to be indexed. Raises DataError where no index may be made."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    if (root / INDEX).exists():
        raise DataError(f"{root}: has an index already; to make it anew, remove {root / INDEX}")
    if (root / PLAN).exists():
        raise DataError(
            f"{root}: its shards are unfinished; start the command that writes them again"
        )
    paths = sorted(path for path in root.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        raise DataError(f"{root}: no tar files in it")
    sets = sorted({re.sub(r"\d+\.tar$", "", path.name) for path in paths})
    if len(sets) > 1:
        raise DataError(
            f"{root}: shards of several sets ({', '.join(f'{name}*' for name in sets[:3])}); an "
            f"index is of one: put each into a folder of its own, links will do: mkdir NEW; ln -s "
            f"{root.resolve()}/{sets[0]}*.tar NEW"
        )
    return paths


def read_classes(path: Path) -> list[str]:
    """Read class names, in the order of the labels: a file's lines, or a folder of shards'."""
    if path.is_dir():
        return shard_index.load(path).classes
    names = [line.strip() for line in read_user_text(path).splitlines()]
    if not names or "" in names or len(set(names)) < len(names):
        raise DataError(f"{path}: expected class names, one a line, all different, none empty")
    return names


def name_classes(
    root: Path, count: int, scanned: dict[int, set[str]], given: list[str] | None
) -> list[str]:
    """Name the labels 0 … count - 1: as given, else as scanned, else by the numbers as text.

    Names scanned are used if every label has exactly one, of its own. Raises DataError where they
    contradict those given.
    """
    if given is None:
        named = {label: next(iter(names)) for label, names in scanned.items() if len(names) == 1}
        is_whole = len(named) == len(set(named.values())) == count
        return [named[label] if is_whole else str(label) for label in range(count)]
    if count > len(given):
        raise DataError(f"{root}: has label {count - 1}, beyond the {len(given)} classes given")
    for label, names in sorted(scanned.items()):
        elsewhere = sorted(names & set(given) - {given[label]})
        if elsewhere:  # a list in another order would spoil every score
            raise DataError(
                f"{root}: images labelled {label} are of class {elsewhere[0]}, but the classes "
                f"given have {given[label]} there and {elsewhere[0]} at "
                f"{given.index(elsewhere[0])}"
            )
    return given


def build_index(
    root: Path, scans: Iterable[Scan], classes: list[str], resized_to: int | None
) -> Index:
    """Number all images by (label, key).

    Raises DataError for keys that occur twice and for classes without images.
    """
    scans = sorted(scans, key=lambda scanned: scanned.shard.name)
    if len(scans) > shard_index.MAX_SHARDS:
        raise DataError(f"{root}: {len(scans):,} shards, more than {shard_index.MAX_SHARDS:,}")
    _check_keys(root, scans)
    entries = sorted(
        (sample.label, sample.key, number, sample)
        for number, scanned in enumerate(scans)
        for sample in scanned.samples
    )
    labels = np.array([label for label, *_ in entries], np.int64)
    counts = np.bincount(labels, minlength=len(classes))
    for label in np.flatnonzero(counts == 0).tolist():
        raise DataError(f"{root}: no image of class {classes[label]} (label {label})")
    fields = {
        "shard": (number for _, _, number, _ in entries),
        "block": (sample.block for *_, sample in entries),
        "size": (sample.size for *_, sample in entries),
        "crc32": (sample.crc32 for *_, sample in entries),
    }
    return Index(
        [scanned.shard for scanned in scans],
        classes,
        [0, *np.cumsum(counts).tolist()],
        {name: np.fromiter(fields[name], dtype) for name, dtype in COLUMNS.items()},
        resized_to,
    )


def _check_keys(root: Path, scans: list[Scan]) -> None:
    seen: dict[str, Shard] = {}
    for scanned in scans:
        for sample in scanned.samples:
            first = seen.setdefault(sample.key, scanned.shard)
            if first is not scanned.shard:
                raise DataError(
                    f"{root / scanned.shard.name}: key {sample.key!r}: is in {first.name}, too"
                )
