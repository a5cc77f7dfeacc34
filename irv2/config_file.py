"""Reading a config: YAML file and overrides -> `Config`, every mistake reported at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data.errors import UserError
from data.names import without_secrets
from irv2 import strict_yaml
from irv2.config import FIELDS, Config
from irv2.sections import OF_ANY_OPTIMIZER


class ConfigError(UserError):
    """The config cannot be used; the message lists every fault, one a line."""


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """YAML file + "section.key=value" overrides -> Config. Raises ConfigError with every fault."""
    path = Path(path)
    try:
        tree = strict_yaml.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold sections such as data: and train:")
    # A section whose lines are all commented out is null in YAML: as good as left out.
    tree = {key: {} if value is None else value for key, value in tree.items()}
    name = path.stem if path.stem.strip(".") else "run"  # "...yaml" would lead out of runs/
    return from_tree(_overridden(tree, _parsed(overrides)), default_name=name)


def from_tree(tree: dict[str, Any], default_name: str = "run") -> Config:
    """Nested dict -> Config. Raises ConfigError with every fault."""
    # Empty sections stand in for absent ones, so that required keys are asked for by name.
    tree = {section: {} for section in Config.model_fields} | tree
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(*map(_explain, error.errors())) from None
    if config.run.name is None:
        run = config.run.model_copy(update={"name": default_name})
        config = config.model_copy(update={"run": run})
    return config


def _parsed(overrides: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Parse "section.key=value" into section -> key -> value; of one key the last counts."""
    own: dict[str, dict[str, Any]] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and section and name) or "://" in key:
            raise ConfigError(
                f"{without_secrets(override)}: an override is written section.key=value"
            )
        try:
            own.setdefault(section, {})[name] = strict_yaml.parse(value)
        except ValueError as error:
            raise ConfigError(f"{without_secrets(override)}: {error}") from None
    return own


def _overridden(tree: dict[str, Any], own: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Put overrides into a file's sections. If they name another optimizer, none of what the file
    says of its own is kept."""
    for section in own:
        if not isinstance(tree.get(section, {}), dict):
            raise ConfigError(f"{section}: must be a section of key: value lines")
    merged = tree | {section: tree.get(section, {}) | keys for section, keys in own.items()}
    kind = own.get("optim", {}).get("kind")
    if kind is not None and kind != tree.get("optim", {}).get("kind", "rmsprop_tf"):
        kept = {key: tree["optim"][key] for key in OF_ANY_OPTIMIZER if key in tree.get("optim", {})}
        merged["optim"] = kept | own["optim"]
    return merged


def _explain(fault: Any) -> str:
    """One pydantic fault -> key, value, reason and, for an unknown name, the nearest valid one."""
    key = ".".join(str(part) for part in fault["loc"])
    value = without_secrets(repr(fault["input"]))
    stated = f"{key}={value if len(value) <= 100 else value[:99] + '…'}"
    if fault["type"] == "missing":
        return f"{key}: must be given (in the YAML, or as {key}=… on the command line)"
    if fault["type"] == "extra_forbidden":
        return f"{stated}: unknown key; {_nearest(*fault['loc'])}"
    if fault["type"] == "value_error":
        return f"{stated}: {fault['ctx']['error']}" if key else str(fault["ctx"]["error"])
    return f"{stated}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _nearest(section: str, name: str | None = None) -> str:
    """Words that lead from an unknown section, or an unknown key of a known one, to what was meant.

    The reader may have written a key outside of its section, or in another one.
    """
    close = [key for key in FIELDS if key.partition(".")[2] == (section if name is None else name)]
    if name is not None:
        close = close or difflib.get_close_matches(
            f"{section}.{name}".lower(), list(FIELDS), 1, 0.75
        )
        own = [key.partition(".")[2] for key in FIELDS if key.startswith(f"{section}.")]
        known = f"keys of {section}: {', '.join(own)}"
    elif section in FIELDS or close:
        home, _, inner = (close or [section])[0].partition(".")
        return f"write it as {home}: {{{inner}: …}}"
    else:
        close = difflib.get_close_matches(section.lower(), Config.model_fields, 1)
        known = f"sections: {', '.join(Config.model_fields)}"
    return f"did you mean {close[0]}? {known}" if close else known


def describe() -> str:
    """The table of keys that `train.py --help` prints."""
    lines = ["keys (default) of the YAML file, also given as section.key=value:"]
    for key, field in FIELDS.items():
        default = "required" if field.is_required() else json.dumps(field.default)
        lines.append(f"  {key} ({default})\n      {field.description}")
    return "\n".join(lines)
