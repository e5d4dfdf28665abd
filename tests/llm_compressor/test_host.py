"""What ``host.py`` relies on is still there, and nothing of it outlives its scope."""

import inspect
from contextlib import ExitStack

import pytest
import torch
import tqdm
from helpers import NoProcessor, dataset, int4, oneshot, tiny_model, tokens

pytest.importorskip("llmcompressor")

from compressed_tensors.compressors.naive_quantized import base as naive_quantized
from compressed_tensors.compressors.pack_quantized import base as pack_quantized
from compressed_tensors.offload.cache import DistributedCPUCache
from llmcompressor import oneshot as host_oneshot
from llmcompressor.args.dataset_arguments import DatasetArguments
from llmcompressor.core import State
from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.modeling.moe import context as moe_context
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform.awq import base as awq_base
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential import SequentialPipeline

from moeq_plugin import MoEQuantModifier
from moeq_plugin.integrations.llm_compressor import host
from moeq_plugin.integrations.llm_compressor.preflight import check_arguments

MOVED = "llm-compressor has moved what integrations/llm_compressor/host.py relies on: "


def parameters(function):
    return set(inspect.signature(function).parameters)


# what is touched, whether it is as expected, and what of ours depends on it
PLACES = {
    "Oneshot.__call__ runs a oneshot": lambda: parameters(Oneshot.__call__) == {"self"},
    "Oneshot has output_dir, processor, model and dataset_args": lambda: all(
        f"self.{name} =" in inspect.getsource(Oneshot.__init__)
        for name in ("output_dir", "processor", "model", "dataset_args")
    ),
    "IntermediatesCache.from_dataloader is a class method that caches batches": lambda: (
        isinstance(vars(IntermediatesCache)["from_dataloader"], classmethod)
        and "IntermediatesCache.from_dataloader(" in inspect.getsource(SequentialPipeline)
    ),
    "IntermediatesCache.fetch takes an index and names": lambda: (
        parameters(IntermediatesCache.fetch) >= {"batch_index", "input_names"}
    ),
    "experts read the flag that calibrates all of them while they run": lambda: (
        moe_context._CALIBRATE_ALL_EXPERTS is False
        and "get_calibrate_all_experts_flag()" in inspect.getsource(LinearExperts2D.forward)
    ),
    "the pipelines serve the modifiers of the recipe that runs": lambda: (
        "lifecycle.recipe.modifiers" in inspect.getsource(SequentialPipeline)
    ),
    "propagate_error decides what the next layer receives": lambda: (
        "dataset_args.propagate_error" in inspect.getsource(SequentialPipeline)
        and "propagate_error" in DatasetArguments.__dataclass_fields__
    ),
    "a field of the modifier decides whether it gets data": lambda: (
        "requires_calibration_data" in inspect.getsource(CalibrationPipeline._infer_pipeline)
        and "requires_calibration_data" in Modifier.model_fields
    ),
    "GPTQModifier keeps Hessians and names by module": lambda: (
        {"_hessians", "_num_samples", "_module_names"} <= set(GPTQModifier.__private_attributes__)
        and parameters(GPTQModifier.compress_module_list) == {"self", "module_list"}
    ),
    "GPTQModifier solves a layer in compress_modules": lambda: (
        "self.compress_modules()" in inspect.getsource(GPTQModifier.on_sequential_epoch_end)
    ),
    "saving quantizes again, by a function that the compressors import": lambda: all(
        {"x", "scale", "args"} <= parameters(module.quantize)
        for module in (pack_quantized, naive_quantized)
    ),
    "ranks share parameters by DistributedCPUCache.offload": lambda: (
        parameters(DistributedCPUCache.offload) == {"self", "tensor"}
    ),
    "AWQ asks is_distributed before it adds up over ranks": lambda: callable(
        awq_base.is_distributed
    ),
    "AWQ pins batches by IntermediatesCache.pin_memory": lambda: (
        "batch_index" in parameters(IntermediatesCache.pin_memory)
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_host_is_where_we_touch_it(place):
    assert PLACES[place](), MOVED + place


class Watching(Modifier):
    """Notes what is known while it runs."""

    def on_initialize(self, state, **_):
        self.__dict__["running"] = host.running_oneshot()
        return True


def test_the_running_oneshot_is_known_until_it_ends(tmp_path):
    model, watching = tiny_model("qwen3_moe", tmp_path), Watching()
    assert host.running_oneshot() is None
    host_oneshot(model=model, recipe=watching, processor=NoProcessor())
    assert watching.running.model is model
    assert host.running_oneshot() is None


def test_registering_again_wraps_nothing_twice():
    before = vars(Oneshot)["__call__"], vars(IntermediatesCache)["from_dataloader"]
    host.register(check_arguments)
    assert (vars(Oneshot)["__call__"], vars(IntermediatesCache)["from_dataloader"]) == before


def test_what_belongs_to_a_oneshot_is_undone_when_it_fails(tmp_path):
    undone = []

    class Failing(Modifier):
        def on_initialize(self, state, **_):
            undo = ExitStack()
            undo.callback(undone.append, "done")
            host.undo_with_oneshot(undo)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        host_oneshot(
            model=tiny_model("qwen3_moe", tmp_path), recipe=Failing(), processor=NoProcessor()
        )
    assert undone == ["done"]


class Listener:
    def __init__(self):
        self.heard = []

    def hear_batches(self, cache):
        self.heard.append(len(cache))


def test_only_live_listeners_hear_of_batches():
    undo, listener, gone = ExitStack(), Listener(), Listener()
    host.listen_to_batches(listener, undo)
    host.listen_to_batches(gone, ExitStack())
    del gone  # its modifier failed and was dropped
    batches = [{"input_ids": tokens(1, 4)}, {"input_ids": tokens(1, 4)}]
    IntermediatesCache.from_dataloader(batches)
    undo.close()
    IntermediatesCache.from_dataloader(batches)
    assert listener.heard == [2]
    assert not list(host._batch_listeners)


@pytest.mark.parametrize("flag", [True, False])
def test_experts_run_on_their_own_tokens_and_the_flag_is_the_hosts_again(flag, tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    linearize_moe(model)
    seen = []
    for layer in model.model.layers:
        expert = layer.mlp.experts[0]
        expert.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[0]))
    context = moe_context.moe_calibration_context() if flag else ExitStack()
    with context, ExitStack() as undo:
        host.run_routed_tokens_only(model, undo)
        model(tokens(2, 16))
        assert moe_context._CALIBRATE_ALL_EXPERTS is flag
    assert max(seen) < 32  # of 32 tokens, none goes to one expert alone
    assert moe_context._CALIBRATE_ALL_EXPERTS is False


def test_experts_that_raise_leave_the_flag_alone(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    linearize_moe(model)

    def fail(*_):
        raise RuntimeError("on purpose")

    model.model.layers[0].mlp.experts[0].register_forward_hook(fail)
    with moe_context.moe_calibration_context(), ExitStack() as undo:
        host.run_routed_tokens_only(model, undo)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(tokens(2, 16))
        assert moe_context._CALIBRATE_ALL_EXPERTS is True


def test_a_session_without_a_oneshot_is_warned_of(tmp_path):
    from llmcompressor.core import create_session
    from loguru import logger

    said = []
    sink = logger.add(said.append, format="{message}", level="WARNING")
    model = tiny_model("qwen3_moe", tmp_path)
    linearize_moe(model)
    data = torch.utils.data.DataLoader([{"input_ids": row} for row in tokens(2, 8)])
    with create_session() as session:
        session.initialize(
            model=model, recipe=MoEQuantModifier(config_groups=int4(16)), calib_data=data
        )
    logger.remove(sink)
    assert any("no running llmcompressor.oneshot is known" in line for line in said)


def test_bars_and_warnings_come_back(capsys):
    with host.quiet():
        list(tqdm.tqdm(range(3), disable=False))
    assert capsys.readouterr().err == ""
    list(tqdm.tqdm(range(3)))
    assert "3/3" in capsys.readouterr().err


def test_a_pass_of_our_own_serves_one_modifier(tmp_path):
    """Events of a nested pass do not reach the recipe's modifiers."""
    events = []

    class Inner(Modifier):
        def on_initialize(self, state, **_):
            return True

        def on_event(self, state, event, **_):
            events.append(("inner", event.type_.value))

    class Outer(Modifier):
        requires_calibration_data: bool = False

        def on_initialize(self, state, **_):
            return True

        def on_event(self, state, event, **_):
            events.append(("outer", event.type_.value))

        def on_calibration_start(self, state, event, **_):
            inner = Inner()
            inner.initialize(state)
            loader = torch.utils.data.DataLoader(dataset(2, 8).with_format("torch"))
            host.run_pass(inner, state, loader)

    oneshot_state = tiny_model("qwen3_moe", tmp_path)
    host_oneshot(model=oneshot_state, recipe=Outer(), processor=NoProcessor())
    assert [who for who, _ in events][:1] == ["outer"]
    assert ("inner", "sequential_epoch_end") in events
    assert [kind for who, kind in events if who == "outer"].count("sequential_epoch_end") == 1


def test_data_are_those_of_the_state():
    with pytest.raises(ValueError, match="pass dataset="):
        host.calibration_batches(State())


def test_a_grid_that_ours_does_not_know_is_solved_by_the_host(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    modifier = MoEQuantModifier(scheme="FP8_BLOCK", targets=["re:.*self_attn.*_proj$"])
    oneshot(model, modifier)
    assert len(modifier.record.linears) == 2 * 4
