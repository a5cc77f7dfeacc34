"""The YAML a config needs: mappings, lists and plain values, each key once; the rest is refused.

A plain value is null, true, false or a decimal number, and otherwise text. YAML 1.1 would read 3e-4
as text, but 010 as 8, 1:30 as 90, no as false and 2024-01-01 as a date. Tags, which build objects,
and anchors, by which a short file becomes an endless value, are reported by the key they stand at.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from data.files import read_text

MAX_LENGTH = 32_000  # characters, ten times the longest of configs/
MAX_DEPTH = 8  # a config has 3: section, key, item
MAX_NAME = 100

# Python's own int() takes no more than 4,300 digits, and a float holds 308.
_PLAIN = {
    "null": r"(~|[nN]ull)?",
    "bool": r"[tT]rue|[fF]alse",
    "int": r"[-+]?(0|[1-9][0-9]{0,299})",
    "float": r"[-+]?(?=.*[.eE])([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?",
}
# Ends of lines and halves of characters among them: a message has to fit in a line.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class _Refusal(ValueError):
    """Valid YAML, but nothing that a config needs."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {
        None: [(f"tag:yaml.org,2002:{k}", re.compile(rf"({v})\Z")) for k, v in _PLAIN.items()]
    }
    path: tuple[str, ...] = ()  # keys and numbers that lead to what is being read

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Read a key (index: None), the value of a key (its node) or an item (its number)."""
        event, outside = self.peek_event(), self.path
        is_key, text = index is None and parent is not None, getattr(event, "value", None)
        if is_key and (text is None or len(text) > MAX_NAME):
            raise self.refusal("a key must be a name")
        if parent is not None:
            self.path = (*outside, text if is_key else str(getattr(index, "value", index)))
        if event.anchor:
            raise self.refusal(f"no anchors and aliases (&{event.anchor}, *{event.anchor})")
        if event.tag:
            raise self.refusal(f"no tags ({event.tag})")
        if control := _CONTROL.search(text or ""):
            raise self.refusal(f"no control characters ({control[0]!r})")
        if len(self.path) > MAX_DEPTH:
            raise self.refusal("nested too deep")
        if is_key:
            names = vars(parent).setdefault("names", set())  # of the mapping so far
            if text in names:
                raise self.refusal("written twice; keep one")
            names.add(text)
        node = super().compose_node(parent, index)
        if is_key:
            node.tag = self.DEFAULT_SCALAR_TAG  # 1 and null are names, too
        self.path = outside
        return node

    def refusal(self, reason: str) -> _Refusal:
        """Make the error for what comes next in the text."""
        where = [_CONTROL.sub("?", ".".join(self.path))] if self.path else []
        line = self.peek_event().start_mark.line + 1
        return _Refusal(": ".join([*where, f"line {line}", reason]))


def load(path: Path) -> Any:
    """Read a file of such YAML. Raises OSError, or ValueError in one line."""
    return parse(read_text(path, 4 * MAX_LENGTH))


def parse(text: str) -> Any:
    """YAML text -> plain Python values. Raises ValueError, in one line, for anything else."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"longer than {MAX_LENGTH:,} characters; that is not a config")
    try:
        loader = _Loader(text)
        value = loader.get_data()
        if loader.check_data():
            raise loader.refusal("a second document; keep one")
        return value
    except _Refusal:
        raise
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: not valid YAML: character {error.character:#x}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # from PyYAML: "\UFFFFFFFF"
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
