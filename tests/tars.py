"""Tar archives by Python's own tarfile, sound and hostile."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterable

Entry = tuple[str, bytes] | tarfile.TarInfo  # a file's name and content, or the very header


def tar(entries: Iterable[Entry], mode: str = "w", form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form) as archive:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            archive.addfile(info, io.BytesIO(entry[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    """A member that is no plain file; a link leads to /etc/passwd."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def deflated(archive: bytes) -> bytes:
    """A zip archive with its members compressed."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive)) as stored,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in stored.namelist():
            packed.writestr(member, stored.read(member))
    return buffer.getvalue()
