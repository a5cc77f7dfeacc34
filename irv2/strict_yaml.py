"""The YAML a config needs: mappings, lists and plain values, each key once; the rest is refused.

A plain value is null, true, false or a decimal number, and otherwise text. YAML 1.1 would read 3e-4
as text, but 010 as 8, 1:30 as 90, no as false and 2024-01-01 as a date. Tags, which build objects,
and anchors, by which a short file becomes an endless value, are told by the key they stand at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import yaml

MAX_LENGTH = 32_000  # characters, ten times the longest of configs/
MAX_DEPTH = 8  # a config has 3: section, key, item
MAX_NAME = 100

_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_WORDS |= {word.capitalize(): value for word, value in _WORDS.items()}
# Python's own int() takes no more than 4,300 digits, and a float holds 308.
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,299})")
_FRACTION = re.compile(r"[-+]?(?=.*[.eE])([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
# Ends of lines and halves of characters among them: a message has to fit in a line.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def parse(text: str) -> Any:
    """YAML text -> plain Python values. Raises ValueError, in one line, for anything else."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"longer than {MAX_LENGTH:,} characters; that is no config")
    events = _events(text)
    first = next(events)
    value = None if isinstance(first, yaml.StreamEndEvent) else _value(events, next(events), ())
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            raise _refusal(event, (), "a second document; keep one")
    return value


def _events(text: str) -> Iterator[yaml.Event]:
    """What PyYAML's parser finds in the text, after the start of the stream."""
    try:
        events = yaml.parse(text, yaml.SafeLoader)
        next(events)
        yield from events
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: not valid YAML: character {error.character:#x}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # from PyYAML: "\UFFFFFFFF"
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None


def _value(events: Iterator[yaml.Event], event: yaml.Event, path: tuple[str, ...]) -> Any:
    """The value that starts with `event`; `path` leads to it."""
    _check(event, path)
    if isinstance(event, yaml.MappingStartEvent):
        return _mapping(events, path)
    if isinstance(event, yaml.SequenceStartEvent):
        items = takewhile(lambda event: not isinstance(event, yaml.SequenceEndEvent), events)
        return [_value(events, item, (*path, str(i))) for i, item in enumerate(items)]
    return _plain(event.value) if event.implicit[0] else event.value


def _mapping(events: Iterator[yaml.Event], path: tuple[str, ...]) -> dict[str, Any]:
    """The mapping whose start has been read."""
    entries: dict[str, Any] = {}
    for key in takewhile(lambda event: not isinstance(event, yaml.MappingEndEvent), events):
        if not isinstance(key, yaml.ScalarEvent) or len(key.value) > MAX_NAME:
            raise _refusal(key, path, "a key must be a name")
        inside = (*path, key.value)
        _check(key, inside)
        if key.value in entries:
            raise _refusal(key, inside, "written twice; keep one")
        entries[key.value] = _value(events, next(events), inside)
    return entries


def _check(event: yaml.Event, path: tuple[str, ...]) -> None:
    """Raise ValueError if the event asks for more than plain values."""
    if event.anchor:
        raise _refusal(event, path, f"no anchors and aliases (&{event.anchor}, *{event.anchor})")
    if event.tag:
        raise _refusal(event, path, f"no tags ({event.tag})")
    if isinstance(event, yaml.ScalarEvent) and (control := _CONTROL.search(event.value)):
        raise _refusal(event, path, f"no control characters ({control[0]!r})")
    if len(path) > MAX_DEPTH:
        raise _refusal(event, path, "nested too deep")


def _refusal(event: yaml.Event, path: tuple[str, ...], reason: str) -> ValueError:
    """The error for what is valid YAML, but nothing that a config needs."""
    where = [_CONTROL.sub("?", ".".join(path))] if path else []
    return ValueError(": ".join([*where, f"line {event.start_mark.line + 1}", reason]))


def _plain(text: str) -> Any:
    """The value of an unquoted scalar."""
    if text in _WORDS:
        return _WORDS[text]
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _FRACTION.fullmatch(text) else text
