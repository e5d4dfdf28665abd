"""What happens to a model before the host does anything with it."""

from __future__ import annotations

from llmcompressor.entrypoints.oneshot import Oneshot
from torch import nn

from moeq_plugin.integrations.llm_compressor.linearization import linearize_own
from moeq_plugin.integrations.llm_compressor.preflight import check_arguments, check_cut


def prepare(oneshot: Oneshot) -> None:
    """Check what ``oneshot`` was called with, and take apart what the host would not.

    Args:
        oneshot: about to run; one without a modifier of ours is left as it is.

    Raises:
        ValueError: saying what to pass instead, or why the experts cannot be told apart.
    """
    if not check_arguments(oneshot):
        return
    model, arguments = oneshot.model, oneshot.dataset_args
    assert isinstance(model, nn.Module)  # the host has loaded it where it was given a name
    if arguments.pipeline != "basic":
        check_cut(model)
    # of multi-modal models without an image, which the host would otherwise run to follow them
    arguments.tracing_ignore = [*arguments.tracing_ignore, "get_placeholder_mask"]
    linearize_own(model)
