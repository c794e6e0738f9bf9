"""docs/configuration.md names every field of every configuration, with its default."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from deployments.config import AppConfig, HostConfig, PoolConfig, RouterConfig
from deployments.http.config import HttpConfig
from distriray.adapters import AdapterSpec
from distriray.config import ParallelConfig, Prediction
from distriray.controls import ControlNetSpec
from distriray.gang.config import LIVE_FIELDS
from distriray.ip_adapters import IPAdapterSpec
from distriray.limits import Limits
from distriray.models import ModelSpec
from distriray.requests import Defaults

PAGE = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()
ROW = re.compile(r"^\| `(\w+)`( ↻)? \| (.*?) \| (.*) \|$", re.MULTILINE)


def rows(heading: str) -> dict[str, tuple[bool, str, str]]:
    """Field → (changes while it runs, default, meaning) of one table."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {name: (bool(live), default, text) for name, live, default, text in ROW.findall(section)}


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        name = type(field.default).__name__
        return f"see [`{name}`](#{name.lower()})"
    return f"`{json.dumps(field.default)}`"


@pytest.mark.parametrize(
    "model",
    [
        AppConfig,
        HostConfig,
        RouterConfig,
        HttpConfig,
        ModelSpec,
        AdapterSpec,
        ControlNetSpec,
        IPAdapterSpec,
        Limits,
        Defaults,
        ParallelConfig,
        Prediction,
    ],
)
def test_every_field_is_documented_with_its_default(model: type[BaseModel]) -> None:
    documented = {name: default for name, (_, default, _) in rows(model.__name__).items()}
    assert documented == {name: default_of(field) for name, field in model.model_fields.items()}


def test_a_pool_is_documented_beyond_its_hosts() -> None:
    own = {
        name: default_of(field)
        for name, field in PoolConfig.model_fields.items()
        if name not in HostConfig.model_fields
    }
    assert {name: default for name, (_, default, _) in rows("PoolConfig").items()} == own


def test_what_changes_while_hosts_run_is_marked() -> None:
    assert {name for name, (live, *_) in rows("HostConfig").items() if live} == LIVE_FIELDS


def test_every_field_says_what_it_is_for() -> None:
    sections = ("AppConfig", "PoolConfig", "HostConfig", "RouterConfig", "HttpConfig", "ModelSpec", "Limits")
    assert all(len(text) > 8 for section in sections for *_, text in rows(section).values())
