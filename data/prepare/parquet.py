"""Image data sets in parquet files, as Hugging Face has them: an image's bytes and name, its label.

Images lie there in any order, and are found quickly only in that order.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import compress, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import strict_json
from data.errors import DataError, ImageError, enumeration
from data.files import open_regular
from data.ilsvrc import SYNSET, Expected, added_synset, original_name
from data.image_formats import image_extensions
from data.optional import needed
from data.prepare.imagenet import check_counts
from data.prepare.listed import UNKNOWN, ListedSource, Listing, listing
from data.prepare.members import Member, check_names
from data.prepare.shard_writer import kind_and_size
from data.prepare.splits import file_names, files_by_split, folder_names, held_out

PARQUET = ".parquet"
ROWS = 64  # that are read at a time
BYTES = ("binary", "large_binary")  # types of an image's bytes


def files_of(path: Path) -> dict[str, list[Path]]:
    """Find the files of each split. Raises DataError where those of one lie in several folders,
    which is how several data sets lie in one place."""
    splits = files_by_split(path, PARQUET)
    for split, files in splits.items():
        if len(folders := sorted({str(file.parent) for file in files})) > 1:
            raise DataError(
                f"{path}: its {split} files lie in {len(folders):,} folders; give one of them: "
                f"{enumeration(folders)}"
            )
    return splits


class Columns(NamedTuple):
    """The columns of images and labels, and how they are kept."""

    image: str
    is_struct: bool  # of bytes and path; else of bytes alone
    label: str
    names: list[str] | None  # of the classes by label, if the file says them

    @property
    def content(self) -> str:
        return f"{self.image}.bytes" if self.is_struct else self.image


def open_file(path: Path) -> Any:
    """Open a parquet file: pyarrow's ParquetFile. Raises DataError."""
    parquet = needed("pyarrow.parquet", str(path))
    try:
        open_regular(path).close()  # a pipe would be waited for
        return parquet.ParquetFile(path, page_checksum_verification=True)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]})")


def columns_of(path: Path, image: str | None = None, label: str | None = None) -> Columns:
    """Find the columns of images and labels: those named, else those that the file says are such.

    Raises DataError.
    """
    schema = open_file(path).schema_arrow
    features = _features(schema.metadata or {})
    kinds = {entry.get("_type"): name for name, entry in reversed(features.items())}
    image = image or _among(schema, (kinds.get("Image"), "image", "img", "jpg"))
    label = label or _among(schema, (kinds.get("ClassLabel"), "label", "cls"))
    for name, what in ((image, "images"), (label, "labels")):
        if name not in schema.names:
            raise DataError(
                f"{path}: no column of {what} ({name or 'none is named so'}); its columns: "
                f"{', '.join(schema.names[:10])}"
            )
    kind = schema.field(image).type
    parts = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    if str(parts.get("bytes", kind)) not in BYTES:
        raise DataError(
            f"{path}: its column {image} holds {str(kind)[:60]}, not images: these are bytes, or "
            "bytes and path; --image-column names another"
        )
    names = features.get(label, {}).get("names")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return Columns(image, "bytes" in parts, label, names if is_list else None)


def _among(schema: Any, names: Sequence[str | None]) -> str | None:
    return next((name for name in names if name in schema.names), None)


