"""What a layer computes while it calibrates is what it computes otherwise."""

import pytest
import torch
from helpers import FAMILIES, dataset, int4, oneshot, tiny_model
from torch.utils.data import DataLoader

pytest.importorskip("llmcompressor")

from datasets import Dataset
from llmcompressor.modifiers import Modifier

from moeq_plugin import MoEQuantModifier


def layer_outputs(model, run):
    """Return what every decoder layer puts out, batch by batch, while ``run`` runs."""
    seen = {index: [] for index in range(len(model.model.layers))}
    handles = [
        layer.register_forward_hook(
            lambda _m, _a, output, index=index: seen[index].append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for index, layer in enumerate(model.model.layers)
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


def padded(side):
    rows = dataset(4, 24)["input_ids"]
    lengths = [24, 17, 9, 24]
    ids, mask = [], []
    for row, length in zip(rows, lengths, strict=True):
        pads = [0] * (24 - length)
        ids.append(row[:length] + pads if side == "right" else pads + row[:length])
        mask.append([1] * length + pads if side == "right" else pads + [1] * length)
    return Dataset.from_dict({"input_ids": ids, "attention_mask": mask})


DATA = {"even": dataset(4, 24), "right": padded("right"), "left": padded("left")}


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layer_sees_what_it_always_sees(family, data, tmp_path):
    """Later layers receive what quantized ones put out; the first has nothing before it."""
    attention = "eager" if family == "gpt_oss" else "sdpa"
    model = tiny_model(family, tmp_path)
    model.set_attn_implementation(attention)
    batches = list(DataLoader(data.with_format("torch"), batch_size=2))

    @torch.no_grad()
    def plainly():
        for batch in batches:
            model(**batch, use_cache=False)

    plain = layer_outputs(model, plainly)[0]
    groups = int4(16, num_bits=8)
    groups["group_0"]["targets"] = ["re:.*layers.1.*o_proj$"]
    recipe = MoEQuantModifier(config_groups=groups)
    calibrating = layer_outputs(model, lambda: oneshot(model, recipe, data, batch_size=2))[0]

    for batch, ours, theirs in zip(batches, calibrating, plain, strict=False):
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        assert (ours - theirs)[real].norm() <= 1e-5 * theirs[real].norm()


def test_a_pass_that_serves_others_is_as_the_host_made_it(tmp_path):
    """Ours is no business of a recipe that does not name it."""
    model = tiny_model("qwen3_moe", tmp_path)
    data = dataset(2, 24)

    class Foreign(Modifier):
        requires_calibration_data: bool = True

        def on_initialize(self, state, **_):
            return True

    theirs = layer_outputs(model, lambda: oneshot(model, Foreign(), data))[0]
    with torch.no_grad():
        plain = layer_outputs(
            model, lambda: [model(torch.tensor([row])) for row in data["input_ids"]]
        )[0]
    assert (theirs[0] - plain[0]).norm() > 1e-3 * plain[0].norm()  # as long as the host does so
