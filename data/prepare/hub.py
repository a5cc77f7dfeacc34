"""Data sets on the Hugging Face hub, downloaded into its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError

from data.errors import DataError

PREFIX = "hf:"


def download(spec: str, patterns: Sequence[str]) -> Path:
    """Download the files of hf:OWNER/NAME or hf:OWNER/NAME@REVISION whose names match a pattern.

    What is there already, whole or in part, is not fetched again; the token is taken from where
    the hub's own programs keep it. Returns the folder. Raises DataError.
    """
    name, _, revision = spec.removeprefix(PREFIX).partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type="dataset", revision=revision or None, allow_patterns=list(patterns)
            )
        )
    except GatedRepoError:
        reason = f"accept its terms at https://huggingface.co/datasets/{name}, then: hf auth login"
    except RepositoryNotFoundError:
        reason = (
            "no such data set, or one that is not shown to you; if it is private: hf auth login"
        )
    except (OSError, ValueError) as error:  # no network, no space; a name that is none
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = f"cannot be downloaded ({line}); the same command goes on"
    raise DataError(f"{spec}: {reason}")
