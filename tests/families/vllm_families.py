"""What vLLM does with the families, quantized.

``python tests/families/vllm_families.py [FAMILY ...]`` records it in ``recorded_vllm.json``.
``tiny_vllm.json`` says of each family that is tried how its tiny model of ``tiny/`` is changed for
vLLM: ``text`` are sizes that its kernels for CPUs take, ``config`` fields of ``config.json`` that
vLLM reads and transformers' class of the family does not know.
``strict`` is false where vLLM's own count of loaded parameters knows names that nothing uses;
``differs`` says why vLLM computes something else than transformers with any weights, and ``dtype``
what a kernel demands.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from helpers import int4, oneshot
from safetensors.torch import load_file, save_file
from test_vllm import job, kl, run_probe
from tiny_families import config_of, fitting, save_tiny

from moeq_plugin import MoEQuantModifier
from moeq_plugin.integrations.llm_compressor import load_dequantized

_HERE = Path(__file__).parent
RECORDED = _HERE / "recorded_vllm.json"
_TINY: dict[str, Any] = json.loads((_HERE / "tiny_vllm.json").read_text())
FAMILIES: dict[str, dict[str, Any]] = _TINY["families"]
PROMPTS = [[3, 5, 9, 17, 33, 65, 7, 11], [10, 20, 30, 40, 50, 60, 70, 80]]
# Mean KL divergence. In float32 only rounding noise is left; an expert in another's place is off by
# tenths. In bfloat16, which some kernels demand, order of summation is noise as well.
LARGEST_NOISE = {"float32": 1e-8, "bfloat16": 1e-3}
_JOBS_OF_A_PROCESS = 32  # a few seconds each, and a process has fifteen minutes
_JSON = ("config.json", "tokenizer.json", "tokenizer_config.json")


def write_checkpoints(name: str, directory: Path) -> None:
    """Write the family's ``quantized`` checkpoint, and its weights in 16 bit as ``plain``."""
    source, quantized = directory / "source", directory / "quantized"
    entry = FAMILIES[name]
    text_class = type(config_of(name).get_text_config())
    changes = fitting(text_class, _TINY["text"]) | entry.get("text", {})
    model = save_tiny(name, source, **changes).to(torch.bfloat16)
    model.save_pretrained(source)  # 16 bit, as what vLLM's kernels make of packed weights
    _add_to_config(source, entry.get("config", {}))
    model = type(model).from_pretrained(source, dtype=torch.bfloat16)
    oneshot(model, MoEQuantModifier(config_groups=int4(64)), output_dir=str(quantized))
    for file in _JSON[1:]:
        shutil.copy(source / file, quantized)
    _write_plain(quantized, directory / "plain")


def _add_to_config(checkpoint: Path, fields: dict[str, Any]) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def _write_plain(quantized: Path, plain: Path) -> None:
    """Write the values that codes stand for, under the names that the codes have."""
    tensors = load_file(quantized / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        stem = name.removesuffix("_packed")
        scale, shape = tensors.pop(f"{stem}_scale"), tensors.pop(f"{stem}_shape").tolist()
        codes = unpack_from_int32(tensors.pop(name), 4, torch.Size(shape))
        tensors[stem] = codes.to(scale.dtype) * scale.repeat_interleave(64, dim=1)
    plain.mkdir()
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    for file in _JSON:
        shutil.copy(quantized / file, plain)
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))


def try_in_vllm(names: list[str], root: Path) -> dict[str, dict[str, str]]:
    """Return what vLLM does with each family, in few processes, as each takes long to start.

    Args:
        names: of families.
        root: an empty directory for their checkpoints.

    Returns:
        of each the sentence that it refuses with as ``refusal``, or, as ``equal``, what the
        quantized checkpoint computes the same as: its weights in ``transformers``, or only its
        weights as ``plain`` ones in vLLM, or ``nothing``.
    """
    jobs = []
    for name in names:
        write_checkpoints(name, root / name)
        options = {"strict": FAMILIES[name].get("strict", True)}
        dtype = FAMILIES[name].get("dtype", "float32")
        for form in ("quantized", "plain"):
            jobs.append(job(f"{name} {form}", root / name / form, dtype) | options)
    results: dict[str, dict] = {}
    for start in range(0, len(jobs), _JOBS_OF_A_PROCESS):
        some = jobs[start : start + _JOBS_OF_A_PROCESS]
        results |= run_probe(some, PROMPTS, emulate=True)
    return {
        name: _judge(name, root / name, results[f"{name} quantized"], results[f"{name} plain"])
        for name in names
    }


def _judge(name: str, directory: Path, quantized: dict, plain: dict) -> dict[str, str]:
    if quantized["error"]:
        return {"refusal": sentence(quantized["error"])}
    noise = LARGEST_NOISE[FAMILIES[name].get("dtype", "float32")]
    if kl(_by_transformers(directory / "quantized"), quantized["logprobs"]).mean() < noise:
        return {"equal": "transformers"}
    if not plain["error"]:
        reference = torch.tensor(plain["logprobs"], dtype=torch.float64).log_softmax(-1)
        if kl(reference, quantized["logprobs"]).mean() < noise:
            return {"equal": "plain"}
    return {"equal": "nothing"}


@torch.no_grad()
def _by_transformers(checkpoint: Path) -> torch.Tensor:
    model, ids = load_dequantized(checkpoint).float().eval(), torch.tensor(PROMPTS)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[:, :-1].double().log_softmax(-1)


def sentence(error: str) -> str:
    """Return the part of vLLM's error that says what is wrong, without lists of names."""
    _, _, said = error.partition(": ")
    if "failed to be inspected" in said:
        return "its class cannot be imported without torchvision, which the environment lacks"
    said = " ".join(said.split())
    for end in (". ", ": {", "; ", ", please"):
        said = said.partition(end)[0]
    return said.rstrip(".") or error.rstrip(": ")


def main(names: list[str]) -> None:
    """Try families anew, all unless some are named, and write down what came out."""
    found = json.loads(RECORDED.read_text()) if names else {}
    with tempfile.TemporaryDirectory() as directory:
        tried = try_in_vllm(names or [*FAMILIES], Path(directory))
    found |= tried
    ordered = {name: found[name] for name in FAMILIES if name in found}
    RECORDED.write_text(json.dumps(ordered, indent=1) + "\n")
    print(json.dumps(tried, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
