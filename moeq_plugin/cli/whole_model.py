"""Whether loading a model as a language model loads all of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

_LISTED = 4
_COPIED = "mtp"  # layers for multi-token prediction, which llm-compressor copies as they are


def check_whole(model: str) -> None:
    """Refuse a model of text and images or sound, of which only the text would be left.

    Args:
        model: directory or id.

    Raises:
        ValueError: naming what would be lost.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        text_class: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    except Exception:  # whoever loads the model says what is wrong with it
        return
    if text_class is None or not _is_part(config, text_class):
        return
    lost = _tensors_lost(Path(model), config)
    listed = ", ".join(f"{prefix}.* ({n} tensors)" for prefix, n in lost.most_common(_LISTED))
    raise ValueError(
        f"{model} is a multi-modal model ({(config.architectures or ['?'])[0]}): as a language "
        f"model ({text_class.__name__}) it would lose {listed or 'all that is not text'}. Quantize "
        "it in Python: load it with AutoModelForImageTextToText, put what is not text into "
        "`ignore` (such as re:.*visual.*), and pass it to oneshot."
    )


def _is_part(config: Any, text_class: Any) -> bool:
    """Tell whether the class of the language model is for a part of what the config describes."""
    parts = [name for name in getattr(config, "sub_configs", {}) if name != "text_config"]
    has_more = any(getattr(config, name, None) is not None for name in parts)
    return has_more and not isinstance(config, text_class.config_class)


def _tensors_lost(directory: Path, config: Any) -> Counter[str]:
    """Return how many tensors of files begin with what the language model has nothing of."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        ours = set(AutoModelForCausalLM.from_config(config, trust_remote_code=False).state_dict())
    found: Counter[str] = Counter()
    of_text = {_COPIED}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                prefix = ".".join(key.split(".")[:2])
                found[prefix] += 1
                if key in ours or key.replace("language_model.", "") in ours:
                    of_text.add(prefix)
    return Counter({p: n for p, n in found.items() if not of_text & {p, p.split(".")[0]}})
