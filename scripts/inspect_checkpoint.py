#!/usr/bin/env python3
"""Show what a checkpoint holds, and check every byte of it against its SHA-256.

  python scripts/inspect_checkpoint.py runs/quickstart
  python scripts/inspect_checkpoint.py runs/quickstart/checkpoints/step-000000060

For a run directory the newest good checkpoint is shown, after a line for each newer one that is
damaged. Exit status: 0 a whole checkpoint is shown, 1 there is none.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.names import shown
from irv2 import cli
from irv2.run import checkpoint, directory, resume
from irv2.run.checkpoint import Checkpoint


def describe(loaded: Checkpoint) -> str:
    """Return a table of a checkpoint and its files."""
    meta = loaded.meta
    in_a_row = meta["bad_steps_in_a_row"]
    rows = [
        ("checkpoint", str(loaded.path)),
        ("step", f"{meta['step']:,}"),
        ("images seen", f"{meta['images_seen']:,}"),
        ("epochs", f"{meta['images_seen'] / meta['images_per_epoch']:.3f}"),
        ("bad steps", f"{meta['bad_steps']:,}" + (f", {in_a_row} just before" if in_a_row else "")),
        ("bad images", f"{meta['bad_images']:,}"),
        ("classes", f"{len(meta['classes']):,}"),
        ("written by", ", ".join(f"{name} {value}" for name, value in meta["software"].items())),
    ]
    lines = [f"{name:<12} {shown(value)}" for name, value in rows]
    lines += ["", f"{'file':<22} {'tensors':>7} {'bytes':>13}  SHA-256 of what was read"]
    for name, digest in loaded.sums.items():
        part = loaded.parts.get(name.removesuffix(".safetensors"))
        tensors = "" if part is None else len(part)
        lines.append(
            f"{name:<22} {tensors:>7} {(loaded.path / name).stat().st_size:>13,}  {digest}"
        )
    return "\n".join([*lines, "", "every file is as it was saved"])


@cli.program
def main() -> int:
    """Command line -> exit status."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("path", type=cli.path, help="a run directory, or one of its checkpoints")
    path = parser.parse_args().path
    is_run = path.is_dir() and directory.checkpoints(path)
    loaded = resume.load_newest(path, cli.say) if is_run else checkpoint.load(path)
    print(describe(loaded))
    return 0


if __name__ == "__main__":
    sys.exit(main())
