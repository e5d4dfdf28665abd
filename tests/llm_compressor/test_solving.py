"""What an expert with few tokens borrows from its layer, inside the host's real oneshot flow."""

import pytest
from helpers import dataset, int4, oneshot, tiny_model

pytest.importorskip("llmcompressor")

from moeq_plugin import MoEQuantModifier
from moeq_plugin.records.run import Basis, RunRecord


def layer_0(directory, pipeline):
    model = tiny_model("qwen2_moe", directory / "model")
    recipe = MoEQuantModifier(config_groups=int4(16))
    oneshot(model, recipe, dataset(4, 20), pipeline=pipeline, output_dir=str(directory / "out"))
    (record,) = RunRecord.load(directory / "out")
    return {linear.name: linear for linear in record.linears if ".layers.0." in linear.name}


def test_what_is_borrowed_does_not_depend_on_the_pipeline(tmp_path):
    """The sample of the layer goes through the expert's plain weights.

    In the basic pipeline schemes are at work by then, with scales that nothing has set yet.
    """
    found = {
        pipeline: layer_0(tmp_path / pipeline, pipeline) for pipeline in ("sequential", "basic")
    }

    borrowing = {n for n, linear in found["sequential"].items() if linear.basis is Basis.SHRUNK}
    assert {name.rpartition(".")[2] for name in borrowing} >= {"down_proj", "up_proj"}
    for name, linear in found["sequential"].items():
        other = found["basic"][name]
        assert (other.name, other.basis) == (name, linear.basis)
        assert other.loss == pytest.approx(linear.loss, rel=1e-4)
