"""Load any compressed-tensors checkpoint of a MoE model, dequantized, one scheme per linear.

transformers 5.17 applies one scheme to all experts of a model and knows no rule for GPT-OSS; it
then loads other numbers than were saved, at best with an error. Here every linear gets the scheme
that the checkpoint's config gives it, and every tensor of the file has to find its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils import is_match, match_targets
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import (
    WeightRenaming,
    WeightTransform,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from moeq_plugin.checkpoint.weight_files import weight_files
from moeq_plugin.core.names import is_prediction
from moeq_plugin.integrations.llm_compressor.checkpoint.expert_names import (
    linearized_rules,
    loading_rules,
)
from moeq_plugin.integrations.llm_compressor.linearization import linearize
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
    linearize(model)  # random weights for now, in the layout that the host has saved
    expected = model.state_dict()
    rules = [r for r in linearized_rules(loading_rules(model)) if _has_target(r, expected)]
    stored: dict[str, dict[str, torch.Tensor]] = {}  # by what the file calls a module
    num_layers = int(config.get_text_config().num_hidden_layers)
    for key, tensor in _tensors(directory):
        if is_prediction(key, num_layers):  # which no class of transformers has a place for
            continue
        in_file, _, name = key.rpartition(".")
        stored.setdefault(in_file, {})[name] = tensor
    spelled = _spelled(model, stored, rules)
    # the host renames some of what it writes into `ignore`, by the rules for tensors
    ours = {in_file: name for name, in_file in spelled.items()}
    schemes.ignore = [*schemes.ignore, *(ours.get(name, name) for name in schemes.ignore)]
    for name, scheme in _scheme_of_modules(model, schemes, spelled):
        in_file = spelled.get(name, "")
        if in_file in stored:
            form = scheme.format or infer_module_format(nn.Linear, scheme).value
            compressor = BaseCompressor.get_value_from_registry(form)
            plain = compressor.decompress(stored[in_file], scheme)
            stored[in_file] = {k: plain[k] for k in ("weight", "bias") if k in plain}
    state = {f"{m}.{n}" if m else n: t for m, of in stored.items() for n, t in of.items()}
    # as transformers loads: besides renaming it joins and splits tensors, such as convolutions
    found, _ = convert_and_load_state_dict_in_model(
        model,
        state,
        LoadStateDictConfig(weight_mapping=rules),  # type: ignore[arg-type] # of both kinds
    )
    model.tie_weights()
    # of a quantized key-value cache, which has no place in a dequantized model
    unexpected = [key for key in found.unexpected_keys if not key.endswith(_CACHE_SCALES)]
    missing = found.missing_and_mismatched() - set(getattr(model, "all_tied_weights_keys", {}))
    if missing or unexpected:
        raise ValueError(
            f"{directory} does not fit its config: missing {sorted(missing)[:5]}, unexpected "
            f"{sorted(unexpected)[:5]}, {len(missing)} and {len(unexpected)} in all"
        )
    model.eval()
    return model


def _has_target(rule: WeightTransform, expected: Iterable[str]) -> bool:
    """Tell whether a model has what a rule joins tensors to; renamings rename what there is."""
    if isinstance(rule, WeightRenaming):
        return True
    undone = rule.reverse_transform()
    return any(undone.rename_source_key(key)[1] is not None for key in expected)


def _spelled(
    model: PreTrainedModel, stored: Iterable[str], rules: list[WeightTransform]
) -> dict[str, str]:
    """Return what a file calls the modules of a model that have a weight, found as loading does."""
    expected = model.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    spelled = {}
    for in_file in stored:
        key = f"{in_file}.weight"
        name, _ = rename_source_key(key, renamings, [], model.base_model_prefix, expected)
        spelled[(name if name in expected else key).removesuffix(".weight")] = in_file
    return spelled


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
