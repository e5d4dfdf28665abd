"""What transformers 5.17 makes of the routed experts in a quantized checkpoint.

It fuses the experts of a layer while it loads, by a rule for the architecture, and dequantizes them
first, all in one scheme. Whoever writes or judges a checkpoint asks here, so that both say the
same. The standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_AT_RANDOM = "would initialize them at random, with no more than a load report"


@dataclass(frozen=True)
class Grid:
    """What transformers asks about the scheme of an expert's weights.

    Attributes:
        num_bits: of a code.
        is_float: whether codes are floats.
        symmetric: whether there are no zero points.
        has_second_scale: whether scales have a scale, as those of NVFP4.
        has_groups: whether a row has several scales.
        is_packed: whether codes are packed into words, as integers are beside 16-bit activations.
    """

    num_bits: int
    is_float: bool
    symmetric: bool
    has_second_scale: bool
    has_groups: bool
    is_packed: bool


def misread_experts(
    grids: set[Grid | None], names: Mapping[str, str], names_in_file: set[str], reader: str
) -> Iterator[str]:
    """Yield what goes wrong with experts stored one by one in one checkpoint, as sentences.

    Args:
        grids: of all experts, ``None`` for those in 16 bit; something else is quantized if all are.
        names: by the rule of the architecture, what files call a projection; empty without a rule.
        names_in_file: what this one calls them; empty if they will be those of the rule.
        reader: what loads the checkpoint.
    """
    quantized = [grid for grid in grids if grid is not None]
    if not quantized:
        # its rule would merge them, but a quantized checkpoint is read without that rule
        yield (
            f"the experts stay in 16 bit beside quantized weights; {reader} does not find them and "
            f"{_AT_RANDOM}"
        )
        return
    if not names:
        yield (
            f"{reader} has no rule to read this architecture's experts from per-expert tensors and "
            f"{_AT_RANDOM}"
        )
    elif not names_in_file <= set(names.values()):
        yield (
            f"{reader} looks for experts under {', '.join(names.values())}, not under "
            f"{', '.join(sorted(names_in_file))}, and {_AT_RANDOM}"
        )
    if any(not grid.symmetric for grid in quantized):
        yield f"{reader} does not read zero points of experts and fails"
    if any(grid.has_second_scale for grid in quantized):
        yield (
            f"{reader} does not read the second scale of NVFP4 experts and loads other numbers, "
            "silently"
        )
    if any(grid.is_float and grid.num_bits == 8 and grid.has_groups for grid in quantized):
        yield f"{reader} does not read MXFP8 experts and fails"
    if any(not grid.is_packed and not grid.is_float for grid in quantized):
        yield (
            f"{reader} reads experts in integers only if they are packed (pack-quantized), which "
            "they are where weights alone are quantized, and fails"
        )
