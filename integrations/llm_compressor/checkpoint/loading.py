"""Load any compressed-tensors checkpoint of a MoE model, dequantized, one scheme per linear.

transformers 5.17 applies one scheme to all experts of a model and knows no rule for GPT-OSS; it
then loads other numbers than were saved, at best with an error. Here every linear gets the scheme
that the checkpoint's config gives it, and every tensor of the file has to find its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils import is_match, match_targets
from llmcompressor.modeling.moe.linearize import linearize_moe
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from moeq_plugin.checkpoint.weight_files import weight_files
from moeq_plugin.integrations.llm_compressor.checkpoint.file_names import (
    loading_renamings,
    module_renamed,
    renamed,
)
from moeq_plugin.models.auto_class import auto_class_of
from moeq_plugin.untrusted.reading import check_model

_CACHE_SCALES = (".k_scale", ".v_scale")


@torch.no_grad()
def load_dequantized(directory: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the checkpoint's model with linear experts and plain weights, in its own dtype.

    What is not a weight is not quantized in it: activations and the key-value cache.

    Args:
        directory: a checkpoint that ``save_pretrained`` or ``oneshot`` wrote.
        trust_remote_code: run Python code that the checkpoint brings along, if it needs any.

    Raises:
        ValueError: if tensors of the file or parameters of the model are left over.
    """
    directory = Path(directory)
    check_model(directory)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    schemes = QuantizationConfig.model_validate(config.quantization_config)
    # or transformers would build compressed modules, with one scheme for all experts
    del config.quantization_config
    model: PreTrainedModel = auto_class_of(config).from_config(
        config, dtype=config.dtype, trust_remote_code=trust_remote_code
    )
    linearize_moe(model)  # random weights for now, in the layout that the host has saved
    renamings = loading_renamings(model)
    stored: dict[str, dict[str, torch.Tensor]] = {}
    spelled: dict[str, str] = {}  # by module, what the file calls it
    for key, tensor in _tensors(directory):
        in_file = key.rpartition(".")[0]
        module, _, name = renamed(key, renamings).rpartition(".")
        stored.setdefault(module, {})[name] = tensor
        spelled[module] = in_file
    # the host renames some of what it writes into `ignore`, by the rules for tensors
    schemes.ignore = [*schemes.ignore, *(module_renamed(n, renamings) for n in schemes.ignore)]
    for name, scheme in _scheme_of_modules(model, schemes, spelled):
        if name in stored:
            form = scheme.format or infer_module_format(nn.Linear, scheme).value
            compressor = BaseCompressor.get_value_from_registry(form)
            plain = compressor.decompress(stored[name], scheme)
            stored[name] = {k: plain[k] for k in ("weight", "bias") if k in plain}
    state = {f"{m}.{n}" if m else n: t for m, of in stored.items() for n, t in of.items()}
    result = model.load_state_dict(state, strict=False)
    # of a quantized key-value cache, which has no place in a dequantized model
    unexpected = [key for key in result.unexpected_keys if not key.endswith(_CACHE_SCALES)]
    missing = set(result.missing_keys) - set(getattr(model, "all_tied_weights_keys", {}))
    if missing or unexpected:
        raise ValueError(
            f"{directory} does not fit its config: missing {sorted(missing)[:5]}, unexpected "
            f"{unexpected[:5]}, {len(missing)} and {len(unexpected)} in all"
        )
    model.eval()
    return model


def _tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                yield key, file.get_tensor(key)


def _scheme_of_modules(
    model: nn.Module, config: QuantizationConfig, spelled: Mapping[str, str]
) -> Iterator[tuple[str, QuantizationScheme]]:
    """Yield the modules that are stored quantized, and how.

    Targets and ``ignore`` are written in the names of modules or of files: both count.
    """
    groups = [g for g in config.config_groups.values() if isinstance(g, QuantizationScheme)]
    by_target = {target: group for group in groups for target in group.targets}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        names = dict.fromkeys((name, spelled.get(name, name)))
        if any(is_match(each, module, config.ignore) for each in names):
            continue
        # the most specific target comes first
        targets = [t for each in names for t in match_targets(each, module, by_target)]
        if targets:
            yield name, by_target[targets[0]]
