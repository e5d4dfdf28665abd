"""What outputs of linears count, against float64 sums over the tokens of a model of its own."""

import pytest
import torch
from helpers import FAMILIES, dataset, int4, oneshot, tiny_model, tokens
from torch import nn

pytest.importorskip("llmcompressor")

from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import AutoModelForCausalLM

from moeq_plugin import MoEQuantModifier
from moeq_plugin.core.sampling import draw
from moeq_plugin.models.evaluation import evaluate
from moeq_plugin.models.gradients import chances_of
from moeq_plugin.records.run import RunRecord

W3 = int4(16, num_bits=3)


class Spy(MoEQuantModifier):
    """Keeps the moments that weights were rounded with."""

    def _begin_pass(self, state):
        super()._begin_pass(state)
        seen = self.__dict__["seen"] = {}
        (run,) = self._phases
        of = run._outputs.of

        def of_and_keep(linears):
            seen[tuple(run._names[linear] for linear in linears)] = moments = of(linears)
            return moments

        run._outputs.of = of_and_keep


def gradients(model, rows, seed=0):
    """Return ``[tokens, out]`` float64 gradients at the outputs of all linears in layers."""
    caught = {}

    def catch(name):
        def keep(gradient):
            caught.setdefault(name, []).append(gradient.flatten(0, -2).double())

        return lambda _m, _args, output: output.register_hook(keep) and None

    for name, module in model.model.layers.named_modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(catch(f"model.layers.{name}"))
    for row in rows:
        logits = model(row[None], use_cache=False).logits[0]
        drawn = draw(logits.detach().softmax(-1), next(chances_of([row], seed)))
        nn.functional.cross_entropy(logits, drawn.flatten(), reduction="sum").backward()
    return {name: torch.cat(parts) for name, parts in caught.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_sums_over_tokens_that_all_count_the_same(family, tmp_path):
    model = tiny_model(family, tmp_path / "model").eval()
    modifier = Spy(config_groups=W3, row_feedback=True, seed=3)

    oneshot(model, modifier)

    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    linearize_moe(reference)
    expected = gradients(reference.eval(), tokens(8, 32), seed=3)
    seen = {group: moments for group, moments in modifier.seen.items() if moments is not None}
    assert {name for group in seen for name in group} == {
        record.name for record in modifier.record.linears if record.name in expected
    }
    together = {tuple(name.rpartition(".")[2] for name in group) for group in seen}
    assert ("gate_proj", "up_proj") in together
    assert ("q_proj", "k_proj", "v_proj") in together or "deepseek" in family
    for group, moments in seen.items():
        of_group = torch.cat([expected[name] for name in group], dim=1)
        norms = of_group.norm(dim=1, keepdim=True)
        of_group = of_group / norms.where(norms > 0, 1)
        wanted = of_group.T @ of_group
        size = float(wanted.diagonal().mean())
        assert size > 0
        torch.testing.assert_close(moments.double() / size, wanted / size, rtol=1e-3, atol=1e-4)


def kl(directory, **fields):
    reference = tiny_model("qwen3_moe", directory)
    model = tiny_model("qwen3_moe", directory)
    ignore = ["lm_head", "re:.*gate$"]
    oneshot(model, MoEQuantModifier(config_groups=W3, ignore=ignore, **fields), dataset(32))
    return evaluate(model, reference, [tokens(16, 32, seed=9)]).kl


@pytest.mark.parametrize("fields", [{"preset": "fast"}, {"preset": "best"}], ids=["fast", "best"])
def test_the_model_changes_less(fields, tmp_path):
    with_feedback = kl(tmp_path, **fields, row_feedback=True)
    without = kl(tmp_path, **fields, row_feedback=False)
    # outputs of a random model hang together little
    assert with_feedback < 0.99 * without


def test_the_record_says_what_it_rests_on_and_what_was_rounded_without(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path / "model")
    groups = int4(16, num_bits=3)
    groups["group_0"]["targets"].append("lm_head")  # which is in no layer
    modifier = MoEQuantModifier(config_groups=groups, row_feedback=True)

    oneshot(model, modifier, output_dir=str(tmp_path / "out"))

    (record,) = RunRecord.load(tmp_path / "out")
    assert "lm_head" in {linear.name for linear in record.linears}
    assert record.run["row feedback"] == (
        "gradients of 256 tokens, but not for 1 linears such as lm_head"
    )
    assert {"hardware", "wall time", "peak memory"} <= record.run.keys()


def test_a_model_that_gradients_do_not_come_back_through_is_refused_untouched(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.model.norm.register_forward_hook(lambda _m, _args, output: output.detach())

    with pytest.raises(ValueError, match=r"no gradient comes back .*Leave row_feedback off"):
        oneshot(model, MoEQuantModifier(config_groups=W3, row_feedback=True))

    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items() if "experts" not in name)
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model.model.layers[0].self_attn.q_proj, "quantization_scheme")
