"""What MoEQuantAWQModifier uses of llm-compressor's AWQ without a promise is where it was."""

import inspect

import pytest

pytest.importorskip("llmcompressor")

from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq import base as awq_base
from llmcompressor.modifiers.transform.awq.mappings import ResolvedMapping
from llmcompressor.pipelines.cache import IntermediatesCache

METHODS = {
    "_set_resolved_mappings": (["self", "model"], "it takes mappings that were found instead"),
    "_setup_activation_cache_hooks": (["self"], "arguments of blocks only are kept"),
    "_compute_best_scale": (
        ["self", "mapping", "fp16_outputs", "orig_layer_weights"],
        "the loss of the mapping is set before it, and what it returns is noted",
    ),
    "_compute_loss": (["self", "fp16_outputs", "int_w_outputs"], "a loss of ours stands in"),
    "on_initialize": (["self", "state", "kwargs"], "it decides on a device to offload to"),
    "on_calibration_start": (["self", "state", "event", "kwargs"], "it resolves and hooks"),
    "on_sequential_epoch_end": (["self", "state", "event", "kwargs"], "it smooths a layer"),
    "on_calibration_end": (["self", "state", "event", "kwargs"], "it checks that all was used"),
}
ATTRIBUTES = {
    "_resolved_mappings": (list, "the mappings that are searched"),
    "_parent_args_cache": (dict, "what blocks are called with, merged into few batches"),
    "_smooth_activation_stats": (dict, "magnitudes, replaced by those without padding"),
    "_error_metrics": (list, "the losses of the last search, noted in the record"),
}
FIELDS = ["mappings", "offload_device", "duo_scaling", "n_grid"]
MAPPING = ["smooth_name", "smooth_layer", "balance_layers", "balance_names", "parent",
           "parent_name", "activation_hook_target"]  # fmt: skip
USER = "awq/search.py"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_is_extended_takes_what_it_took(name):
    parameters, use = METHODS[name]
    method = getattr(AWQModifier, name, None)
    assert method is not None, f"llm-compressor has moved AWQModifier.{name}; {USER}: {use}"
    found = list(inspect.signature(method).parameters)
    assert found == parameters, (
        f"llm-compressor's AWQModifier.{name} takes {found} now, not {parameters}; {USER}: {use}"
    )


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_that_is_written_is_what_it_was(name):
    kind, use = ATTRIBUTES[name]
    found = getattr(AWQModifier(), name, None)
    assert isinstance(found, kind), (
        f"llm-compressor's AWQModifier.{name} is {type(found).__name__}, not {kind.__name__}; "
        f"{USER}: {use}"
    )


def test_fields_and_mappings_are_those_that_are_passed_on():
    added = set(AWQModifier.model_fields) - set(AWQModifier.__base__.model_fields) - {*FIELDS}
    assert not added, f"llm-compressor's AWQModifier has new fields, {USER} hands none on: {added}"
    for name in FIELDS:
        assert name in AWQModifier.model_fields, f"AWQModifier.{name} has gone; {USER} hands it on"
    found = list(inspect.signature(ResolvedMapping).parameters)
    assert found == MAPPING, f"ResolvedMapping has {found}; awq/mappings.py makes them of {MAPPING}"


def test_its_loss_is_asked_and_what_it_patches_is_looked_up_where_we_patch_it():
    """That a name is there says little where nobody calls it any more."""
    search = inspect.getsource(AWQModifier._compute_best_scale)
    assert "self._compute_loss(" in search, f"the search asks no _compute_loss; {USER} replaces it"
    assert "self._error_metrics.append(" in search, f"losses go elsewhere; {USER} reads them"
    for key in ("best_error", "initial_error"):
        assert f'"{key}"' in search, f"a search does not note its {key} any more; {USER} reads it"
    assert "is_distributed()" in search, "host.summed_already replaces awq.base.is_distributed"
    assert callable(awq_base.is_distributed), "host.summed_already replaces it"
    smoothing = inspect.getsource(AWQModifier._apply_smoothing)
    assert ".pin_memory(" in smoothing, "host.without_pinning replaces IntermediatesCache's"
    assert callable(IntermediatesCache.pin_memory), "host.without_pinning replaces it"
    assert "_apply_smoothing(" in inspect.getsource(AWQModifier.on_sequential_epoch_end)
    for name in ("_smooth_activation_stats", "_parent_args_cache", "_resolved_mappings"):
        assert name in smoothing, f"smoothing reads no {name} any more; {USER} fills it"
