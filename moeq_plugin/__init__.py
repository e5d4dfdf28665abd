"""Quantize Mixture-of-Experts and RWKV models with llm-compressor without damaging an expert.

The public names load on first use, so that ``import moeq_plugin`` imports no framework. Importing
a modifier registers it with llm-compressor's recipe factory.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeq_plugin.checkpoint.verify import verify_checkpoint
    from moeq_plugin.core.allocation import BitBudget, allocate_bits
    from moeq_plugin.core.sampling import EBSSConfig
    from moeq_plugin.core.sensitivity import SensitivityTable
    from moeq_plugin.files.datasets import read_dataset
    from moeq_plugin.integrations.hf import MoEQuantConfig
    from moeq_plugin.integrations.llm_compressor import (
        MoEQuantAWQModifier,
        MoEQuantModifier,
        RWKVQuantModifier,
    )
    from moeq_plugin.integrations.llm_compressor.self_sampling.dataset import ebss_dataset
    from moeq_plugin.models.evaluation import evaluate

__version__ = "0.2.0"

_HOMES = {
    "BitBudget": "moeq_plugin.core.allocation",
    "EBSSConfig": "moeq_plugin.core.sampling",
    "MoEQuantAWQModifier": "moeq_plugin.integrations.llm_compressor",
    "MoEQuantConfig": "moeq_plugin.integrations.hf",
    "MoEQuantModifier": "moeq_plugin.integrations.llm_compressor",
    "RWKVQuantModifier": "moeq_plugin.integrations.llm_compressor",
    "SensitivityTable": "moeq_plugin.core.sensitivity",
    "allocate_bits": "moeq_plugin.core.allocation",
    "ebss_dataset": "moeq_plugin.integrations.llm_compressor.self_sampling.dataset",
    "evaluate": "moeq_plugin.models.evaluation",
    "read_dataset": "moeq_plugin.files.datasets",
    "verify_checkpoint": "moeq_plugin.checkpoint.verify",
}

__all__ = [
    "BitBudget",
    "EBSSConfig",
    "MoEQuantAWQModifier",
    "MoEQuantConfig",
    "MoEQuantModifier",
    "RWKVQuantModifier",
    "SensitivityTable",
    "__version__",
    "allocate_bits",
    "ebss_dataset",
    "evaluate",
    "read_dataset",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
