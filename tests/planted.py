"""Faults to plant in a sound checkpoint, and how they are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import copy_of, edited_config, edited_tensors

from moeq_plugin import verify_checkpoint

EXPERT = "model.layers.1.mlp.experts.2"
ATTENTION = "model.layers.0.self_attn"
Damage = Callable[[Path], None]
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Planted:
    """A fault.

    Attributes:
        name: in words.
        damage: plants it.
        checks: any of these has to find it.
        of: the sound checkpoint.
        source: whether it takes the source to see it.
        target: the reader.
    """

    name: str
    damage: Damage
    checks: tuple[str, ...]
    of: str = "qwen3_moe"
    source: bool = False
    target: str = "vllm"


def assert_found(fault: Planted, sound: Callable[[str], Path], directory: Path) -> None:
    """Plant a fault in a copy, after seeing that nothing of its kind is said without it."""
    original = sound(fault.of)
    path = copy_of(original, directory / "out")
    source = original.parent / "model" if fault.source else None
    before = {found.check for found in verify_checkpoint(path, source, target=fault.target).errors}
    assert not before.intersection(fault.checks)

    fault.damage(path)
    report = verify_checkpoint(path, source, target=fault.target)

    found = {found.check for found in report.errors}
    assert found.intersection(fault.checks), list(report.lines())
    assert report.exit_code in {1, 2}
    assert all(found.way_out for found in report.findings)


def ids(faults: list[Planted]) -> list[str]:
    return [fault.name for fault in faults]


def tensor(name: str, change: Change) -> Damage:
    """Return a damage to one tensor."""

    def damage(path: Path) -> None:
        with edited_tensors(path) as tensors:
            tensors[name] = change(tensors[name].clone())

    return damage


def tensors(damage: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    """Return a damage to the tensors of a file."""

    def on(path: Path) -> None:
        with edited_tensors(path) as found:
            damage(found)

    return on


def every(suffix: str, change: Change) -> Damage:
    """Return a damage to all tensors whose names end with something."""

    def on(found: dict[str, torch.Tensor]) -> None:
        for name in [name for name in found if name.endswith(suffix)]:
            found[name] = change(found[name].clone())

    return tensors(on)


def config(**changes: Any) -> Damage:
    """Return a damage to entries of ``config.json``; ``...`` removes one."""

    def damage(path: Path) -> None:
        with edited_config(path) as content:
            _apply(content, changes)

    return damage


def section(**changes: Any) -> Damage:
    """Return a damage to ``quantization_config``."""

    def damage(path: Path) -> None:
        with edited_config(path) as content:
            _apply(content["quantization_config"], changes)

    return damage


def group(**changes: Any) -> Damage:
    """Return a damage to the first of the config groups."""

    def damage(path: Path) -> None:
        with edited_config(path) as content:
            _apply(content["quantization_config"]["config_groups"]["group_0"], changes)

    return damage


def file(name: str, content: Any) -> Damage:
    """Return a damage that writes a file beside the weights; what is no text becomes JSON."""

    def damage(path: Path) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name).write_text(text)

    return damage


def _apply(content: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if value is ...:
            content.pop(key, None)
        else:
            content[key] = value
