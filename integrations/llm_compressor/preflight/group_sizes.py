"""Whether the groups of a scheme divide the weights that they are for."""

from __future__ import annotations

from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from moeq_plugin.integrations.llm_compressor.schemes import weight_of

_LISTED = 10


def check_group_sizes(modules: dict[nn.Module, str]) -> None:
    """Refuse groups that do not divide a weight.

    The host's ``bypass_divisibility_checks`` has no effect: the grids that are solved for end where
    a group ends.

    Args:
        modules: the modules with their schemes attached, and their names.

    Raises:
        ValueError: saying which size would do, and listing the first ten modules.
    """
    lines, columns = [], []
    for module, name in modules.items():
        scheme: QuantizationScheme = module.quantization_scheme
        group_size, weight = scheme.weights.group_size, weight_of(module)
        if group_size and group_size > 0 and weight.shape[1] % group_size:
            columns.append(weight.shape[1])
            lines.append(f"  - {name} (columns={columns[-1]}, group_size={group_size})")
    if not lines:
        return
    fitting = [size for size in (128, 64, 32, 16) if not any(c % size for c in columns)]
    advice = f"use group_size {fitting[0]}" if fitting else "use channel-wise weights"
    raise ValueError(
        f"group_size must divide the input columns of every weight; {advice} for these modules, "
        "or put them into `ignore` (bypass_divisibility_checks has no effect here):\n"
        + "\n".join(lines[:_LISTED])
        + (f"\n  and {len(lines) - _LISTED} more" if len(lines) > _LISTED else "")
    )
