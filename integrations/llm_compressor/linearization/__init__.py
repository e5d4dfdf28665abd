"""Experts of families that the host does not take apart, or not rightly, made linears by us."""

from moeq_plugin.integrations.llm_compressor.linearization.linearize import (
    linearize,
    linearize_own,
)

__all__ = ["linearize", "linearize_own"]
