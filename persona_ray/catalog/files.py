"""Reads the catalogue's files into plain values: YAML without repeated keys, JSON, JSON lines.

Knows nothing of archetypes. Whatever cannot be read is an InputError of one line that names the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from persona_ray.errors import InputError

_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml where it is there: it reads the built-in catalogue in a tenth of the time."""


def read_yaml(path: Path) -> Any:
    """The document in `path`. A key that appears twice in one mapping is an InputError; plain YAML would drop the first."""
    text = read_text(path)
    try:
        loader = _YamlLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_repeated_keys(node, path)
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error


def read_json(path: Path) -> Any:
    """The document in `path`."""
    return _parse_json(read_text(path), where=str(path))


def read_json_lines(path: Path) -> list[tuple[str, Any]]:
    """Every line of `path` that is not blank, as (place for messages, value)."""
    lines = enumerate(read_text(path).splitlines(), start=1)
    return [(place := f"{path} line {number}", _parse_json(line, where=place)) for number, line in lines if line.strip()]


def read_text(path: Path) -> str:
    """The UTF-8 text in `path`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error}") from error


def _refuse_repeated_keys(node: yaml.Node, path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise InputError(f"{path} line {key.start_mark.line + 1}: {key.value!r} is there twice; rename or remove one")
            seen.add(key.value)
            _refuse_repeated_keys(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, path)
