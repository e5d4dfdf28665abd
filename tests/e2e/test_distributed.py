"""Several processes give the checkpoint that one gives, and one that dies leaves a state."""

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from helpers import NoProcessor, dataset, int4, tiny_model
from safetensors.torch import load_file
from torch import distributed, multiprocessing

pytest.importorskip("llmcompressor")

from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

from moeq_plugin import MoEQuantAWQModifier, MoEQuantModifier, SensitivityTable
from moeq_plugin.files import publish
from moeq_plugin.integrations.llm_compressor import ResidualRotationModifier
from moeq_plugin.integrations.llm_compressor.checkpoint import saving
from moeq_plugin.integrations.llm_compressor.moequant.run_state import RunState


def run(model_path, out, **settings):
    data = settings.pop("data", dataset(32))
    if data is not None and distributed.is_initialized() and not settings.pop("shared", False):
        data = data.shard(distributed.get_world_size(), distributed.get_rank(), contiguous=True)
    host, before = settings.pop("host", {}), settings.pop("before", [])
    count = {} if data is None else {"num_calibration_samples": len(data)}  # else the host fails
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        recipe=[*before, MoEQuantModifier(**{"config_groups": int4(), **settings})],
        dataset=data,
        processor=NoProcessor(),
        shuffle_calibration_samples=False,
        output_dir=str(out),
        **count,
        **host,
    )


def worker(rank, world_size, rendezvous, model_path, out, settings):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    settings.pop("prepare", lambda _rank: None)(rank)
    dying, at = settings.pop("dies", (None, None))
    if dying == rank:
        keep_alive = RunState.begin

        def begin_and_die_later(self, data):
            keep_alive(self, data)
            from moeq_plugin.integrations.llm_compressor.calibration import rank_moments

            exchange, count = rank_moments.exchange, iter(range(100))

            def exchange_or_die(*arguments):
                if next(count) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return exchange(*arguments)

            rank_moments.exchange = exchange_or_die

        RunState.begin = begin_and_die_later
    run(model_path, out, **settings)
    distributed.destroy_process_group()


def run_on_ranks(world_size, tmp_path, model_path, out, **settings):
    rendezvous = tmp_path / f"rendezvous-{out.name}"
    multiprocessing.start_processes(
        worker,
        (world_size, rendezvous, model_path, out, settings),
        nprocs=world_size,
        start_method="fork",
    )


def tensors(directory):
    return {k: v for p in directory.glob("*.safetensors") for k, v in load_file(p).items()}


def share_of_equal_words(ours, theirs):
    """Packed words hold eight codes each, so this is a lower bound on equal codes."""
    assert ours.keys() == theirs.keys()
    packed = [name for name in ours if name.endswith("weight_packed")]
    assert packed
    equal = torch.cat([(ours[n] == theirs[n]).flatten() for n in packed])
    return equal.double().mean().item()


def records(directory):
    (run,) = json.loads((directory / "moeq_run.json").read_text())["runs"]
    return {linear["name"]: linear for linear in run["linears"]}


def awq_record(directory):
    runs = json.loads((directory / "moeq_run.json").read_text())["runs"]
    (found,) = (run for run in runs if run["modifier"] == "MoEQuantAWQModifier")
    return found


@pytest.mark.parametrize(
    ("family", "world_size", "more"),
    [
        *((f, n, {}) for f in ("qwen3_moe", "mixtral", "deepseek_v2") for n in (2, 4)),
        ("qwen3_moe", 3, {"row_feedback": True}),
    ],
)
def test_ranks_give_what_one_process_gives(family, world_size, more, tmp_path):
    """But for rounding ties, that sums in another order tip: a tipped code changes what later
    layers see, so here they do not see it."""
    tiny_model(family, tmp_path / "model")
    scheme = {"config_groups": int4(16), "host": {"propagate_error": False}, **more}
    run(tmp_path / "model", tmp_path / "one", **scheme)
    run_on_ranks(world_size, tmp_path, tmp_path / "model", tmp_path / "many", **scheme)
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert share_of_equal_words(many, one) > 0.998
    for name, ours in records(tmp_path / "many").items():
        theirs = records(tmp_path / "one")[name]
        assert ours["basis"] == theirs["basis"]
        assert ours["effective_tokens"] == pytest.approx(theirs["effective_tokens"], rel=1e-4)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2, abs=1e-9)


