"""The modifiers of ``moeq quantize``, from options of the command line or from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeq_plugin.cli.rwkv import is_rwkv, modifiers_for_rwkv
from moeq_plugin.cli.shared import say
from moeq_plugin.cli.validation import in_words, is_validation_error
from moeq_plugin.core.scheme_words import codebook_named
from moeq_plugin.untrusted.broken import sentence
from moeq_plugin.untrusted.patterns import check_content
from moeq_plugin.untrusted.reading import MAX_CONFIG_BYTES, read_text


def of_request(model: str, *, target: str, work_dir: str, **settings: Any) -> list[Any]:
    """Return the modifiers of a request.

    Args:
        model: directory, id or official RWKV file.
        target: what is to read the checkpoint.
        work_dir: where to keep state.
        **settings: fields of the modifier; a ``scheme`` may name its group size.

    Raises:
        ValueError: if a field holds a name that nobody knows.
    """
    from moeq_plugin import MoEQuantModifier

    _check_observer(settings.get("weight_observer"))
    _check_patterns(settings.get("ignore"))
    if "scheme" in settings:
        settings |= of_scheme(settings.pop("scheme"))
    settings |= {"target": target, "work_dir": work_dir}
    if is_rwkv(model):
        return modifiers_for_rwkv(**settings)
    if "codebook" in settings:
        raise ValueError("codebooks are for RWKV; give a scheme with a grid, such as W4A16")
    return [MoEQuantModifier(**{"ignore": ["lm_head"], **settings})]


def _check_observer(name: str | None) -> None:
    """Refuse an observer that llm-compressor does not know; it would say so hours later.

    Raises:
        ValueError: listing those that it knows.
    """
    from llmcompressor.observers import Observer

    known = {str(of).replace("-", "_") for of in Observer.registered_names()}
    if name is not None and name.replace("-", "_") not in known:
        raise ValueError(f"--weight-observer: expected one of {', '.join(sorted(known))}")


def _check_patterns(ignore: list[str] | None) -> None:
    """Refuse what looks like a pattern and is none.

    Raises:
        ValueError: quoting it.
    """
    try:
        check_content(ignore)
    except ValueError as error:
        raise ValueError(f"--ignore: {error}") from None


def of_scheme(scheme: str) -> dict[str, Any]:
    """Return the fields of a modifier for a scheme; unlike the host's, it may name its group size.

    Example:
        >>> of_scheme("W4A16")
        {'scheme': 'W4A16'}
    """
    from moeq_plugin.integrations.llm_compressor.allocation.options import parse_option

    if fields := codebook_named(scheme):
        return {"codebook": fields}
    if "_G" not in scheme:
        return {"scheme": scheme}
    return {"config_groups": {scheme: parse_option(scheme).for_targets(["Linear"])}}


def check_recipe(path: Path) -> None:
    """Look whether a file can be a recipe, before the modifiers that it names are imported.

    Raises:
        ValueError: if it is not there or cannot be parsed.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected a recipe in YAML")
    try:
        content = yaml.safe_load(read_text(path, MAX_CONFIG_BYTES))
        check_content(content)
    except Exception as error:  # whatever a file that is no recipe makes a parser do
        raise ValueError(f"{path} is not a recipe: {sentence(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} is not a recipe: expected stages by name, got {str(content)[:40]!r}"
        )


def of_recipe(path: Path, work_dir: Path) -> list[Any]:
    """Return a recipe's modifiers, those of ours told where to keep their state.

    Raises:
        ValueError: if it is no recipe, or state of several modifiers would have to be kept.
    """
    from llmcompressor.recipe import Recipe

    from moeq_plugin.integrations.llm_compressor.moequant.budgeted import BudgetedModifier

    check_recipe(path)
    try:
        modifiers = list(Recipe.create_instance(str(path)).modifiers)
    except Exception as error:  # whatever a file that is no recipe makes a parser do
        reason = in_words(error) if is_validation_error(error) else sentence(error)
        raise ValueError(f"{path} is not a recipe: {reason}") from error
    if not modifiers:
        raise ValueError(f"{path} names no modifier")
    if len(modifiers) == 1 and isinstance(modifiers[0], BudgetedModifier):
        return [modifiers[0].model_copy(update={"work_dir": str(work_dir)})]
    say(f"{path}: such a recipe keeps no state, a kill loses the run", err=True)
    return modifiers
