"""Modifiers for llm-compressor, registered with its recipe factory when this package is imported.

YAML recipes find the modifiers once this package (or ``moeq_plugin.MoEQuantModifier``) has
been imported; the host has no entry points for third-party modifiers.
"""

try:
    from llmcompressor.modifiers.factory import ModifierFactory
except ImportError as error:
    raise ImportError(
        "moeq_plugin's modifiers need llm-compressor: pip install 'moeq-plugin[llmcompressor]'"
    ) from error

from moeq_plugin.integrations.llm_compressor import host
from moeq_plugin.integrations.llm_compressor.awq.modifier import MoEQuantAWQModifier
from moeq_plugin.integrations.llm_compressor.checkpoint.loading import load_dequantized
from moeq_plugin.integrations.llm_compressor.moequant.modifier import MoEQuantModifier
from moeq_plugin.integrations.llm_compressor.prepare import prepare
from moeq_plugin.integrations.llm_compressor.rotation import ResidualRotationModifier
from moeq_plugin.integrations.llm_compressor.rwkv.modifier import RWKVQuantModifier

__all__ = [
    "MoEQuantAWQModifier",
    "MoEQuantModifier",
    "RWKVQuantModifier",
    "ResidualRotationModifier",
    "load_dequantized",
]

host.register(prepare)

for _modifier in (
    MoEQuantAWQModifier,
    MoEQuantModifier,
    RWKVQuantModifier,
    ResidualRotationModifier,
):
    ModifierFactory.register(_modifier.__name__, _modifier)
