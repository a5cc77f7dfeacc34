"""ImageNet in WebDataset's tar shards that others made: an index beside them, no byte rewritten."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from data.errors import DataError, enumeration
from data.ilsvrc import Expected
from data.prepare.imagenet import check_counts
from data.prepare.shard_scan import Scan, index_folder
from data.shards.index import INDEX
from data.shards.local import ShardSource


def index_shards(
    tars: Sequence[Path],
    folder: Path,
    split: str,
    expected: Expected,
    workers: int,
    done: Callable[[Scan], None],
) -> ShardSource:
    """Index a split's shards in `folder`, which gets symbolic links to those that lie elsewhere.

    Labels are places in the sorted synsets; where names or descriptions in the shards say the
    synset, the two have to agree. An index that is there is kept. Raises DataError unless the
    images are those expected, and OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    strangers = [name for name in os.listdir(folder) if not name.endswith((".tar", INDEX))]
    if strangers := sorted(name for name in strangers if name[0] != "."):
        raise DataError(f"{folder}: holds other things ({enumeration(strangers)}) than shards")
    for path in tars:
        place = folder / path.name
        if not place.exists():
            place.unlink(missing_ok=True)  # a link to nothing
            place.symlink_to(os.path.realpath(path))
    is_new = not (folder / INDEX).exists()
    if is_new:
        index_folder(folder, list(expected.synsets()), workers, done)
    source = ShardSource(folder)  # refuses shards that are gone
    try:
        counts = dict(zip(source.classes, source.class_counts()))
        check_counts(folder, counts, {}, expected.images(split))
    except DataError:
        if is_new:  # of shards that are still to be completed
            (folder / INDEX).unlink()
        raise
    if source.classes != list(expected.synsets()):
        where = folder / INDEX
        raise DataError(f"{where}: does not name the classes by synsets; remove it and start again")
    return source
