"""What a user does with a tiny model of a family, and what is then true of it.

One run of the commands for each family; the laws are in ``test_families.py``. What of it goes into
``docs/models.md`` is kept in ``recorded_families.json``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_families import save_tiny
from transformers import PreTrainedModel
from typer.testing import CliRunner

from moeq_plugin.cli import app
from moeq_plugin.integrations.llm_compressor.awq.mappings import find_mappings
from moeq_plugin.integrations.llm_compressor.linearization import linearize
from moeq_plugin.models.moe import MoELayer, UnsupportedModelError, find_moe_layers
from moeq_plugin.models.residual import find_residual_stream
from moeq_plugin.records.run import RunRecord

SCHEME = "W4A16_G32"


@dataclass(frozen=True)
class Examined:
    """One family after ``moeq plan``, ``inspect`` and ``quantize``.

    Attributes:
        name: of the family.
        directory: with ``model``, and ``out`` unless it was refused.
        planned: exit code and output of ``moeq plan``.
        inspected: exit code and output of ``moeq inspect``.
        quantized: exit code and output of ``moeq quantize``.
    """

    name: str
    directory: Path
    planned: tuple[int, str]
    inspected: tuple[int, str]
    quantized: tuple[int, str]

    @property
    def refusal(self) -> str:
        """Return the sentence that refuses the family, empty if it is quantized."""
        return "" if self.planned[0] == 0 else self.planned[1].removeprefix("moeq plan: ")

    @property
    def source(self) -> Path:
        return self.directory / "model"

    @property
    def out(self) -> Path:
        return self.directory / "out"


def command(*words: object) -> tuple[int, str]:
    """Return exit code and output of a command, or raise what it should have caught."""
    done = CliRunner().invoke(app, [*map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, " ".join(done.output.split())


def examine(name: str, directory: Path) -> Examined:
    """Make a tiny model of a family in a directory, and plan, inspect and quantize it there."""
    save_tiny(name, directory / "model")
    return examine_saved(name, directory, write_data(directory))


def write_data(directory: Path) -> Path:
    """Write what calibrates, and return the file."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 100, (8, 32), generator=generator).tolist()
    data = directory / "data.jsonl"
    data.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    return data


def examine_saved(name: str, directory: Path, data: Path) -> Examined:
    """Plan, inspect and quantize the model of a family that lies in a directory."""
    model, out = directory / "model", directory / "out"
    return Examined(
        name,
        directory,
        command("plan", model, "--scheme", SCHEME),
        command("inspect", model),
        command("quantize", model, out, "--scheme", SCHEME, "--dataset", data),
    )


def linear_model(name: str, directory: Path) -> tuple[PreTrainedModel, list[MoELayer]]:
    """Return the 16-bit model of a family, its experts linears, and its MoE layers."""
    model = linearize(save_tiny(name, directory))
    return model, find_moe_layers(model)


def record(examined: Examined, reloads: bool | None) -> dict[str, Any]:
    """Return what ``docs/models.md`` says of a family.

    Args:
        examined: the family.
        reloads: whether plain transformers reads what was written; ``None`` for nothing written.
    """
    if examined.refusal:
        return {"refusal": without_places(examined.refusal)}
    model, layers = linear_model(examined.name, examined.directory / "again")
    kept = Counter(RunRecord.load(examined.out)[0].kept.values())
    return {
        "model": type(model).__name__,
        "kept": sorted(kept),
        "reloads": reloads,
        "awq": _reason(lambda: find_mappings(model, layers)),
        "rotation": _reason(lambda: find_residual_stream(model)),
    }


def without_places(sentence: str) -> str:
    """Return a sentence without names of modules, which are those of a tiny model."""
    return re.sub(r"\S*layers\.\d+\S*", "a module", sentence)


def _reason(find: Any) -> str:
    try:
        find()
    except UnsupportedModelError as error:
        sentence = " ".join(str(error).split()).split(". ")[0].split("; ")[0]
        # a list of weights follows, by their names in a tiny model
        return without_places(re.sub(r"(residual stream): .*", r"\1", sentence))
    return ""


def ids() -> torch.Tensor:
    """Return ``[2, 16]`` token ids that stand for words."""
    return torch.randint(1, 100, (2, 16), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of :func:`ids`, in float32."""
    found: torch.Tensor = model.eval()(
        input_ids=ids(), attention_mask=torch.ones_like(ids())
    ).logits
    return found.float()
