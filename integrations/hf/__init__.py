"""transformers loads our checkpoints once this package has been imported.

Importing it registers ``quant_method: moeq`` (codebook weights beside compressed-tensors ones).
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "moeq_plugin's loaders need transformers: pip install 'moeq-plugin[llmcompressor]'"
    ) from error

from moeq_plugin.integrations.hf.quantizer import MoEQuantConfig, MoEQuantizer

__all__ = ["MoEQuantConfig", "MoEQuantizer"]
