"""Quantize a few layers for real and extrapolate what the whole model takes.

Runs as a process of its own, so that peak memory is its own: ``python -m moeq_plugin.cli.probe``.
The model is cut one layer after its second MoE layer (the first one pays for caches and traces,
the last one runs together with the output embedding), then everything that ``moeq quantize`` does
is done to it on a part of the data. Linear in layers and sequences: the passes of a layer; linear
in layers: rounding, compressing, saving; once: the rest.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

from moeq_plugin.cli.data import Data

_SEQUENCES = 16  # of the data; enough that a pass takes longer than starting it
_MAX_LAYERS = 8  # a model whose first so many layers are dense is cut there


@dataclass(frozen=True)
class Prediction:
    """What quantizing the whole model takes.

    Attributes:
        cpu_seconds: of all threads.
        seconds: of wall clock on this machine as it is now.
        peak_bytes: of resident memory.
        num_layers: that were quantized to find out.
        num_sequences: of data that they saw.
    """

    cpu_seconds: float
    seconds: float
    peak_bytes: int
    num_layers: int
    num_sequences: int


def predict(
    model: str,
    scheme: str,
    data: Data,
    *,
    num_layers: int,
    moe_layers: tuple[int, ...],
    source_bytes: int,
    trust_remote_code: bool = False,
) -> Prediction:
    """Run the probe and extrapolate.

    Args:
        model: directory of the 16-bit model.
        scheme: as for quantization.
        data: as for quantization.
        num_layers: of the whole model.
        moe_layers: numbers of those with experts.
        source_bytes: of the model's tensors.
        trust_remote_code: run Python code that the model brings along, if it needs any.

    Raises:
        ValueError: if quantizing the first layers fails, which the whole model would do as well.
    """
    cut = min(num_layers, _MAX_LAYERS, moe_layers[1] + 2 if len(moe_layers) > 1 else 3)
    request = {
        "model": model, "scheme": scheme, "data": asdict(data), "num_layers": cut,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "moeq_plugin.cli.probe", json.dumps(request)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"quantizing the first {cut} layers failed: {last}")
    measured = json.loads(done.stdout.splitlines()[-1])
    cpu, wall = (
        _extrapolate(measured[clock], num_layers, cut, measured["all"] / measured["used"])
        for clock in ("cpu", "wall")
    )
    # the whole model's weights are resident, and the inputs of a layer for all sequences
    weights = source_bytes - measured["model_bytes"]
    activations = measured["activation_bytes"] * (measured["all"] / measured["used"] - 1)
    peak = measured["peak_bytes"] + weights + activations
    return Prediction(cpu, wall, int(peak), cut, measured["used"])


def _extrapolate(times: dict[str, float], num_layers: int, cut: int, more_data: float) -> float:
    once = times["start"] + times["load"]
    per_layer = (times["prepare"] + times["save"]) / cut
    passes = times["passes"] * more_data
    further = (times["layer_passes"] * more_data + times["layer_solve"]) * (num_layers - cut)
    return once + per_layer * num_layers + passes + times["solve"] + further


def _probe(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize the first layers in this process, with a clock at every step."""
    from llmcompressor.entrypoints.oneshot import oneshot
    from transformers import AutoConfig

    from moeq_plugin import MoEQuantModifier
    from moeq_plugin.cli.loading import load_model, loading
    from moeq_plugin.cli.modifiers import of_scheme
    from moeq_plugin.records.environment import peak_resident_memory

    marks = [("start", _clocks())]

    class Watched(MoEQuantModifier):
        def on_calibration_start(self, *args: Any, **kwargs: Any) -> None:
            super().on_calibration_start(*args, **kwargs)
            marks.append(("prepared", _clocks()))

        def on_sequential_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(("passed", _clocks()))
            super().on_sequential_epoch_end(*args, **kwargs)
            marks.append(("solved", _clocks()))

        def on_calibration_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(("passed", _clocks()))
            super().on_calibration_end(*args, **kwargs)
            marks.append(("solved", _clocks()))

    trust = request["trust_remote_code"]
    with loading(request["model"]):
        config = AutoConfig.from_pretrained(request["model"], trust_remote_code=trust)
    _cut(config.get_text_config(), request["num_layers"])
    loaded, tokenizer = load_model(request["model"], config=config, trust_remote_code=trust)
    data = Data(**request["data"])
    rows = data.read(tokenizer)
    num_all = len(rows)
    num_used = min(num_all, _SEQUENCES)
    marks.append(("loaded", _clocks()))
    with tempfile.TemporaryDirectory() as directory:
        oneshot(
            model=loaded,
            tokenizer=tokenizer,
            recipe=Watched(
                **of_scheme(request["scheme"]), ignore=["lm_head"], work_dir=f"{directory}/work"
            ),
            dataset=rows.select(range(num_used)),
            num_calibration_samples=num_used,
            max_seq_length=data.seq_len,
            shuffle_calibration_samples=False,
            output_dir=f"{directory}/out",
        )
    marks.append(("saved", _clocks()))
    parameters = sum(p.numel() * p.element_size() for p in loaded.parameters())
    width = config.get_text_config().hidden_size * loaded.dtype.itemsize
    return {
        "cpu": _phases(marks, 0), "wall": _phases(marks, 1), "peak_bytes": peak_resident_memory(),
        "model_bytes": parameters, "used": num_used, "all": num_all,
        "activation_bytes": num_used * data.seq_len * width,
    }  # fmt: skip


def _cut(config: Any, num_layers: int) -> None:
    """Leave a model its first layers; lists with an entry for each layer are cut as well."""
    whole = config.num_hidden_layers
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == whole and key != "architectures":
            setattr(config, key, value[:num_layers])
    config.num_hidden_layers = num_layers


def _phases(marks: list[tuple[str, tuple[float, float]]], clock: int) -> dict[str, float]:
    """Return what each phase took; the last decoder layer but one stands for those not measured.

    Between two marks lie the second pass of a layer and the first pass of the next.
    """
    times = [(name, at[clock]) for name, at in marks]
    began = dict(reversed(times))  # the first of each name
    steps = [b[1] - a[1] for a, b in zip(times, times[1:], strict=False)]
    passes = [s for (name, _), s in zip(times[1:], steps, strict=True) if name == "passed"]
    solves = [s for (name, _), s in zip(times[1:], steps, strict=True) if name == "solved"]
    # the last two passes include the output embedding
    return {
        "start": began["start"],
        "load": began["loaded"] - began["start"],
        "prepare": began["prepared"] - began["loaded"],
        "passes": sum(passes),
        "solve": sum(solves),
        "layer_passes": passes[-3],
        "layer_solve": solves[-3],
        "save": times[-1][1] - times[-2][1],
    }


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.monotonic() - _BEGAN


_BEGAN = time.monotonic() - time.process_time()  # imports so far were work, not waiting

if __name__ == "__main__":
    print(json.dumps(_probe(json.loads(sys.argv[1]))))  # noqa: T201 - to the parent process
