"""What ranks of tensor parallelism can share, by the rules of vLLM's weight loaders."""

import pytest

from moeq_plugin.checkpoint.architecture import Linear, Role
from moeq_plugin.checkpoint.checks.tensor_parallel import why_indivisible
from moeq_plugin.checkpoint.schemes import Scheme

INT4 = Scheme("pack-quantized", 4, 32)
CHANNEL = Scheme("pack-quantized", 4, None, strategy="channel")
ASYMMETRIC = Scheme("pack-quantized", 4, 32, symmetric=False)


def linear(name, rows, columns, role=Role.EXPERT):
    return Linear(f"model.layers.0.{name}", (rows, columns), role)


@pytest.mark.parametrize(
    ("of", "scheme", "tp", "reason"),
    [
        (linear("down_proj", 64, 128), INT4, 4, None),
        (linear("down_proj", 64, 128), INT4, 8, "groups of 32 do not divide 8 ranks with 16"),
        (linear("down_proj", 64, 128), None, 8, None),
        (linear("down_proj", 64, 130), None, 4, "130 columns over 4 ranks"),
        (linear("down_proj", 64, 36), CHANNEL, 4, "9 columns of 4 bits fill no whole words"),
        (linear("up_proj", 66, 128), None, 4, "66 rows over 4 ranks"),
        (linear("up_proj", 64, 128), INT4, 8, None),
        (linear("up_proj", 64, 144), INT4, 1, "groups of 32 do not divide 144 columns"),
        (linear("up_proj", 36, 128), INT4, 4, None),
        (linear("up_proj", 36, 128), ASYMMETRIC, 4, "9 zero points of 4 bits fill no whole words"),
        (linear("gate", 6, 128, Role.ROUTER), None, 4, None),
        (linear("lm_head", 130, 128, Role.HEAD), None, 4, None),
        (linear("q_a_proj", 66, 128, Role.ATTENTION), None, 4, None),
    ],
)
def test_a_weight_is_shared_or_it_is_said_why_not(of, scheme, tp, reason):
    found = why_indivisible(of, scheme, tp)
    assert (found is None) if reason is None else (reason in found)
