"""Can the numbers of a weight be read as its format has them?"""

from __future__ import annotations

from moeq_plugin.checkpoint.architecture import Linear
from moeq_plugin.checkpoint.codes import can_read
from moeq_plugin.checkpoint.formats import tensors_of
from moeq_plugin.checkpoint.layout import Layout


def is_readable(layout: Layout, linear: Linear) -> bool:
    """Tell whether a weight's tensors are all there in the shapes that its format asks for."""
    found, scheme = layout.modules[linear.name], layout.stored[linear.name]
    expected = tensors_of(scheme, linear.shape)
    return expected is not None and all(
        (suffix in found and can_read(found[suffix]))
        and found[suffix].shape == wanted.shape
        and found[suffix].dtype in wanted.dtypes
        for suffix, wanted in expected.items()
        if not wanted.is_optional or suffix in found
    )
