"""Checks of the images: classes, counts, files that cannot be decoded, images in both splits."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

import feed
from data import sources
from data.prepare import checkup
from data.sources import DataError
from irv2 import checkpoint
from scripts.checks.case import FAIL, OK, WARN, Case, Finding

IMAGENET = {"train": 1_281_167, "val": 50_000}  # ILSVRC2012
MAX_IMBALANCE = 10  # largest class : smallest class; ImageNet's is 1.8
MAX_SHARED = 0.01  # share of validation images that may also be training images
SHOWN = 20  # files of a kind
UNKNOWN_SIZES = 20  # training images compared for each validation image where all would be read


def check_sources(case: Case) -> Iterator[Finding]:
    """Whether both splits open and have the same classes; sets `case.train` and `case.val`."""
    for split in ("train", "val"):
        spec = getattr(case.cfg.data, split)
        try:
            setattr(case, split, sources.open_source(spec))
        except DataError as error:
            yield Finding(FAIL, str(error), f"set data.{split}=… or mend what is there")
    if case.train is None or case.val is None:
        return
    data = case.cfg.data
    try:
        feed.check_sources(case.cfg, case.train, case.val)
    except DataError as error:
        yield Finding(FAIL, str(error), "train.py would refuse them with the same words")
        return
    yield Finding(OK, f"{data.train} and {data.val}: the same {len(case.val.classes)} classes")


def check_counts(case: Case) -> Iterator[Finding]:
    """How many images there are, in all and of each class."""
    for split in ("train", "val"):
        source = getattr(case, split)
        yield count_finding(split, source.classes, checkup.class_counts(source))


def count_finding(split: str, classes: list[str], counts: np.ndarray) -> Finding:
    """Judge the images of each class: int64 [classes]."""
    small, large = int(counts.argmin()), int(counts.argmax())
    total, fewest, most = int(counts.sum()), int(counts[small]), int(counts[large])
    span = f"{fewest:,} ({classes[small]}) to {most:,} ({classes[large]})"
    span = span if fewest < most else f"{fewest:,} each"
    what = f"{split}: {total:,} images of {len(classes):,} classes, {span}"
    figures = {"split": split, "images": total, "smallest_class": fewest, "largest_class": most}
    is_imagenet = len(classes) == 1000 and all(re.fullmatch(r"n\d{8}", c) for c in classes)
    if is_imagenet and total != IMAGENET[split]:
        todo = f"ILSVRC2012 has {IMAGENET[split]:,}: see what is missing or too much"
        return Finding(WARN, what, todo, figures=figures)
    if most > MAX_IMBALANCE * fewest:
        todo = "top-1 will speak of the large classes: add to the small ones, or leave them out"
        return Finding(WARN, what, todo, figures=figures)
    return Finding(OK, what, figures=figures)


def check_decoding(case: Case) -> Iterator[Finding]:
    """Whether images can be read and decoded; writes --bad-files."""
    everything: list[checkup.BadImage] = []
    for split in ("train", "val"):
        source = getattr(case, split)
        indices = case.looked_at(source)
        bad = checkup.bad_images(source, indices, case.processes)
        everything += bad
        allowed = case.cfg.data.max_bad_fraction if split == "train" else 0.0
        yield decoding_finding(split, bad, len(indices), len(source), allowed)
    path = case.request.bad_files
    if path is not None:
        text = "".join(f"{name}\t{reason}\n" for name, reason in everything)
        content = text.encode("utf-8", "surrogateescape")
        checkpoint.write_atomically(path, lambda file: file.write(content))


def decoding_finding(
    split: str, bad: list[checkup.BadImage], looked: int, length: int, allowed: float
) -> Finding:
    """Judge the bad images among those looked at, of `length`; `allowed`: their share."""
    what = f"{split}: {len(bad):,} of {looked:,} images looked at cannot be decoded"
    share = len(bad) / looked  # at least
    if looked < length:
        share, high = checkup.share_interval(len(bad), looked)
        what += f" (of all {length:,}: {share:.3%} to {high:.3%}, 95 % confidence)"
    figures = {"split": split, "bad": len(bad), "looked_at": looked, "images": length}
    details = [f"{name}: {reason}" for name, reason in bad[:SHOWN]]
    if len(bad) > SHOWN:
        details.append(f"… and {len(bad) - SHOWN:,} more")
    if not bad:
        return Finding(OK, what, figures=figures)
    todo = "mend or remove them (--bad-files OUT lists them all)"
    if split == "val":
        todo = f"evaluation leaves nothing out, and will end the run: {todo}"
        return Finding(FAIL, what, todo, details, figures)
    if share > allowed:
        todo = f"data.max_bad_fraction={allowed:g} will end the run: {todo}, or allow more"
        return Finding(FAIL, what, todo, details, figures)
    todo = f"they will be replaced, up to data.max_bad_fraction={allowed:g}; {todo}"
    return Finding(WARN, what, todo, details, figures)


def check_duplicates(case: Case) -> Iterator[Finding]:
    """Whether validation images are training images, too, byte for byte."""
    if any(isinstance(source, sources.SyntheticSource) for source in (case.train, case.val)):
        yield Finding(OK, "synthetic images: not compared")
        return
    indices = case.looked_at(case.val)
    limit = len(case.train) if case.request.scan is None else UNKNOWN_SIZES * len(indices)
    found = checkup.same_images(case.val, indices, case.train, limit, case.processes)
    both = {index for index, _ in found.pairs}
    what = (
        f"{len(both):,} of {len(indices):,} (all: {len(case.val):,}) val images are among "
        f"{found.compared:,} (all: {len(case.train):,}) train images, byte for byte"
    )
    figures = {"same": len(both), "val_images": len(indices), "train_images": found.compared}
    details = [f"{case.val.name(v)} = {case.train.name(t)}" for v, t in found.pairs[:SHOWN]]
    todo = "remove them from train: the network would be asked what it has been told"
    level = OK if not both else FAIL if len(both) > MAX_SHARED * len(indices) else WARN
    yield Finding(level, what, todo if both else "", details, figures)
