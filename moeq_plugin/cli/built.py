"""Models of families that we do not know, built without weights by what would quantize them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeq_plugin.checkpoint.architecture import Architecture
    from moeq_plugin.checkpoint.open_checkpoint import Checkpoint


def build(checkpoint: Checkpoint) -> Architecture:
    """Return what a model consists of; llm-compressor is imported only for models that need it."""
    from rich.console import Console

    from moeq_plugin.cli.display import log_to
    from moeq_plugin.cli.rwkv import know_rwkv

    log_to(Console(stderr=True))  # or it would say several times that there is no accelerator
    from moeq_plugin.integrations.llm_compressor.preflight.as_built import build_architecture

    know_rwkv(str(checkpoint.directory))
    return build_architecture(checkpoint)
