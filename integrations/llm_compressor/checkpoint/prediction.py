"""Copy layers for next-token prediction, which transformers does not load and servers draft with.

llm-compressor copies those that are called ``mtp``; most families number them on after the last
decoder layer.
"""

from __future__ import annotations

from pathlib import Path

from compressed_tensors.utils import save_mtp_tensors_to_checkpoint
from transformers import PreTrainedModel

from moeq_plugin.checkpoint.headers import read_header
from moeq_plugin.checkpoint.weight_files import weight_files
from moeq_plugin.core.names import in_layer, is_prediction


def copy_predictions(model: PreTrainedModel, directory: Path) -> list[str]:
    """Copy them from where a model was loaded into its checkpoint, in 16 bit and never quantized.

    Args:
        model: that was saved; nothing is copied if it was not loaded from a directory.
        directory: of the checkpoint.

    Returns:
        What their names begin with, of all that are there now.
    """
    source = Path(model.name_or_path or "")
    if not model.name_or_path or not source.is_dir():
        return []
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    wanted = [name for name in _names(source) if is_prediction(name, num_layers)]
    here = set(_names(directory))
    prefixes = dict.fromkeys(_prefix(name) for name in wanted)
    for prefix in dict.fromkeys(_prefix(name) for name in wanted if name not in here):
        shard = f"model_{prefix.rstrip('.').replace('.', '_')}.safetensors"
        save_mtp_tensors_to_checkpoint(str(source), str(directory), prefix, shard)
    return list(prefixes)


def _names(directory: Path) -> list[str]:
    return [tensor.name for path in weight_files(directory) for tensor in read_header(path)]


def _prefix(name: str) -> str:
    """Return what all tensors of one such layer begin with; a dot, or layer 6 would mean 61."""
    found = in_layer(name)
    if found is None or name.startswith("mtp"):
        return name.partition(".")[0] + "."
    return f"{found.before}layers.{found.layer}."
