"""What the modifier accumulates, against float64 brute force, for seven families."""

from copy import deepcopy

import pytest
import torch
from helpers import FAMILIES, dataset, int4, oneshot, tiny_model, tokens

pytest.importorskip("llmcompressor")

from compressed_tensors.quantization import disable_quantization
from datasets import Dataset

from moeq_plugin import MoEQuantModifier
from moeq_plugin.records.run import Basis


class Spy(MoEQuantModifier):
    """Keeps what was accumulated, and the experts' own arguments, before a layer is compressed."""

    def _begin_pass(self, state):
        super()._begin_pass(state)
        layers = self._start.layers
        self.__dict__["calls"] = {layer.name: [] for layer in layers}
        self.__dict__["seen"] = {}
        for layer in layers:
            calls = self.__dict__["calls"][layer.name]
            self.register_hook(
                layer.experts, lambda _m, args, calls=calls: calls.append(args[:3]), "forward_pre"
            )
        (run,) = self._phases
        solve = run._host._solve

        def note_and_solve():
            self._note(run)
            solve()

        run._host._solve = note_and_solve

    def _note(self, run):
        for observation in run._calibration.observations.values():
            moments = deepcopy(observation.moments)
            experts, position = {}, observation.position
            if position is not None:
                layer, expert = position.layer, position.expert
                module = layer.shared_expert if expert is None else layer.expert(expert)
                experts = {name: p.detach().clone() for name, p in module.state_dict().items()}
            for linear in observation.linears:
                self.__dict__["seen"][run._names[linear]] = (moments, position, experts)


def brute_force(inputs, weights):
    hessian = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    for x, a in zip(inputs.double(), weights.double(), strict=True):
        if a != 0:
            hessian += 2 * a * torch.outer(x, x)
    return hessian


def inputs_of(linear_name, module, hidden_states):
    """Return what a linear of an expert receives when ``hidden_states`` enter the expert."""
    if not linear_name.endswith("down_proj"):
        return hidden_states
    received = []
    handle = module.down_proj.register_forward_pre_hook(lambda _m, args: received.append(args[0]))
    module(hidden_states)
    handle.remove()
    return received[0]


@torch.no_grad()
def assert_equal_brute_force(modifier):
    """Recompute every second moment of MoE layers from the experts' arguments, in float64."""
    compared = 0
    for name, (moments, position, weights) in modifier.__dict__["seen"].items():
        if position is None:
            continue
        calls = modifier.__dict__["calls"][position.layer.name]
        hidden = torch.cat([args[0].flatten(0, -2) for args in calls])
        module = (
            position.layer.shared_expert
            if position.expert is None
            else position.layer.expert(position.expert)
        )
        for key, value in weights.items():
            module.get_parameter(key).data.copy_(value)  # as they were during calibration
        if position.expert is None:
            gate = position.layer.shared_weights(hidden)
            combine = torch.ones(len(hidden)) if gate is None else gate
        else:
            routed = [(args[2] * (args[1] == position.expert)).sum(1) for args in calls]
            combine = torch.cat(routed)
        module.apply(disable_quantization)
        expected = brute_force(inputs_of(name, module, hidden), combine)
        error = (moments.hessian - expected).norm() / expected.norm()
        assert error < 1e-6, name
        assert moments.effective_tokens == pytest.approx(
            (combine.double().sum() ** 2 / combine.double().square().sum()).item(), rel=1e-6
        )
        compared += 1
    assert compared >= 4 * 3  # at least one layer of four experts


