"""Folders of images as they are found: which files are images, and what else lies there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from data.errors import DataError, enumeration
from data.image_formats import image_extensions
from data.names import same_but_for_case, shown

LEFT_BY_PROGRAMS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN"}
MOST_NAMED = 5  # endings
MOST_PAIRS = 3  # names that differ only in case


class ClassFiles(NamedTuple):
    """Files of a class: its images, relative to its folder, and the others by their endings."""

    images: list[str]
    others: Counter[str]


def search(top: str) -> ClassFiles:
    """List a class's images in ImageFolder's order: folder by folder, a folder's files sorted.

    Raises DataError if there are none.
    """
    extensions = image_extensions()
    images, others = [], Counter()
    for folder, files in sorted(_walk(top)):
        below = os.path.relpath(folder, top)
        here = [file for file in sorted(files) if file.lower().endswith(extensions)]
        images += here if below == os.curdir else [os.path.join(below, file) for file in here]
        if len(here) < len(files):
            others.update(_ending(file) for file in set(files).difference(here))
    if not images:
        raise DataError(f"{top}: no images in it" + (f", only {kinds(others)}" if others else ""))
    return ClassFiles(images, others)


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder with its files, once, whatever links lead to it.

    Raises DataError for a folder that cannot be listed, and for a link to one that it lies in.
    """
    first: dict[tuple[int, int], str] = {}
    for folder, below, files in os.walk(top, onerror=_refuse, followlinks=True):
        status = os.stat(folder)
        seen = first.setdefault((status.st_dev, status.st_ino), folder)
        if seen is folder:
            below.sort()  # of several names of one folder, the first
            yield folder, files
        elif folder.startswith(os.path.join(seen, "")):
            raise DataError(f"{folder}: a link that leads back to {seen}; remove it")
        else:
            below.clear()


def images_below(top: str) -> list[str]:
    """List the images in a folder and in those below it. Raises DataError if there are none."""
    return search(top).images


def _refuse(error: OSError) -> NoReturn:
    """Raise DataError: a folder that cannot be listed would silently make the data set smaller."""
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror})")


def _ending(file: str) -> str:
    return os.path.splitext(file)[1].lower() or "no ending"


def kinds(others: Counter[str]) -> str:
    """Describe files by their endings: ".txt 10, .xml 2"."""
    named = [f"{shown(kind, 20)} {count:,}" for kind, count in others.most_common(MOST_NAMED)]
    return ", ".join(named) + (", …" if len(others) > MOST_NAMED else "")


class Remarks:
    """Collects what lies in a root's class folders that a person should know of."""

    def __init__(self, root: str, classes: list[str]) -> None:
        self.root, self.classes = root, classes
        self.others: Counter[str] = Counter()
        self.alike: list[list[str]] = []
        self.leftovers = 0

    def note(self, name: str, files: ClassFiles) -> None:
        """Note the files of a class."""
        self.others += files.others
        self.alike += [
            [os.path.join(name, image) for image in group]
            for group in same_but_for_case(files.images)
        ]
        self.leftovers += sum(os.path.basename(image).startswith("._") for image in files.images)

    def lines(self) -> list[str]:
        """Describe what was noted, a line for each kind."""
        lines = []
        if self.others:
            files = self.others.total()
            are = "file is no image" if files == 1 else "files are not images"
            lines.append(f"{files:,} {are}: {kinds(self.others)}")
        if self.leftovers:
            lines.append(f"files named ._… that macOS left, not images: {self.leftovers:,}")
        if outside := self._outside():
            lines.append(f"images beside the class folders, and so in no class: {outside:,}")
        left = [name for name in self.classes if name.startswith(".") or name in LEFT_BY_PROGRAMS]
        if left:
            lines.append(f"folders that may not be classes: {enumeration(left)}")
        for what, groups in (("classes", same_but_for_case(self.classes)), ("images", self.alike)):
            if groups:
                pairs = "; ".join(" and ".join(map(shown, group)) for group in groups[:MOST_PAIRS])
                more = f"; … {len(groups):,} in all" if len(groups) > MOST_PAIRS else ""
                lines.append(
                    f"{what} whose names differ only in case or Unicode form, which some disks "
                    f"take for one: {pairs}{more}"
                )
        return [f"{self.root}: {line}" for line in lines]

    def _outside(self) -> int:
        """Count the images that lie in the root itself."""
        with os.scandir(self.root) as entries:
            return sum(
                entry.name.lower().endswith(image_extensions()) and not entry.is_dir()
                for entry in entries
            )
