"""Images of a source that count in an evaluation, and outputs of a network that are right."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import class_lists, strict_json
from data.base import Source
from data.errors import DataError
from data.files import read_user_text
from data.ilsvrc import SYNSET, VALIDATION_IMAGE, validation_name
from data.image_formats import image_extensions
from data.names import in_nfc, natural
from data.sources import check_same_classes

_NUMBER = re.compile(r"[0-9]{1,9}")  # of an output or an image, as text


@dataclass(frozen=True)
class LabelSet:
    """Images that an evaluation asks about, and the right answers."""

    name: str  # "folders" by name, in "order", "natural order", "numbered", "class index", "real"
    indices: np.ndarray  # int64 [n], the images that count, ascending
    outputs: np.ndarray  # int64 [folders], the network's output that stands for a class folder
    competing: np.ndarray | None = None  # bool [C], outputs that may be answers; None: all
    several: np.ndarray | None = None  # int64 [N, A], right outputs of each image of the source

    def answers(self, labels: Tensor, indices: list[int]) -> Tensor:
        """Return the right outputs for a batch: int64 [B], or [B, A] where several may be right."""
        if self.several is None:
            return torch.from_numpy(self.outputs).to(labels.device)[labels]
        return torch.from_numpy(self.several[indices]).to(labels.device)


def from_folders(
    source: Source,
    where: str,
    classes: list[str] | None,
    num_outputs: int,
    network: str,
    order: str | None = None,
) -> LabelSet:
    """Take class folders for the network's classes of the same name.

    For networks of ImageNet, and those that do not know their classes, folders named by all numbers
    from 0 on are outputs by number, as ImageNetV2's; other folders are the outputs of a network
    that does not know its classes in their `order`: "natural", or "alphabetical" as they come.
    Raises DataError unless each output has a folder.
    """
    folders, everything = source.classes, np.arange(len(source))
    numbers = [int(name) if _NUMBER.fullmatch(name) else -1 for name in folders]
    may_be_numbered = classes is None or all(map(SYNSET.fullmatch, classes))
    if may_be_numbered and sorted(numbers) == list(range(num_outputs)):
        return LabelSet("numbered", everything, np.array(numbers))
    if classes is not None:
        if order is not None:
            raise DataError(f"{network}: names its classes; leave out --class-order")
        try:
            return LabelSet("folders", everything, _by_name(folders, classes, where, network))
        except DataError as error:
            raise DataError(f"{error}{_subset_hint(folders, classes)}") from None
    if len(folders) != num_outputs:
        raise DataError(
            f"{where}: {len(folders)} classes, but {network} distinguishes {num_outputs}; "
            "--class-index FILE can say which folder is which output"
        )
    if order == "natural":
        listed = sorted(range(num_outputs), key=lambda folder: natural(folders[folder]))
        return LabelSet("natural order", everything, np.argsort(listed))
    return LabelSet("order", everything, np.arange(num_outputs))


def _by_name(folders: list[str], classes: list[str], where: str, network: str) -> np.ndarray:
    """Find the output of each folder by its name, in whichever order a network has them.

    Raises DataError for other names, and for numbers in another order: shards may have none.
    """
    are_numbers = all(map(str.isdecimal, folders))
    pair = (folders, classes) if are_numbers else (sorted(folders), sorted(classes))
    check_same_classes(*pair, where, network)
    output_of = {in_nfc(name): output for output, name in enumerate(classes)}
    return np.array([output_of[in_nfc(name)] for name in folders])


def order_matters(labels: LabelSet, folders: list[str]) -> bool:
    """True where a network's classes are known by the order of their folders alone, which has two
    readings."""
    is_by_order = labels.name in ("order", "natural order")
    return is_by_order and sorted(folders, key=natural) != sorted(folders)


def _subset_hint(folders: list[str], classes: list[str]) -> str:
    if set(map(in_nfc, folders)) < set(map(in_nfc, classes)):
        return (
            "; to distinguish only the classes that are there: --class-index FILE, with their "
            "names one a line"
        )
    return ""


def from_class_index(
    source: Source, where: str, classes: list[str] | None, num_outputs: int, path: Path
) -> LabelSet:
    """Take class folders for outputs as a file says; only the outputs that it names compete.

    The file: {"0": ["n01440764", "tench"], …} or {"0": "n01440764", …}, outputs by number; or
    {"n01440764": 0, …}; or a folder a line, which is looked up in `classes`, or, where the network
    does not know them, is the output of that line. Raises DataError.
    """
    output_of = _read_class_index(path, classes, num_outputs)
    wrong = [name for name, output in output_of.items() if not 0 <= output < num_outputs]
    if wrong:
        raise DataError(
            f"{path}: {wrong[0]} is output {output_of[wrong[0]]}, but the network has outputs 0 to "
            f"{num_outputs - 1}"
        )
    if len(set(output_of.values())) < len(output_of):
        raise DataError(f"{path}: names an output twice")
    folders = list(map(in_nfc, source.classes))
    unknown = [name for name in folders if name not in output_of]
    if unknown:
        raise DataError(f"{where}: {len(unknown)} of its folders, {unknown[0]}, … not in {path}")
    competing = np.zeros(num_outputs, bool)
    competing[list(output_of.values())] = True
    return LabelSet(
        "class index",
        np.arange(len(source)),
        np.array([output_of[name] for name in folders]),
        None if competing.all() else competing,
    )


def _read_class_index(path: Path, classes: list[str] | None, num_outputs: int) -> dict[str, int]:
    """Read which folder, its name in NFC, stands for which output."""
    text = read_user_text(path)
    if text.lstrip().startswith("{"):
        mapping = _from_mapping(_parse_json(path, text), path)
        return {in_nfc(name): output for name, output in mapping.items()}
    names = list(map(in_nfc, class_lists.parse(text)))
    if classes is None:
        if len(names) != num_outputs:
            raise DataError(
                f"{path}: {len(names)} names for the network's {num_outputs} outputs, whose "
                'classes it does not know: give all, or JSON that says which is which, {"7": NAME}'
            )
        return {name: i for i, name in enumerate(names)}
    places = {in_nfc(name): i for i, name in enumerate(classes)}
    unknown = [name for name in names if name not in places]
    if unknown:
        raise DataError(f"{path}: {unknown[0]} is not a class of the network")
    return {name: places[name] for name in names}


def _from_mapping(mapping: dict[str, Any], path: Path) -> dict[str, int]:
    """Read both directions of the JSON forms."""
    output_of: dict[str, int] = {}
    for key, value in mapping.items():
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and _NUMBER.fullmatch(key):
            output_of[value] = int(key)
        elif type(value) is int:
            output_of[key] = value
        else:
            raise DataError(
                f"{path}: {key!r} should stand for a class folder, or for an output's number"
            )
    return output_of


def with_real_labels(labels: LabelSet, source: Source, path: Path) -> LabelSet:
    """Take ReaL labels of ImageNet's validation images (Beyer et al., arXiv:2006.07159; real.json).

    The file lists for each image, in order of its number, the classes that are right, by their
    places among the sorted synsets; images with none do not count. Raises DataError.
    """
    listed = _parse_json(path, read_user_text(path))
    is_list_of_lists = isinstance(listed, list) and all(isinstance(entry, list) for entry in listed)
    if not is_list_of_lists or not all(type(o) is int for entry in listed for o in entry):
        raise DataError(f"{path}: should be a list of lists of outputs, one for each image")
    if not all(0 <= o < len(labels.outputs) for entry in listed for o in entry):
        raise DataError(f"{path}: has outputs that the network lacks")
    listed = [sorted(set(entry)) for entry in listed]
    most = max(map(len, listed), default=0)
    several = np.zeros((len(source), max(1, most)), np.int64)
    is_numbered = labels.name == "numbered"  # else the folders are the sorted synsets
    output_of = range(len(labels.outputs)) if is_numbered else labels.outputs
    counting = []
    for index in labels.indices:
        match = VALIDATION_IMAGE.search(source.name(index))
        if match is None or not 1 <= int(match[1]) <= len(listed):
            raise DataError(
                f"{source.name(index)}: not one of the {len(listed):,} images of {path} "
                "(ILSVRC2012_val_00000001 and on)"
            )
        right = [output_of[o] for o in listed[int(match[1]) - 1]]
        if right:
            several[index] = right + [right[0]] * (several.shape[1] - len(right))
            counting.append(index)
    return replace(labels, name="real", indices=np.array(counting, np.int64), several=several)


def only(labels: LabelSet, source: Source, path: Path) -> LabelSet:
    """Keep the images that a file lists (see `_listed`). Raises DataError."""
    return replace(labels, indices=labels.indices[_listed(labels, source, path)])


def without(labels: LabelSet, source: Source, path: Path) -> LabelSet:
    """Leave out the images that a file lists (see `_listed`). Raises DataError."""
    return replace(labels, indices=labels.indices[~_listed(labels, source, path)])


def _listed(labels: LabelSet, source: Source, path: Path) -> np.ndarray:
    """Mark which of the images that count a file lists, one a line: bool [n].

    A line, or its first word, is a file's name, with or without its suffix or folder, or a number,
    as the ImageNet devkit's blacklist has it for validation images. Raises DataError for a line
    that names no image of the source, or several.
    """
    lines = [line.strip() for line in read_user_text(path).splitlines() if line.strip()]
    places: dict[str, list[int]] = {}
    for index in range(len(source)):
        for key in _names(source.name(index).rpartition(": ")[2]):  # of shards, the member's
            places.setdefault(key, []).append(index)
    listed, unknown = np.zeros(len(source), bool), []
    for line in lines:
        word = line.split()[0]
        tried = [*_names(line), *_names(word)]
        if _NUMBER.fullmatch(number := word.lstrip("0")):
            tried.append(validation_name(int(number)))
        place = next((places[key] for key in tried if len(places.get(key, ())) == 1), None)
        if place is None:
            unknown.append(line)
        else:
            listed[place] = True
    if unknown:
        raise DataError(
            f"{path}: {len(unknown):,} of its {len(lines):,} lines name no image here, or several, "
            f"such as {unknown[0]}"
        )
    return listed[labels.indices]


def _names(path: str) -> list[str]:
    """List what an image may be called: with or without its folder, with or without its suffix;
    one of ImageNet's validation images by its number, too."""
    folder, name = PurePath(path).parent.name, PurePath(path).name
    stem, suffix = os.path.splitext(name)
    names = [name, stem] if suffix.lower() in image_extensions() else [name]
    if (match := VALIDATION_IMAGE.search(name)) and match[0] not in names:
        names.append(match[0])  # in shards, and from Hugging Face, more stands around it
    return [f"{folder}/{n}" for n in names] + names if folder else names


def _parse_json(path: Path, text: str) -> Any:
    try:
        return strict_json.parse(text)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def check_not_empty(labels: LabelSet, where: str) -> None:
    """Raise DataError if no image counts."""
    if not len(labels.indices):
        raise DataError(f"{where}: no image is left to evaluate")
