"""The three archives of ILSVRC2012 in miniature: the same structure, 4 classes, 22 images.

As in the originals, ids, WordNet ids and the order in the archives are three different orders, the
numbers in file names have no fixed width, and some files are not what their names say.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
from image_zoo import zoo
from PIL import Image
from scipy.io import savemat
from tars import Entry, tar

from data.ilsvrc import ILSVRC2012, Archive, Expected

IDS = {1: "n02119789", 2: "n02100735", 3: "n02105855", 4: "n01440764"}
HIGH_LEVEL = {
    1001: ("n00001740", [1002, 1003]),
    1002: ("n00015388", [1, 2, 3]),
    1003: ("n02512053", [4]),
}
NUMBERS = {  # of the training images, in the archive's order
    "n02100735": [10, 9, 100, 2],
    "n01440764": [10026, 18, 1],
    "n02119789": [7, 77, 7777, 8, 80],
    "n02105855": [2933, 30],
}
VAL_IDS = [3, 1, 2, 4, 4, 2, 1, 3]
ROLES = ("devkit", "train", "val")
BLACKLIST = b"2\n5\n"


def photograph(seed: int) -> bytes:
    """A JPEG file; its bytes differ with the seed, and so does its size."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8 + seed, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def train_images() -> dict[str, list[Entry]]:
    """Members of each inner archive; n02105855_2933.JPEG is a PNG, as in the original."""
    images = {
        synset: [(f"{synset}_{i}.JPEG", photograph(k * 10 + n)) for n, i in enumerate(numbers)]
        for k, (synset, numbers) in enumerate(NUMBERS.items())
    }
    specimens = zoo()
    images["n02105855"][0] = "n02105855_2933.JPEG", specimens["png_named.jpeg"].encoded
    images["n02119789"][1] = "n02119789_77.JPEG", specimens["broken_exif.jpg"].encoded
    images["n02119789"][2] = "n02119789_7777.JPEG", specimens["cmyk.jpg"].encoded
    return images


def val_images() -> list[Entry]:
    """In no order; the third is CMYK."""
    contents = [photograph(60 + i) for i in range(len(VAL_IDS))]
    contents[2] = zoo()["cmyk.jpg"].encoded
    return [(f"ILSVRC2012_val_{i + 1:08d}.JPEG", contents[i]) for i in (4, 0, 7, 2, 1, 6, 3, 5)]


def devkit_files() -> dict[str, bytes]:
    """Files of the folder data/."""
    return {
        "meta.mat": meta(IDS),
        "ILSVRC2012_validation_ground_truth.txt": "".join(f"{i}\n" for i in VAL_IDS).encode(),
        "ILSVRC2012_validation_blacklist.txt": BLACKLIST,
    }


def meta(ids: dict[int, str]) -> bytes:
    """meta.mat: a struct array with the fields that the development kit's readme.txt lists."""
    low = [(i, wnid, [], 0, len(NUMBERS.get(wnid, []))) for i, wnid in ids.items()]
    high = [(i, wnid, children, 3, 0) for i, (wnid, children) in HIGH_LEVEL.items()]
    fields = "ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images"
    synsets = np.zeros((len(low) + len(high), 1), [(field, object) for field in fields.split()])
    for row, (i, wnid, children, height, images) in enumerate(low + high):
        told = f"thing {i}, object {i}", f"what {i} means"
        synsets[row, 0] = (i, wnid, *told, len(children), children, height, images)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    return buffer.getvalue()


def train_tar(images: dict[str, list[Entry]]) -> bytes:
    return tar((f"{synset}.tar", tar(entries)) for synset, entries in images.items())


def devkit_tar(files: dict[str, bytes]) -> bytes:
    top = tarfile.TarInfo("ILSVRC2012_devkit_t12")
    folder = tarfile.TarInfo("ILSVRC2012_devkit_t12/data")
    top.type = folder.type = tarfile.DIRTYPE
    readme = ("ILSVRC2012_devkit_t12/readme.txt", b"This is the documentation")
    entries = [(f"{folder.name}/{name}", content) for name, content in files.items()]
    return tar([top, readme, folder, *entries], "w:gz")


def write_archives(
    folder: Path, train: bytes = b"", val: bytes = b"", devkit: bytes = b""
) -> Expected:
    """Write the archives, or others in their place, and say what they are expected to be."""
    folder.mkdir(exist_ok=True)
    contents = {
        "devkit": devkit or devkit_tar(devkit_files()),
        "train": train or train_tar(train_images()),
        "val": val or tar(val_images()),
    }
    archives = {}
    for role, content in contents.items():
        name = getattr(ILSVRC2012, role).name
        (folder / name).write_bytes(content)
        archives[role] = Archive(name, hashlib.md5(content).hexdigest(), len(content))
    return expected(**archives)


def expected(**archives: Archive) -> Expected:
    """Contents of the miniature; of archives that are not given only the name."""
    unknown = {role: getattr(ILSVRC2012, role)._replace(size=None) for role in ROLES}
    return Expected(
        **(unknown | archives),
        classes=len(IDS),
        train_images=14,
        val_images=len(VAL_IDS),
        synsets=lambda: sorted(NUMBERS),
    )


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: relative path -> content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