FIRST = re.compile(r"\.(q|k|v|kv)_.*proj")  # of an attention


def share_of_near_weights(ours, theirs):
    """Of 8-bit codes, four to a packed word: those that are the same or neighbours, by value."""
    names = [name.removesuffix("_packed") for name in ours if name.endswith("weight_packed")]
    near = []
    for name in (name for name in names if not FIRST.search(name)):
        scale = ours[f"{name}_scale"]
        values = [
            (of[f"{name}_packed"].view(torch.uint8).float() - 128).unflatten(
                1, (scale.shape[1], -1)
            )
            * of[f"{name}_scale"][..., None]
            for of in (ours, theirs)
        ]
        near.append(((values[0] - values[1]).abs() < 1.1 * scale.abs()[..., None]).flatten())
    return torch.cat(near).double().mean().item()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_ranks_correct_targets_as_one_process_does(family, tmp_path):
    """Coarse codes where a layer begins leave much to make up for, fine ones behind show how much.

    A tie that is tipped changes what later stages see, in steps of fine codes by next to nothing;
    without a search for scales, whose choices are ties as well.
    """
    tiny_model(family, tmp_path / "model")
    coarse, fine = (int4(16, num_bits=bits)["group_0"] for bits in (2, 8))
    groups = {
        "coarse": {**coarse, "targets": [r"re:.*self_attn\.(q|k|v|kv)_.*"]},
        "fine": {**fine, "targets": [r"re:.*\.(o|gate|up|down)_proj$"]},
    }
    settings = {"config_groups": groups, "preset": "fast", "host": {"propagate_error": False}}
    run(tmp_path / "model", tmp_path / "plain", **settings)
    settings["corrected_target"] = True
    run(tmp_path / "model", tmp_path / "one", **settings)
    run_on_ranks(2, tmp_path, tmp_path / "model", tmp_path / "many", **settings)
    plain, one, many = (tensors(tmp_path / name) for name in ("plain", "one", "many"))
    assert share_of_near_weights(one, plain) < 0.8
    assert share_of_near_weights(many, one) > 0.999
    ours, theirs = records(tmp_path / "many"), records(tmp_path / "one")
    for name, of in theirs.items():
        assert ours[name]["basis"] == of["basis"]
        assert ours[name]["effective_tokens"] == pytest.approx(of["effective_tokens"], rel=1e-3)


def test_ranks_that_propagate_errors_lose_as_little(tmp_path):
    tiny_model("qwen3_moe", tmp_path / "model")
    settings = {"corrected_target": True}
    run(tmp_path / "model", tmp_path / "one", **settings)
    run_on_ranks(2, tmp_path, tmp_path / "model", tmp_path / "many", **settings)
    ours, theirs = (
        sum(record["loss"] for record in records(tmp_path / name).values())
        for name in ("many", "one")
    )
    assert ours == pytest.approx(theirs, rel=0.01)


