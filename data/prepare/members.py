"""Members of archives: where they lie, and which are refused. Nothing is unpacked here."""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data.errors import DataError
from data.files import open_regular
from data.shards.index import BLOCK

MAX_MEMBER = 100 << 20  # bytes of one file in an archive; the largest of those read here has 31 MB
MAX_NAME = 1 << 20  # bytes
NAMES_AND_ATTRIBUTES = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError)  # what a damaged one raises
READABLE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class TarInfo(tarfile.TarInfo):
    """Header of a member, for `tarfile.open`: of bearable size, and in no endless chain."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except RecursionError:  # long names of long names
            raise tarfile.ReadError("a chain of headers") from None

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        info = super().frombuf(buf, encoding, errors)
        if info.type in NAMES_AND_ATTRIBUTES and info.size > MAX_NAME:  # tarfile would read them
            raise tarfile.ReadError(f"a name or attributes of {info.size:,} bytes")
        return info


class Member(NamedTuple):
    """A file in a tar archive; offset and size in bytes, in the outermost file."""

    name: str
    offset: int
    size: int


def list_members(descriptor: int, start: int, end: int, where: str) -> list[Member]:
    """List the members of the tar archive in bytes [start, end) of an open file.

    Stricter than tarfile, which takes a damaged header for the end. Raises DataError that names
    `where` for an archive that is damaged or cut off, or holds anything but plain files.
    """
    members = []
    position = start
    while True:
        header = os.pread(descriptor, max(0, min(BLOCK, end - position)), position)
        if header == bytes(BLOCK):  # the archive's end
            return members
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise DataError(
                f"{where}: damaged or cut off, no tar header at byte {position - start:,} ({error})"
            ) from None
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise DataError(f"{where}: holds {info.name!r}, which is not a plain file")
        member = Member(info.name, position + BLOCK, info.size)
        if not 0 <= member.size <= end - member.offset:
            raise DataError(f"{where}: damaged or cut off within {member.name!r}")
        members.append(member)
        position = member.offset + -(-member.size // BLOCK) * BLOCK


def check_names(members: Iterable[Member], is_known: Callable[[str], object], where: str) -> None:
    """Raise DataError for a member of an unknown name, thus for any path, or two of the same."""
    seen = set()
    for member in members:
        if not is_known(member.name):
            raise DataError(f"{where}: holds {member.name!r}, which is not of ILSVRC2012")
        if member.name in seen:
            raise DataError(f"{where}: holds {member.name!r} twice")
        seen.add(member.name)


# ---------------------------------------------------------------------------------- other things


def is_below(name: str) -> bool:
    """True for a name that leads to a place below the one it would be unpacked at."""
    return not os.path.isabs(name) and ".." not in name.replace("\\", "/").split("/")


def is_harmless(member: tarfile.TarInfo) -> bool:
    """True for a folder, or a file of bearable size, below the place it would be unpacked at."""
    return is_below(member.name) and (
        member.isdir() or (member.isfile() and member.size <= MAX_MEMBER)
    )


def refuse(where: object, name: str) -> DataError:
    """Make the error for a member that is not harmless."""
    return DataError(
        f"{where}: refused, it holds {name[:100]!r}: a link, a device, too large a file, or a path "
        "that leads out of the target folder"
    )


def files_in_tar(file: BinaryIO, where: object) -> Iterator[Member]:
    """Yield the files of a tar archive, which is read from beginning to end.

    Raises DataError for a member that is not harmless, and tarfile's errors.
    """
    with tarfile.open(fileobj=file, mode="r:", tarinfo=TarInfo) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # else it keeps all it has seen: gigabytes, of two million
            if not is_harmless(member):
                raise refuse(where, member.name)
            if member.isfile():
                yield Member(member.name, member.offset_data, member.size)


def contents_of_tar_gz(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of each file in a gzipped tar archive, in its order.

    Raises DataError for one that is damaged, or holds a member that is not harmless.
    """
    try:
        with open_regular(path) as file, gzip.open(file) as stream:
            with tarfile.open(fileobj=stream, mode="r|", tarinfo=TarInfo) as tar:
                for member in tar:
                    if not is_harmless(member) or member.size > MAX_MEMBER:
                        raise refuse(path, member.name)
                    if member.isfile():
                        yield member.name, tar.extractfile(member).read()
            while stream.read(1 << 20):  # to gzip's own checksum, behind the tar's end
                pass
    except DAMAGED as error:
        raise DataError(f"{path}: not a whole .tar.gz archive ({error})") from None


class Packed(NamedTuple):
    """A file in a zip archive; offset of its header, sizes in bytes."""

    member: Member
    packed_size: int
    crc32: int


def files_in_zip(path: Path) -> Iterator[Packed]:
    """Yield the files of a zip archive. Raises DataError for one that is damaged, encrypted, or
    holds a member that is not harmless."""
    try:
        with zipfile.ZipFile(path) as archive:
            end = path.stat().st_size
            for info in archive.infolist():
                if not 0 <= info.header_offset <= info.header_offset + info.compress_size <= end:
                    raise zipfile.BadZipFile(f"{info.filename!r} lies outside of it")
                is_link = stat.S_ISLNK(info.external_attr >> 16)
                if is_link or not is_below(info.filename):
                    raise refuse(path, info.filename)
                if info.flag_bits & 1 or info.compress_type not in READABLE:
                    raise DataError(f"{path}: {info.filename!r} is encrypted or oddly compressed")
                if not info.is_dir():
                    member = Member(info.filename, info.header_offset, info.file_size)
                    yield Packed(member, info.compress_size, info.CRC)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        if getattr(error, "filename", None) is not None:  # of the file as such
            raise
        raise DataError(f"{path}: not a whole zip archive ({error}); download it anew") from None
