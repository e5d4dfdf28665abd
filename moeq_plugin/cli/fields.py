"""Options of ``moeq quantize`` that are fields of the modifier, and what contradicts a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moeq_plugin.checkpoint.presets import check_name

# of the modifier, whose import takes half a minute; a test compares
PRESETS = ("fast", "balanced", "best")
TARGETS = ("vllm", "gguf", "expert", "linear")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
# of these exactly one says what is wanted
REQUESTS = ("scheme", "bits_per_weight", "size_gb", "allocation", "recipe")

Scheme = Annotated[str | None, typer.Option(help="one for all linears, such as W4A16 or W4A16_G64")]
BitsPerWeight = Annotated[
    float | None, typer.Option(help="average of a budget, instead of a scheme")
]
SizeGB = Annotated[float | None, typer.Option(help="size of the checkpoint, instead of a scheme")]
AllocationFile = Annotated[
    Path | None, typer.Option(help="file that `moeq plan` wrote, instead of a scheme")
]
RecipeFile = Annotated[
    Path | None, typer.Option(help="YAML of llm-compressor, instead of a scheme")
]
SensitivityFile = Annotated[
    Path | None, typer.Option(help="table that `moeq plan` measured, for a budget")
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", help="candidate scheme of a budget, such as W3A16_G64; give several"),
]
Preset = Annotated[str | None, typer.Option(help="fast, balanced (default) or best")]
Target = Annotated[
    str,
    typer.Option(
        help="what may have a scheme of its own: what vllm or gguf reads, an expert, a linear"
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="modules left in 16 bit, names or `re:` patterns; default: lm_head"),
]
WeightObserver = Annotated[
    str | None, typer.Option(help="how scales are found, such as minmax or memoryless_mse")
]
AffinityPower = Annotated[
    float | None, typer.Option(help="power of the router's weight with which a token counts")
]
Seed = Annotated[int | None, typer.Option(help="of all random choices")]


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given, paths as text."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in options.items()
        if value is not None and value != []
    }


def check_fields(fields: Mapping[str, Any], *, has_default: bool = False) -> None:
    """Refuse what asks for nothing, for two things, or for what a recipe says itself.

    Args:
        fields: by name, those that were given.
        has_default: whether a model may be quantized without being asked how.

    Raises:
        ValueError: naming the options.
    """
    given = sum(name in fields for name in REQUESTS)
    if given != 1 and not (has_default and given == 0):
        names = [_option(name) for name in REQUESTS]
        raise ValueError(f"give exactly one of {', '.join(names[:-1])} and {names[-1]}")
    also = [name for name in fields if name != "recipe"]
    if "recipe" in fields and also:
        raise ValueError(f"{_option(also[0])} is a line of the recipe, `{also[0]}: ...`")
    has_budget = "bits_per_weight" in fields or "size_gb" in fields
    for name, option in {"options": "--option", "sensitivity": "--sensitivity"}.items():
        if name in fields and not has_budget:
            raise ValueError(f"{option} is for a budget: give --bits-per-weight or --size-gb")


def check_words(preset: str | None, target: str, schemes: Iterable[str | None]) -> None:
    """Refuse what is no word of the modifier's, before it is imported.

    Args:
        preset: as given.
        target: likewise.
        schemes: likewise, each with a group size or without.

    Raises:
        ValueError: saying what was expected.
    """
    for name, word, known in (("preset", preset, PRESETS), ("target", target, TARGETS)):
        if word is not None and word not in known:
            raise ValueError(f"--{name}: expected one of {', '.join(known)}, got {word!r}")
    for scheme in schemes:
        if scheme is not None:
            check_name(scheme)


def check_loading(dtype: str, batch_size: int) -> None:
    """Refuse what no model is loaded in, and batches of nothing.

    Raises:
        ValueError: saying what was expected.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    if batch_size < 1:
        raise ValueError(f"--batch-size: expected a number from 1 on, got {batch_size}")


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")