def test_ranks_rotate_the_weights_that_they_share_once(tmp_path):
    tiny_model("mixtral", tmp_path / "model")
    scheme = {"config_groups": int4(16), "host": {"propagate_error": False}}
    run(tmp_path / "model", tmp_path / "one", before=[ResidualRotationModifier()], **scheme)
    rotation = ResidualRotationModifier()
    run_on_ranks(2, tmp_path, tmp_path / "model", tmp_path / "many", before=[rotation], **scheme)
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert share_of_equal_words(many, one) > 0.998
    kept = [name for name in one if name.endswith(("embed_tokens.weight", "norm.weight"))]
    assert len(kept) > 4
    for name in kept:  # bit by bit: they were rotated and not quantized
        torch.testing.assert_close(many[name], one[name], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_ranks_move_the_scales_that_one_process_moves(family, tmp_path):
    """The norms tell: they are divided by the scales and not quantized.

    On an asymmetric grid: the ends of the symmetric one are ties, and candidates are judged by it.
    """
    tiny_model(family, tmp_path / "model")
    scheme = {"config_groups": int4(16, symmetric=False), "host": {"propagate_error": False}}
    awq = {"n_grid": 6, "clip": True}
    run(tmp_path / "model", tmp_path / "one", before=[MoEQuantAWQModifier(**awq)], **scheme)
    before = [MoEQuantAWQModifier(**awq)]
    run_on_ranks(2, tmp_path, tmp_path / "model", tmp_path / "many", before=before, **scheme)

    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    norms = [name for name in one if name.endswith("layernorm.weight")]
    assert any((one[name] - 1).abs().max() > 0.1 for name in norms)
    for name in norms:
        torch.testing.assert_close(many[name], one[name], rtol=1e-4, atol=0)
    ours, theirs = (awq_record(tmp_path / name) for name in ("many", "one"))
    assert ours["clipped"] == pytest.approx(theirs["clipped"], rel=1e-2)
    assert ours["smoothed"].keys() == theirs["smoothed"].keys()
    for name, of in theirs["smoothed"].items():
        found = ours["smoothed"][name]
        assert found["basis"] == of["basis"]
        for key in ("effective_tokens", "loss", "loss_unscaled"):
            assert (found[key] or 0) == pytest.approx(of[key] or 0, rel=1e-3)


def test_what_a_tie_changes_is_nothing_that_matters(tmp_path):
    tiny_model("mixtral", tmp_path / "model")
    run(tmp_path / "model", tmp_path / "one")
    run_on_ranks(4, tmp_path, tmp_path / "model", tmp_path / "many")
    ours, theirs = (
        sum(record["loss"] for record in records(tmp_path / name).values())
        for name in ("many", "one")
    )
    assert ours == pytest.approx(theirs, rel=0.01)


def test_the_model_writes_its_text_once_for_all_ranks(tmp_path):
    tiny_model("qwen3_moe", tmp_path / "model")
    settings = {"data": None, "ebss": {"num_sequences": 32, "seq_len": 32}}
    run(tmp_path / "model", tmp_path / "one", **settings)
    run_on_ranks(2, tmp_path, tmp_path / "model", tmp_path / "many", **settings)
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert share_of_equal_words(many, one) > 0.999


def test_experts_that_borrow_are_named_by_all_and_stay_sound(tmp_path):
    """Ranks draw other samples of the layer's tokens, so only the quality can be the same."""
    tiny_model("qwen3_moe", tmp_path / "model")
    settings = {"data": dataset(4, 16), "min_effective_tokens": 500.0}
    run(tmp_path / "model", tmp_path / "one", **settings)
    run_on_ranks(2, tmp_path, tmp_path / "model", tmp_path / "many", **settings)
    ours, theirs = records(tmp_path / "many"), records(tmp_path / "one")
    assert {n: r["basis"] for n, r in ours.items()} == {n: r["basis"] for n, r in theirs.items()}
    assert "shrunk" in {r["basis"] for r in ours.values()}
    total = [sum(r["loss"] for r in found.values()) for found in (ours, theirs)]
    assert total[0] == pytest.approx(total[1], rel=0.05)


@pytest.mark.parametrize("corrected", [False, True], ids=["at once", "in stages"])
def test_a_rank_that_dies_ends_the_run_and_leaves_its_state(corrected, tmp_path):
    tiny_model("qwen3_moe", tmp_path / "model")
    asked = {"corrected_target": corrected}
    work = {"work_dir": str(tmp_path / "work"), **asked}
    # in the second layer: each has one exchange, and with stages one more for each of four
    dies = (1, 8 if corrected else 2)
    with pytest.raises(multiprocessing.ProcessExitedException, match="SIGKILL"):
        run_on_ranks(2, tmp_path, tmp_path / "model", tmp_path / "dead", dies=dies, **work)
    assert len(list((tmp_path / "work").glob("layer-*"))) == 1
    run_on_ranks(2, tmp_path, tmp_path / "model", tmp_path / "many", **work)
    run_on_ranks(2, tmp_path, tmp_path / "model", tmp_path / "whole", **asked)
    assert share_of_equal_words(tensors(tmp_path / "many"), tensors(tmp_path / "whole")) == 1.0


DEATHS = {
    "before the record": (0, saving, "save_records"),
    "before the tokenizer": (0, NoProcessor, "save_pretrained"),
    "before all have come to the end": (1, NoProcessor, "save_pretrained"),
    "before it has its name": (0, publish, "finish"),
}


@pytest.mark.parametrize("when", DEATHS)
def test_no_half_a_checkpoint_has_its_name(when, tmp_path):
    rank_that_dies, owner, name = DEATHS[when]

    def prepare(rank):
        if rank == rank_that_dies:
            setattr(owner, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))

    tiny_model("qwen3_moe", tmp_path / "model")
    errors = (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException)
    with pytest.raises(errors):  # of the one that died, or of the one that waited for it
        run_on_ranks(2, tmp_path, tmp_path / "model", tmp_path / "out", prepare=prepare)
    assert not (tmp_path / "out").exists()
    (tmp_path / "rendezvous-out").unlink(missing_ok=True)
    run_on_ranks(2, tmp_path, tmp_path / "model", tmp_path / "out")
    run_on_ranks(2, tmp_path, tmp_path / "model", tmp_path / "whole")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert share_of_equal_words(tensors(tmp_path / "out"), tensors(tmp_path / "whole")) == 1.0
    assert not list(tmp_path.glob(".*"))