def _features(metadata: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """Read what Hugging Face's library writes of each column into a file's schema."""
    try:
        features = strict_json.parse(metadata[b"huggingface"])["info"]["features"]
        return {name: entry for name, entry in features.items() if isinstance(entry, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


class Row(NamedTuple):
    """An image as a file lists it, without its bytes."""

    number: int  # over all files
    name: str | None
    label: int | str | None


def rows(files: Sequence[Path], columns: Columns) -> Iterator[Row]:
    """Yield the rows of files that go together; reads names and labels alone. Raises DataError."""
    number = 0
    wanted = [columns.label, *([f"{columns.image}.path"] if columns.is_struct else [])]
    for path in files:
        if columns_of(path, columns.image, columns.label)[:3] != columns[:3]:
            raise DataError(f"{path}: keeps its images in another way than {files[0]}")
        try:
            table = open_file(path).read(columns=wanted).flatten()
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from None
        labels = table.column(columns.label).to_pylist()
        has_names = f"{columns.image}.path" in table.column_names
        names = table.column(f"{columns.image}.path").to_pylist() if has_names else ()
        for name, label in zip_longest(names, labels):
            yield Row(number, name and os.path.basename(name), label)
            number += 1


def _bytes_in(batch: Any) -> list[bytes | None]:
    """Bytes of the images of a RecordBatch that has no other column."""
    column = batch.column(0)
    return (column.field("bytes") if hasattr(column, "field") else column).to_pylist()


class ParquetSource(ListedSource):
    """Images in parquet files; an offset is a row's number over all files."""

    is_sequential = True

    def __init__(
        self,
        path: Path,
        files: Sequence[Path],
        columns: Columns,
        classes: list[str],
        listings: Sequence[Listing],
    ) -> None:
        super().__init__(path, classes, listings)
        self._column = columns.content
        self._groups: list[tuple[Path, int]] = []  # file, row group in it
        firsts = [0]
        for file in files:
            metadata = open_file(file).metadata
            for group in range(metadata.num_row_groups):
                self._groups.append((file, group))
                firsts.append(firsts[-1] + metadata.row_group(group).num_rows)
        self._firsts = np.array(firsts[:-1])
        self._group, self._first, self._contents = -1, 0, []  # of the rows that were read last
        self._batches: Iterator[Any] = iter(())

    def _content(self, index: int) -> bytes:
        row = int(self.offsets[index])
        group = int(np.searchsorted(self._firsts, row, "right")) - 1
        try:
            if group != self._group or row < self._first:
                file, number = self._groups[group]
                self._batches = open_file(file).iter_batches(
                    ROWS, row_groups=[number], columns=[self._column], use_threads=False
                )
                self._group, self._first, self._contents = group, int(self._firsts[group]), []
            while row >= self._first + len(self._contents):
                self._first += len(self._contents)
                self._contents = _bytes_in(next(self._batches))
        except (ValueError, StopIteration) as error:
            raise ImageError(f"{self.name(index)}: cannot be read ({error})") from None
        content = self._contents[row - self._first]
        if content is None:
            raise ImageError(f"{self.name(index)}: the file has its name alone, without its bytes")
        return content


# ---------------------------------------------------------------------------------- ImageNet

IMAGENET_NAME = re.compile(
    r"(n[0-9]{8}_[0-9]+|ILSVRC2012_val_[0-9]{8})\.(jpe?g|png|webp)", re.IGNORECASE
)
A_PNG = "n02105855_2933.JPEG"  # among ImageNet's JPEG files
LOOKED_AT = 4  # images of each file
MANY = 20  # images of which some would differ in size


def imagenet_source(
    path: Path, split: str, files: Sequence[Path], expected: Expected
) -> ParquetSource:
    """Open ImageNet's training or validation images; labels are places in the sorted synsets.

    Raises DataError unless names and labels agree and the images are as many as expected.
    """
    columns, synsets = columns_of(files[0]), list(expected.synsets())
    classes: dict[str, list[Member]] = {synset: [] for synset in synsets}
    nameless = 0
    for row in rows(files, columns):
        if type(row.label) is not int or not 0 <= row.label < len(synsets):
            raise DataError(
                f"{path}: {split}, row {row.number:,}: its label is {row.label!r}, not one of 0 to "
                f"{len(synsets) - 1}"
            )
        synset, name = synsets[row.label], original_name(row.name or "")
        begins = SYNSET.match(name)
        for own in (added_synset(row.name or ""), begins and begins[0]):
            if own not in (None, synset):
                raise DataError(f"{path}: {row.name} has label {row.label}, which is {synset}")
        if not IMAGENET_NAME.fullmatch(name):
            name, nameless = f"{split}_{row.number:08d}.JPEG", nameless + 1
        classes[synset].append(Member(name, row.number, UNKNOWN))
    for images in classes.values():
        check_names(images, bool, str(path))
    counts = {synset: len(images) for synset, images in classes.items()}
    check_counts(path, counts, {}, expected.images(split))
    listings = [listing(images) for images in classes.values()]
    source = ParquetSource(path, files, columns, synsets, listings)
    source.remarks = _signs_of_conversion(files, columns)
    if nameless:
        source.remarks.append(
            f"{path}: {nameless:,} {split} images have no names of ImageNet's and get others, so "
            "that lists by number will not find them"
        )
    return source


def _signs_of_conversion(files: Sequence[Path], columns: Columns) -> list[str]:
    """Say what the first images of each file show of being others than ImageNet's own.

    A JPEG file that was made anew with the same size goes unnoticed.
    """
    others, sides, looked = Counter(), set(), 0
    for path in files:
        batch = next(open_file(path).iter_batches(LOOKED_AT, columns=[columns.image]), None)
        for image in [] if batch is None else batch.column(0).to_pylist():
            content, name = (
                (image["bytes"], image.get("path")) if columns.is_struct else (image, "")
            )
            kind, size = kind_and_size(content or b"")
            looked += 1
            sides.add(min(size.values(), default=None))
            if kind != "jpg" and original_name(os.path.basename(name or "")) != A_PNG:
                others[str(kind)] += 1
    where = f"{files[0].parent}: of {looked:,} images looked at"
    remarks = []
    if others:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in others.items())
        remarks.append(f"{where} some are not JPEG files, as ImageNet's are: {kinds}")
    if looked >= MANY and len(sides) == 1:
        remarks.append(f"{where} all have a shorter side of {sides.pop()} px: scaled down")
    return remarks


# ---------------------------------------------------------------------------------- other sets


def open_data_set(
    path: Path, image: str | None, label: str | None, fraction: float, seed: int
) -> dict[str, ParquetSource]:
    """Open training and validation images of any data set: "train" and "val".

    Validation images are those of a split that is called so, else the test images, else a share
    held out of each class. Raises DataError.
    """
    splits = files_of(path)
    if "train" not in splits:
        raise DataError(f"{path}: no parquet files of training images in it")
    columns = columns_of(splits["train"][0], image, label)
    files = {"train": splits["train"], "val": splits.get("val") or splits.get("test")}
    classes = {split: _classes(files[split], columns) for split in files if files[split]}
    if "val" not in classes:
        files["val"], classes["val"] = files["train"], {}
        for name, members in classes["train"].items():
            names = [f"{name}/{member.name}" for member in members]
            chosen = held_out(names, fraction, seed, f"{path}: {name}")
            is_val = [f"{name}/{member.name}" in chosen for member in members]
            classes["val"][name] = list(compress(members, is_val))
            classes["train"][name] = list(compress(members, (not val for val in is_val)))
    sources = {}
    for split, content in classes.items():
        names = sorted(content)
        listings = [listing(content[name]) for name in names]
        sources[split] = ParquetSource(path, files[split], columns, names, listings)
    return sources


def _classes(files: Sequence[Path], columns: Columns) -> dict[str, list[Member]]:
    """List the images of each class that has some; their names are those of folders and files."""
    of_class: dict[str, list[Row]] = {}
    for row in rows(files, columns):
        name = row.label
        if columns.names is not None:
            is_label = type(name) is int and 0 <= name < len(columns.names)
            name = columns.names[name] if is_label else None
        if not isinstance(name, (str, int, float)):
            raise DataError(
                f"{files[0]}: row {row.number:,}, counted on in the files after it: "
                f"{str(row.label)[:60]!r} is not a label of a class; leave out files whose labels "
                "are hidden, or name another --label-column"
            )
        of_class.setdefault(str(name), []).append(row)
    ending, folders = _ending(files[0], columns), folder_names(of_class, files[0])
    classes = {}
    for name, some in of_class.items():
        numbers = [row.number for row in some]
        names = file_names([_file_name(row, ending) for row in some], numbers)
        classes[folders[name]] = [Member(*each, UNKNOWN) for each in zip(names, numbers)]
    return classes


def _file_name(row: Row, ending: str) -> str:
    """Name the file of an image as its row does, if that is a file's name, and an image's."""
    name = row.name or ""
    if "\0" in name or name in ("", ".", ".."):
        name = f"{row.number:07d}"
    return name if name.lower().endswith(image_extensions()) else name + ending


def _ending(path: Path, columns: Columns) -> str:
    """Ending for files of images without a name: that of the first image's kind."""
    batch = next(open_file(path).iter_batches(1, columns=[columns.content]), None)
    kind, _ = kind_and_size((_bytes_in(batch)[0] if batch else None) or b"")
    return f".{kind or 'jpg'}"
