"""The configuration of hosts that a command starts: a YAML file, and the command's own options over it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import ValidationError

from distriray.errors import InvalidRequest
from distriray.gang.config import HostConfig, merged
from distriray.models import ModelSpec
from distriray.names import KINDS
from distriray.validation import invalid_request

_LISTS = tuple(kind.option for kind in KINDS.values())


def read_config(
    path: Path | None, options: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})
) -> HostConfig:
    """The fields that a file has; those of `options` go before its own, and its own before `defaults`.

    That is so at any depth, and what is None counts as left out. Files and folders that are there are named
    by their whole paths then, as workers may be in other folders than whoever names them. A model of another
    name than the file's has none of that one's fields, such as its revision.

    Args:
        path: of YAML with fields of a HostConfig; None is no file.

    Raises:
        InvalidRequest: the file cannot be read, or what it says with the options is no configuration.
    """
    read, given = {} if path is None else _fields(path), _given(options)
    if _names_another_model(given, read):
        del read["model"]
    fields = merged(merged(defaults, read), given)
    try:
        return HostConfig.model_validate(_with_whole_paths(fields))
    except ValidationError as error:
        refusal = invalid_request(error)
        if path is None:
            raise refusal from None
        raise InvalidRequest(f"pool {path}: {refusal}", "pool") from None


def _fields(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidRequest(f"pool {path} cannot be read: {error}", "pool") from error
    if not isinstance(fields, dict):
        raise InvalidRequest(f"pool {path} has no fields; it may have those of a HostConfig", "pool")
    if isinstance(fields.get("model"), str):
        fields["model"] = {"name": fields["model"]}
    return _given(fields)


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None, at any depth, and what has nothing else: it would hide what it goes before."""
    given = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            value = _given(value) or None
        if value is not None:
            given[name] = value
    return given


def _names_another_model(given: dict[str, Any], read: dict[str, Any]) -> bool:
    """Whether the options name another model than the file does, of which the built-in one needs no name."""
    own = read.get("model")
    named = given.get("model", {}).get("name")
    return isinstance(own, dict) and named not in (None, own.get("name", ModelSpec().name))


def _with_whole_paths(fields: dict[str, Any]) -> dict[str, Any]:
    whole = {
        name: [_with_whole_path(entry) for entry in fields[name]]
        for name in _LISTS
        if isinstance(fields.get(name), list)
    }
    folders = {
        name: str(_whole(fields[name]))
        for name in ("lora_dir", "profiles")
        if isinstance(fields.get(name), str | Path)
    }
    return fields | whole | folders


def _with_whole_path(entry: Any) -> Any:
    """An entry of a list, whose source may be a Hugging Face id as well."""
    if not isinstance(entry, dict) or not os.path.exists(os.path.expanduser(str(entry.get("source")))):
        return entry
    return {**entry, "source": str(_whole(entry["source"]))}


def _whole(path: str | Path) -> Path:
    return Path(os.path.expanduser(path)).absolute()  # Path's own raises where there is no such user
