"""Checks of the images: classes, counts, files that cannot be decoded, images in both splits."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from data.errors import DataError
from data.files import write_atomically
from data.names import in_order, shown
from data.prepare import checkup
from data.prepare.look_alikes import NEAR_BITS, look_alikes
from data.sources import SyntheticSource
from data.workers import usable_cores
from irv2 import input_pipeline
from irv2.report.statistics import wilson
from scripts.checks.case import FAIL, OK, WARN, Case, Finding

IMAGENET = {"train": 1_281_167, "val": 50_000}  # ILSVRC2012
MAX_IMBALANCE = 10  # largest class : smallest class; ImageNet's is 1.8
MAX_SHARED = 0.01  # share of validation images that may also be training images
NOTED = "if that is not what you want, mend it there; the run takes what is left"
SHOWN = 20  # files of a kind
SHOWN_ALIKE = 10  # pairs
UNKNOWN_SIZES = 20  # training images compared per validation image where each has to be read


def check_sources(case: Case) -> Iterator[Finding]:
    """Check that both splits open and have the same classes; sets `case.train` and `case.val`."""
    data = case.cfg.data
    for split in ("train", "val"):
        spec = getattr(data, split)
        try:
            setattr(case, split, input_pipeline.open_source(spec, data, case.cfg.run.timeout_s))
        except DataError as error:
            yield Finding(FAIL, str(error), f"set data.{split}=… or fix what is there")
    if case.train is None or case.val is None:
        return
    try:
        case.val = input_pipeline.check_sources(case.cfg, case.train, case.val)
    except DataError as error:
        yield Finding(FAIL, str(error), "train.py would refuse them with the same words")
        return
    for source in (case.train, case.val):
        yield from (Finding(WARN, line, NOTED) for line in source.remarks)
    classes = case.val.classes
    what = f"the same {len(classes)} classes, {in_order(classes)}"
    yield Finding(OK, f"{data.train} and {data.val}: {what}")


def check_counts(case: Case) -> Iterator[Finding]:
    """Count the images, in all and of each class."""
    for split in ("train", "val"):
        source = getattr(case, split)
        yield count_finding(split, source.classes, np.array(source.class_counts()))


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
        todo = f"ILSVRC2012 has {IMAGENET[split]:,}: check what is missing or extra"
        return Finding(WARN, what, todo, figures=figures)
    if most > MAX_IMBALANCE * fewest:
        todo = "top-1 will speak of the large classes: add to the small ones, or leave them out"
        return Finding(WARN, what, todo, figures=figures)
    return Finding(OK, what, figures=figures)


def check_decoding(case: Case) -> Iterator[Finding]:
    """Check that images can be read and decoded; writes --bad-files."""
    everything: list[checkup.BadImage] = []
    for split in ("train", "val"):
        source = getattr(case, split)
        indices = case.selected(source)
        bad = checkup.bad_images(source, indices, usable_cores())
        everything += bad
        allowed = case.cfg.data.max_bad_fraction if split == "train" else 0.0
        yield decoding_finding(split, bad, len(indices), len(source), allowed)
    path = case.options.bad_files
    if path is not None:
        text = "".join(f"{_in_a_line(name)}\t{reason}\n" for name, reason in everything)
        write_atomically(path, text.encode("utf-8", "surrogateescape"))


def _in_a_line(name: str) -> str:
    """A name as it is, but that it cannot end its line, nor name another file in the next."""
    return re.sub(r"[\0-\x1f\x85\u2028\u2029]", lambda match: shown(match[0]), name)


def decoding_finding(
    split: str, bad: list[checkup.BadImage], looked: int, length: int, allowed: float
) -> Finding:
    """Judge the bad images among those looked at, of `length`; `allowed`: their share."""
    what = f"{split}: {len(bad):,} of {looked:,} images looked at cannot be decoded"
    share = len(bad) / looked  # at least
    if looked < length:
        bounds = wilson(len(bad), looked)
        share = bounds.low / 100
        what += f" (of all {length:,}: {bounds.low:.3f}% to {bounds.high:.3f}%, 95 % confidence)"
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
    """Check that no validation images are training images, too, byte for byte."""
    if any(isinstance(source, SyntheticSource) for source in (case.train, case.val)):
        yield Finding(OK, "synthetic images: not compared")
        return
    indices = case.selected(case.val)
    limit = len(case.train) if case.options.scan is None else UNKNOWN_SIZES * len(indices)
    same = checkup.same_images(case.val, indices, case.train, limit, usable_cores())
    both = {index for index, _ in same.pairs}
    what = (
        f"{len(both):,} of {len(indices):,} (all: {len(case.val):,}) val images are among "
        f"{same.compared:,} (all: {len(case.train):,}) train images, byte for byte"
    )
    figures = {"same": len(both), "val_images": len(indices), "train_images": same.compared}
    details = [f"{case.val.name(v)} = {case.train.name(t)}" for v, t in same.pairs[:SHOWN]]
    todo = "remove them from train: the network would be tested on what it was trained on"
    level = OK if not both else FAIL if len(both) > MAX_SHARED * len(indices) else WARN
    yield Finding(level, what, todo if both else "", details, figures)
    if case.options.near_duplicates:
        yield _look_alikes(case, indices, limit)


def _look_alikes(case: Case, indices: list[int], limit: int) -> Finding:
    """Judge validation images that look like training images, of which `limit` are compared."""
    pairs, compared = look_alikes(case.val, indices, case.train, limit, usable_cores())
    what = (
        f"{len(pairs):,} of {len(indices):,} val images look like one of {compared:,} (all: "
        f"{len(case.train):,}) train images: at most {NEAR_BITS} of 64 bits of a perceptual hash "
        "differ"
    )
    details = [
        f"{case.val.name(pair.here)} ~ {case.train.name(pair.there)} ({pair.bits} bits)"
        for pair in pairs[:SHOWN_ALIKE]
    ]
    todo = "look at them: a copy, scaled or encoded anew, should not be in both"
    figures = {"alike": len(pairs), "val_images": len(indices), "train_images": compared}
    return Finding(WARN if pairs else OK, what, todo if pairs else "", details, figures)
