"""Whether the host will run the decoder layers one by one, as corrected targets need them."""

from __future__ import annotations

from compressed_tensors.utils import match_named_modules
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from torch import nn

from moeq_plugin.integrations.llm_compressor.host import running_oneshot
from moeq_plugin.models.decoders import all_decoder_layers
from moeq_plugin.models.moe import UnsupportedModelError

_PIPELINES = (None, "independent", "sequential")


def check_layer_by_layer(model: nn.Module) -> None:
    """Refuse a pass in which decoder layers are not finished one by one.

    Raises:
        ValueError: naming the argument of ``oneshot`` that says so.
    """
    running = running_oneshot()
    if running is None:
        return
    arguments = running.dataset_args
    wrong: dict[str, object] = {}
    if arguments.pipeline not in _PIPELINES:
        wrong["pipeline"] = arguments.pipeline
    if arguments.sequential_targets_per_subgraph != 1:
        wrong["sequential_targets_per_subgraph"] = arguments.sequential_targets_per_subgraph
    try:
        layers = {layer.whole.module for layer in all_decoder_layers(model)}
    except UnsupportedModelError:
        layers = set()  # the run says that it cannot correct
    targets = infer_sequential_targets(model, arguments.sequential_targets)
    matched = {module for _, module in match_named_modules(model, list(targets))}
    if not layers <= matched or any(
        inner in matched for layer in layers for inner in layer.modules() if inner is not layer
    ):
        wrong["sequential_targets"] = targets
    if wrong:
        listed = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise ValueError(
            "corrected_target rounds decoder layers one after the other, each before the next is "
            f"run, and oneshot was called with {listed}. Leave that out, or corrected_target"
        )