def test_every_rank_fails_where_one_cannot_publish(tmp_path):
    def prepare(rank):
        def fill(*_):
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "config.json").write_text("theirs")

        if rank == 1:
            NoProcessor.save_pretrained = fill

    tiny_model("qwen3_moe", tmp_path / "model")
    with pytest.raises(multiprocessing.ProcessRaisedException, match="is complete in .*out-2"):
        run_on_ranks(2, tmp_path, tmp_path / "model", tmp_path / "out", prepare=prepare)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    assert (tmp_path / "out" / "config.json").read_text() == "theirs"
    assert len(records(tmp_path / "out-2")) > 0


def test_every_rank_refuses_an_output_with_files(tmp_path):
    tiny_model("qwen3_moe", tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("theirs")
    with pytest.raises(multiprocessing.ProcessRaisedException, match="is not empty"):
        run_on_ranks(2, tmp_path, tmp_path / "model", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_the_same_data_on_every_rank_are_refused(tmp_path):
    tiny_model("qwen3_moe", tmp_path / "model")
    with pytest.raises(multiprocessing.ProcessRaisedException, match="16 of the same sequences"):
        run_on_ranks(2, tmp_path, tmp_path / "model", tmp_path / "out", shared=True)


def test_ranks_measure_the_sensitivities_that_one_process_measures(tmp_path):
    """With tokens enough that no expert borrows: ranks draw other samples to borrow from."""
    tiny_model("qwen3_moe", tmp_path / "model")
    wish = {
        "config_groups": None,
        "bits_per_weight": 6.6,
        "target": "expert",
        "options": ["W4A16_G32", "W8A16_G32", "UNQUANTIZED"],
        "host": {"batch_size": 4},
        "data": dataset(64, 64),
    }
    run(tmp_path / "model", tmp_path / "one", **wish)
    run_on_ranks(2, tmp_path, tmp_path / "model", tmp_path / "many", **wish)
    ours, theirs = (
        SensitivityTable.load(tmp_path / name / "moeq_sensitivity.json") for name in ("many", "one")
    )
    assert ours.rows == theirs.rows
    assert ours.undercovered == theirs.undercovered
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-2)
    choices = [
        json.loads((tmp_path / name / "moeq_allocation.json").read_text())["choice"]
        for name in ("many", "one")
    ]
    assert choices[0] == choices[1]
    assert len(set(choices[0].values())) > 1