@pytest.mark.parametrize("all_experts", [True, False], ids=["all-experts", "routed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_a_float64_brute_force(family, all_experts, tmp_path):
    modifier = Spy(config_groups=int4(16))
    model = tiny_model(family, tmp_path)
    oneshot(model, modifier, dataset(4, 24), moe_calibrate_all_experts=all_experts)
    assert_equal_brute_force(modifier)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_equal_brute_force_where_activation_scales_need_every_token(family, tmp_path):
    groups = int4(None, num_bits=8)
    groups["group_0"]["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True}
    modifier = Spy(config_groups=groups)
    oneshot(tiny_model(family, tmp_path), modifier, dataset(4, 24))
    assert_equal_brute_force(modifier)


@pytest.mark.parametrize("power", [0.0, 2.0])
def test_affinity_power_is_the_power_of_the_combine_weight(power, tmp_path):
    model = tiny_model("qwen2_moe", tmp_path)
    modifier = Spy(config_groups=int4(16), affinity_power=power)

    oneshot(model, modifier, dataset(2, 16))

    name = "model.layers.0.mlp.experts.1.up_proj"
    moments, position, _ = modifier.__dict__["seen"][name]
    calls = modifier.__dict__["calls"][position.layer.name]
    hidden = torch.cat([args[0] for args in calls])
    routed = torch.cat([(args[1] == 1).any(1) for args in calls])
    weights = torch.cat([(args[2] * (args[1] == 1)).sum(1) for args in calls])
    expected = brute_force(hidden[routed], weights[routed] ** power)
    torch.testing.assert_close(moments.hessian.double(), expected, rtol=1e-5, atol=1e-5)


def test_gate_projections_can_be_left_unweighted(tmp_path):
    model = tiny_model("mixtral", tmp_path)
    modifier = Spy(config_groups=int4(16), weight_gate_proj=False)
    plain = Spy(config_groups=int4(16), affinity_power=0)

    oneshot(model, modifier, dataset(2, 16))
    oneshot(tiny_model("mixtral", tmp_path), plain, dataset(2, 16))

    seen, unweighted = modifier.__dict__["seen"], plain.__dict__["seen"]
    expert = "model.layers.0.mlp.experts.0"
    gate, up = seen[f"{expert}.gate_proj"][0], seen[f"{expert}.up_proj"][0]
    torch.testing.assert_close(gate.hessian, unweighted[f"{expert}.gate_proj"][0].hessian)
    assert gate.weight_sum > up.weight_sum


def test_linears_with_one_input_share_one_matrix(tmp_path):
    modifier = Spy(config_groups=int4(16))
    oneshot(tiny_model("qwen3_moe", tmp_path), modifier, dataset(2, 16))

    seen = {name: moments for name, (moments, _, _) in modifier.__dict__["seen"].items()}
    layer = "model.layers.1"
    attention = [seen[f"{layer}.self_attn.{p}_proj"] for p in "qkv"]
    expert = [seen[f"{layer}.mlp.experts.2.{p}_proj"] for p in ("gate", "up")]
    assert attention[0] is attention[1] is attention[2]
    assert expert[0] is expert[1]
    assert seen[f"{layer}.self_attn.o_proj"] is not attention[0]
    assert seen[f"{layer}.mlp.experts.3.up_proj"] is not expert[0]


def padded(ids, length, side):
    """Pad each row of ``ids`` to ``length`` on one side, with an attention mask."""
    rows, masks = [], []
    for row in ids.tolist():
        fill = [0] * (length - len(row))
        rows.append(row + fill if side == "right" else fill + row)
        masks.append([1] * len(row) + fill if side == "right" else fill + [1] * len(row))
    return Dataset.from_dict({"input_ids": rows, "attention_mask": masks})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_right_padding_changes_nothing(attention, tmp_path):
    ids = tokens(4, 20)
    without, with_padding = Spy(config_groups=int4(16)), Spy(config_groups=int4(16))

    for modifier, data in ((without, dataset_of(ids)), (with_padding, padded(ids, 32, "right"))):
        model = tiny_model("qwen2_moe", tmp_path)
        model.set_attn_implementation(attention)
        oneshot(model, modifier, data, batch_size=2)

    for name, (moments, _, _) in without.__dict__["seen"].items():
        other = with_padding.__dict__["seen"][name][0]
        assert other.effective_tokens == pytest.approx(moments.effective_tokens, rel=1e-5), name
        if "layers.0" in name:  # later layers see what the quantized first layer gives
            torch.testing.assert_close(other.hessian, moments.hessian, rtol=1e-4, atol=1e-4)


def dataset_of(ids):
    return Dataset.from_dict({"input_ids": ids.tolist()})


def test_left_padding_is_left_out_too(tmp_path):
    modifier = Spy(config_groups=int4(16))
    data = padded(tokens(4, 20), 32, "left")
    oneshot(tiny_model("qwen3_moe", tmp_path), modifier, data, batch_size=2)
    moments = modifier.__dict__["seen"]["model.layers.0.self_attn.q_proj"][0]
    assert moments.effective_tokens == 4 * 20


def test_batch_size_changes_nothing(tmp_path):
    one, four = Spy(config_groups=int4(16)), Spy(config_groups=int4(16))
    for modifier, batch_size in ((one, 1), (four, 4)):
        model = tiny_model("olmoe", tmp_path)
        oneshot(model, modifier, dataset(4, 24), batch_size=batch_size)
    for name, (moments, _, _) in one.__dict__["seen"].items():
        if "layers.0" in name:
            other = four.__dict__["seen"][name][0]
            torch.testing.assert_close(other.hessian, moments.hessian, rtol=1e-4, atol=1e-4)


PRIOR = 0.8


class Guarded(Spy):
    """Keeps what the guard makes of every observation."""

    def _note(self, run):
        super()._note(run)
        made = self.__dict__.setdefault("made", {})
        for observation in run._calibration.observations.values():
            hessian, weight_sum, basis = run._request.guard(observation, run._calibration)
            for linear in observation.linears:
                made[run._names[linear]] = (hessian / weight_sum, basis)


def test_a_prior_is_white_noise_beside_the_tokens_that_an_expert_has_or_borrows(tmp_path):
    """In float64; the layer's sample is all of its tokens here, for they are few."""
    modifier = Guarded(
        config_groups=int4(16), prior_tokens=PRIOR, min_effective_tokens=40, dampening_frac=0.5
    )
    oneshot(tiny_model("qwen3_moe", tmp_path), modifier, dataset(4, 24))

    bases, noises = set(), set()
    for name, (moments, position, weights) in modifier.__dict__["seen"].items():
        made, basis = modifier.__dict__["made"][name]
        num_inputs, n = len(moments.hessian), moments.effective_tokens
        expected, rests_on = moments.hessian.double() / moments.weight_sum, n
        if basis is Basis.SHRUNK:
            calls = modifier.__dict__["calls"][position.layer.name]
            module = position.layer.expert(position.expert)
            for key, value in weights.items():
                module.get_parameter(key).data.copy_(value)
            module.apply(disable_quantization)
            with torch.no_grad():
                rows = inputs_of(name, module, torch.cat([c[0].flatten(0, -2) for c in calls]))
            of_layer = 2 * rows.double().T @ rows.double() / len(rows)
            expected, rests_on = (n * expected + (40 - n) * of_layer) / 40, 40
        noise = max(0.0, PRIOR * (num_inputs / rests_on - 0.1) - 0.5)
        noises.add(noise > 0)
        expected = expected + noise * expected.trace() / num_inputs * torch.eye(num_inputs)
        assert (made.double() - expected).norm() < 1e-5 * expected.norm(), name
        bases.add(basis)
    assert bases == {Basis.OWN, Basis.SHRUNK}
    assert noises == {True, False}


def test_sensitivities_are_measured_with_the_prior():
    modifier = MoEQuantModifier(prior_tokens=PRIOR, bits_per_weight=4.0)

    assert modifier.sensitivity_modifier().solver_options().prior_tokens == PRIOR


@pytest.mark.parametrize("tokens", [-1.0, float("inf"), float("nan")])
def test_refuses_a_prior_that_is_no_number_of_tokens(tokens):
    with pytest.raises(ValueError, match="prior_tokens"):
        MoEQuantModifier(prior_tokens=tokens)
