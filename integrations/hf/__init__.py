"""Entry points of transformers and Optimum, and the GPTQ format.

Importing it registers two methods with transformers: ``moeq``, which loads checkpoints with
codebook weights beside compressed-tensors ones, and quantizing while loading
(:class:`MoEQuantConfig`). It also makes transformers know RWKV (:mod:`moeq_plugin.rwkv`).
"""

try:
    import llmcompressor  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "moeq_plugin's entry points of transformers and Optimum need llm-compressor: "
        "pip install 'moeq-plugin[llmcompressor]'"
    ) from error

from moeq_plugin.integrations.hf.codebook_quantizer import CodebookConfig, CodebookQuantizer
from moeq_plugin.integrations.hf.packed_linears import keep_linears_packed
from moeq_plugin.integrations.hf.quantize_on_load import MoEQuantConfig, OnLoadQuantizer
from moeq_plugin.rwkv.modeling import AFTER_LOADING

if keep_linears_packed not in AFTER_LOADING:
    AFTER_LOADING.append(keep_linears_packed)

__all__ = ["CodebookConfig", "CodebookQuantizer", "MoEQuantConfig", "OnLoadQuantizer"]
