"""Which form a file or folder of weights has, by its content; those that are not read, by name."""

from __future__ import annotations

import zipfile
from pathlib import Path

from irv2.network.forms.base import WeightsError

HDF5 = b"\x89HDF\r\n\x1a\n"
TABLE = 0xDB4775248B80FB57.to_bytes(8, "little")  # the end of TensorFlow's tables (LevelDB's)
STATE_DICT = "save its state_dict() alone with torch.save"

# What other files begin with: their form, and what to do.
BEGINNINGS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file: run git lfs pull",
    b"<": "a web page, not weights: the download failed",
    b"\x1f\x8b": "packed by gzip: unpack it and give what is in it",
    b"BZh": "packed by bzip2: unpack it and give what is in it",
    b"\xfd7zXZ": "packed by xz: unpack it and give what is in it",
}
ENDINGS = {
    ".onnx": "an ONNX graph, which has no layers' names: give the weights that it was made from",
    ".tflite": "a TFLite graph: give the checkpoint that it was made from",
    ".pb": "a TensorFlow graph: give the checkpoint that it was made from",
    ".npz": "NumPy arrays: give the weights as the framework that trained them saved them",
    ".npy": "a NumPy array: give the weights as the framework that trained them saved them",
    ".mlmodel": "a Core ML graph: give the weights that it was made from",
    ".engine": "a TensorRT engine: give the weights that it was made from",
}
# Members of archives, with "/" before them, and what these are.
MEMBERS = {
    "/constants.pkl": f"a TorchScript program: load it with torch.jit.load, and {STATE_DICT}",
    "/archive_format": f"a program of torch.export: load it, and {STATE_DICT}",
}
# Files in folders, and what these are.
FOLDERS = {
    "saved_model.pb": "TensorFlow's SavedModel: give a checkpoint, or Keras' .keras or .h5",
    "checkpoint": "a folder of TensorFlow's checkpoints: give one, as FOLDER/model.ckpt-123",
    ".metadata": "a distributed checkpoint: make one file of it with "
    "torch.distributed.checkpoint.format_utils.dcp_to_torch_save",
    "config.yaml": "a run: give it as --run",
    "meta.json": "a checkpoint of a run: give the run as --run",
}


def of_file(path: Path) -> str:
    """Return "safetensors", "pytorch", "keras" or "tensorflow". Raises WeightsError for others."""
    with open(path, "rb") as file:
        start = file.read(32)
        file.seek(max(0, path.stat().st_size - len(TABLE)))
        end = file.read()
    if start.startswith(HDF5):
        return "keras"
    if end == TABLE:
        return "tensorflow"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "safetensors"
    names = _members(path)
    if "/model.weights.h5" in names:
        return "keras"
    refusals = [
        *(words for begin, words in BEGINNINGS.items() if start.startswith(begin)),
        *(words for end, words in MEMBERS.items() if any(name.endswith(end) for name in names)),
        *(words for ending, words in ENDINGS.items() if path.suffix.lower() == ending),
    ]
    if refusals:
        raise WeightsError(f"{path}: is {refusals[0]}")
    return "safetensors" if path.suffix == ".safetensors" else "pytorch"


def _members(path: Path) -> set[str]:
    """Names in an archive, with "/" before them; none of another file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {f"/{name}" for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return set()  # of one that is damaged its reader says so


def refuse_folder(folder: Path, needed: str) -> None:
    """Raise WeightsError for a folder that is not in timm's form."""
    reasons = (words for name, words in FOLDERS.items() if (folder / name).exists())
    what = next(reasons, f"a folder without {needed}: give a file of weights, or a run as --run")
    raise WeightsError(f"{folder}: is {what}")
