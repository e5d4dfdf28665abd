"""What stages observe, against the finished model and the 16-bit one, by float64 brute force.

When a stage is observed, all that it depends on has been rounded. So its linears must have seen
what they see in the finished model, which is thus all it takes to tell; and the 16-bit stream must
be that of the model before.
"""

from collections import defaultdict
from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from helpers import int4, oneshot, tiny_model, tokens

pytest.importorskip("llmcompressor")

from llmcompressor.modeling.moe.linearize import linearize_moe

from moeq_plugin import MoEQuantModifier
from moeq_plugin.integrations.llm_compressor.moequant import request
from moeq_plugin.integrations.llm_compressor.schemes import unquantized
from moeq_plugin.models.moe import RoutingTrace, find_moe_layers

SEQUENCES, LENGTH, PADDED = 6, 24, 7
IDS = tokens(SEQUENCES, LENGTH)
MASK = torch.ones_like(IDS)
MASK[3:, LENGTH - PADDED :] = 0
KEPT = MASK.bool().flatten()


@pytest.fixture
def seen(monkeypatch):
    """What every correction was made of, by the linear that the observation began with."""
    noted, correct = {}, request.correct

    def spy(observation, *arguments, **settings):
        for linear in observation.linears:
            noted[linear] = deepcopy(observation.moments), linear.weight.detach().clone()
        correct(observation, *arguments, **settings)

    monkeypatch.setattr(request, "correct", spy)
    return noted


class Trace:
    """Inputs of all modules of a model in one forward of the calibration set, in float64."""

    def __init__(self, model):
        self.inputs, self.routing = {}, {}
        handles = [
            module.register_forward_pre_hook(self._hook(name))
            for name, module in model.named_modules()
        ]
        with torch.no_grad(), unquantized(model):
            model(input_ids=IDS, attention_mask=MASK, use_cache=False)
        for handle in handles:
            handle.remove()

    def _hook(self, name):
        def note(_module, args):
            if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
                self.inputs[name] = args[0].flatten(0, -2).double()
            if name.endswith(".experts"):
                self.routing[name] = args[1:3]

        return note


def outer_sum(left, right, weights):
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for one, other, a in zip(left, right, weights, strict=True):
        total += 2 * a * torch.outer(one, other)
    return total


class Expected:
    """What the moments of a linear have to be.

    Args:
        before: the 16-bit model.
        after: the finished one.
    """

    def __init__(self, before, after):
        self.theirs, self.ours = Trace(before), Trace(after)
        self.before = dict(before.named_modules())
        self.blocks = {layer.name: layer for layer in find_moe_layers(after)}

    def of(self, name):
        """Return ``hessian, cross, residual`` of a linear."""
        layer = ".".join(name.split(".")[:3])
        block = self.blocks.get(f"{layer}.mlp")
        rows, weights, total = KEPT.nonzero().flatten(), torch.ones(len(KEPT)).double(), None
        theirs = None
        if block is not None and ".mlp." in name:
            trace = RoutingTrace(*self.ours.routing[f"{block.name}.experts"], block.num_experts)
            combine = trace.combine_weights().double()
            hidden = self.ours.inputs[f"{block.name}"]
            shared = torch.zeros(len(hidden)).double()
            if block.shared_expert is not None:
                gate = block.shared_gate
                shared += (
                    1 if gate is None else torch.sigmoid(hidden @ gate.weight.double().T)[:, 0]
                )
            total = combine.sum(1) + shared
            weights = shared
            if ".experts." in name:
                expert = int(name.split(".experts.")[1].split(".")[0])
                weights = combine[:, expert]
                rows = ((weights > 0) & KEPT).nonzero().flatten()
                theirs = self._inputs_in_expert(name, block.name)
        ours = self.ours.inputs[name]
        if theirs is None:
            theirs = self.theirs.inputs[name]
        if ".experts." in name:  # only routed tokens are there, in the order of the dispatch
            tokens_here, _ = trace.dispatch()[expert]
            ours = torch.zeros(len(KEPT), ours.shape[1]).double().index_copy_(0, tokens_here, ours)
        change, a = (theirs - ours)[rows], weights[rows]
        residual = torch.zeros(0, ours.shape[1]).double()
        norm = {"o_proj": "input_layernorm", "down_proj": "post_attention_layernorm"}
        if (of := name.rpartition(".")[2]) in norm:
            stream = f"{layer}.{norm[of]}"
            gap = self.theirs.inputs[stream] - self.ours.inputs[stream]
            gap = gap if total is None else gap / total[:, None]
            residual = outer_sum(gap[rows], ours[rows], a)
        return outer_sum(ours[rows], ours[rows], a), outer_sum(change, ours[rows], a), residual

    def _inputs_in_expert(self, name, block):
        """All tokens of the 16-bit stream, sent through the 16-bit expert."""
        hidden = self.theirs.inputs[block].float()
        expert, _, linear = name.rpartition(".")
        if linear != "down_proj":
            return hidden.double()
        noted = []
        down = self.before[name]
        handle = down.register_forward_pre_hook(lambda _module, args: noted.append(args[0]))
        with torch.no_grad():
            self.before[expert](hidden)
        handle.remove()
        return noted[0].double()


def quantized(family, directory, recipe, **changes):
    """Return the 16-bit model, linearized, and the same after a run."""
    before = tiny_model(family, directory / "model", **changes)
    after = deepcopy(before)
    data = Dataset.from_dict({"input_ids": IDS.tolist(), "attention_mask": MASK.tolist()})
    oneshot(after, recipe, data, batch_size=2)
    linearize_moe(before)
    return before, after


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3"])
def test_pairs_are_those_of_the_finished_and_the_16_bit_model(family, seen, tmp_path):
    recipe = MoEQuantModifier(config_groups=int4(16, num_bits=2), corrected_target=True)
    before, after = quantized(family, tmp_path, recipe)
    names = {module: name for name, module in after.named_modules()}
    expected = Expected(before, after)

    assert {names[m] for m in seen} == {of.name for of in recipe.record.linears}
    assert recipe.record.uncorrected == {}
    kinds = defaultdict(int)
    for linear, (moments, weight) in seen.items():
        name = names[linear]
        assert torch.equal(weight, dict(before.named_modules())[name].weight), name
        found = moments.hessian, moments.cross, moments.residual
        scale = found[0].norm().double()
        for ours, theirs in zip(found, expected.of(name), strict=True):
            assert ours.shape == theirs.shape, name
            assert (ours.double() - theirs).norm() < 1e-3 * scale, name
        kinds[name.rpartition(".")[2]] += bool(moments.cross.norm() > 1e-2 * scale)
    assert all(kinds.values()), kinds  # the two streams are apart wherever there is something

    block = next(iter(expected.ours.routing))
    last = list(expected.ours.routing)[-1]
    routed = [dict(t.routing)[last][0].sort(1).values for t in (expected.theirs, expected.ours)]
    assert block in expected.theirs.routing
    assert not torch.equal(*routed), "both streams route alike: nothing is said about pairs"
