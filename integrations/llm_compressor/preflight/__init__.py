"""Everything that can be known to be wrong before hours of calibration are spent on it."""

from moeq_plugin.integrations.llm_compressor.preflight.arguments import check_arguments
from moeq_plugin.integrations.llm_compressor.preflight.data import (
    TokenCount,
    check_data,
    count_tokens,
)
from moeq_plugin.integrations.llm_compressor.preflight.group_sizes import check_group_sizes
from moeq_plugin.integrations.llm_compressor.preflight.model import (
    check_backward_pass,
    check_cut,
    check_finite_weights,
    check_merged,
    check_sequential_targets,
)
from moeq_plugin.integrations.llm_compressor.preflight.overlap import (
    check_alone,
    check_groups,
    check_not_quantized,
    check_untouched,
)
from moeq_plugin.integrations.llm_compressor.preflight.saving import check_saving
from moeq_plugin.integrations.llm_compressor.preflight.targets import (
    check_targets,
    kept_by_default,
    warn_of_ignored,
)
from moeq_plugin.integrations.llm_compressor.preflight.two_streams import check_layer_by_layer

__all__ = [
    "TokenCount",
    "check_alone",
    "check_arguments",
    "check_backward_pass",
    "check_cut",
    "check_data",
    "check_finite_weights",
    "check_group_sizes",
    "check_groups",
    "check_layer_by_layer",
    "check_merged",
    "check_not_quantized",
    "check_saving",
    "check_sequential_targets",
    "check_targets",
    "check_untouched",
    "count_tokens",
    "kept_by_default",
    "warn_of_ignored",
]
