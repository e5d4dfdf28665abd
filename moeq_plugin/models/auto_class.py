"""Which of transformers' Auto classes builds all of a model, and not its text part alone.

Many multi-modal models have a second class for their language model. An Auto class that finds it
loads the text and drops the rest without a word, so the class that files were saved from decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeq_plugin.models.moe import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# what can be calibrated on text alone, then what is only read; a config's first fit counts
_CALIBRATED = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForTokenClassification",
)
_ALL = (*_CALIBRATED, "AutoModelForMultimodalLM", "AutoModelForSeq2SeqLM")


def auto_class_of(config: PreTrainedConfig) -> Any:
    """Return the Auto class that builds the whole of what a config describes.

    Args:
        config: of the model; what its ``architectures`` names is looked for first.

    Raises:
        UnsupportedModelError: if none does.
    """
    import transformers

    found = {}
    for name in _ALL:
        auto = getattr(transformers, name)
        found[auto] = _built_by(auto, config)
    named = set(config.architectures or ())
    for auto, classes in found.items():
        if named & {cls.__name__ for cls in classes}:
            return auto
    for auto, classes in found.items():
        if any(isinstance(config, cls.config_class) for cls in classes):
            return auto
    if "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return transformers.AutoModelForCausalLM  # a class that the model brings along
    raise UnsupportedModelError(
        f"transformers has no class that builds the whole of {_described(config)}"
    )


def loader_of(model: PreTrainedModel) -> str:
    """Return the name of the class whose ``from_pretrained`` loads what a model was saved as.

    Of a model that no Auto class builds, that is its own.
    """
    try:
        name: str = auto_class_of(model.config).__name__
    except UnsupportedModelError:
        name = type(model).__name__
    return name


def language_class_of(config: PreTrainedConfig) -> Any:
    """Return the Auto class of a model that text alone can calibrate.

    Raises:
        UnsupportedModelError: if the model is of another kind.
    """
    auto = auto_class_of(config)
    if auto.__name__ not in _CALIBRATED:
        raise UnsupportedModelError(
            f"{_described(config)} is built by {auto.__name__}; only models of "
            f"{' and '.join(_CALIBRATED)} are calibrated on text, others "
            "cannot be quantized"
        )
    return auto


def _built_by(auto: Any, config: PreTrainedConfig) -> tuple[Any, ...]:
    found = auto._model_mapping.get(type(config), ())
    return tuple(found) if isinstance(found, list | tuple) else (found,)


def _described(config: PreTrainedConfig) -> str:
    return f"{(config.architectures or [type(config).__name__])[0]} ({config.model_type})"
