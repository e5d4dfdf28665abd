"""Modifiers for llm-compressor, registered with its recipe factory when this package is imported.

YAML recipes find ``MoEQuantModifier`` once this package (or ``moeq_plugin.MoEQuantModifier``) has
been imported; the host has no entry points for third-party modifiers.
"""

try:
    from llmcompressor.modifiers.factory import ModifierFactory
except ImportError as error:
    raise ImportError(
        "moeq_plugin's modifiers need llm-compressor: pip install 'moeq-plugin[llmcompressor]'"
    ) from error

from moeq_plugin.integrations.llm_compressor.modifier import MoEQuantModifier

__all__ = ["MoEQuantModifier"]

ModifierFactory.register(MoEQuantModifier.__name__, MoEQuantModifier)
