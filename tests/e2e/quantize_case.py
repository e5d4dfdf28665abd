"""Quantize a shipped model one way in a process of its own; prints what it wrote as JSON.

python tests/e2e/quantize_case.py CASE DIRECTORY
"""

import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

# The plainest kernels of each library round alike on most processors.
PLAIN_KERNELS = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
ASSETS = Path(__file__).parents[2] / "examples" / "assets"
SEQUENCES, LENGTH = 16, 128
# The model whose checkpoint each case writes.
CASES = {
    "w4": "tiny_moe",
    "w3": "tiny_moe",
    "budget": "tiny_moe",
    "awq": "tiny_moe",
    "rotation": "tiny_moe",
    "own_text": "tiny_moe",
    "codebooks": "tiny_rwkv",
    "scalar_fallback": "tiny_rwkv",
}


def arithmetic() -> str:
    """Return a digest of how this machine rounds products, factorizations and exponentials."""
    import torch

    digest = hashlib.sha256()
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        rows = torch.randn(384, 128, generator=generator).to(dtype)
        product = rows.T @ rows
        results = [product.float(), rows.float().softmax(-1), rows.float().exp()]
        if dtype != torch.bfloat16:
            factor = torch.linalg.cholesky(product + torch.eye(128, dtype=dtype))
            results += [factor, torch.cholesky_inverse(factor), rows.sum(0)]
        for result in results:
            digest.update(result.double().numpy().tobytes())
    return digest.hexdigest()


def recipe(case: str) -> list:
    """Return the modifiers of a case."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    from moeq_plugin import MoEQuantAWQModifier, MoEQuantModifier, RWKVQuantModifier
    from moeq_plugin.core.codebook import CodebookFormat
    from moeq_plugin.integrations.llm_compressor import ResidualRotationModifier

    kept = ["lm_head", "re:.*gate$"]
    options = ["W2A16", "W3A16", "W4A16"]
    all_linears = ["Linear", r"re:.*\.att\.[wavg][12]$"]  # of RWKV, as it was then
    own_text = {"num_sequences": 8, "seq_len": 64, "seed": 3}
    fast = partial(MoEQuantModifier, preset="fast")  # the solver of that commit
    made = {
        "w4": lambda: [fast(scheme="W4A16")],
        "w3": lambda: [fast(scheme="W3A16", affinity_power=2)],
        "budget": lambda: [fast(bits_per_weight=3.0, options=options)],
        "awq": lambda: [
            MoEQuantAWQModifier(clip=True),
            QuantizationModifier(scheme="W4A16", ignore=kept),
        ],
        "rotation": lambda: [ResidualRotationModifier(), fast(scheme="W4A16")],
        "own_text": lambda: [fast(scheme="W4A16", ebss=own_text)],
        "codebooks": lambda: [
            RWKVQuantModifier(
                scalar_frac=0.9,
                preset="fast",
                targets=all_linears,
                elementwise=CodebookFormat(3, 1, group_rows=1, group_columns=64),
            )
        ],
        "scalar_fallback": lambda: [
            RWKVQuantModifier(fallback_scheme={"num_bits": 4}, preset="fast", targets=all_linears)
        ],
    }
    return made[case]()


def quantize(case: str, out: Path) -> None:
    """Run ``oneshot`` on a case's model and save it to ``out``."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import moeq_plugin.rwkv  # noqa: F401 - makes transformers know RWKV
    from moeq_plugin.integrations.llm_compressor import host

    # that commit calibrated as the host does: this model without its causal mask
    host._serves_us = lambda: False

    path = ASSETS / CASES[case]
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = (ASSETS / "calibration.txt").read_text().split("\x1e")[:SEQUENCES]
    ids = [tokenizer(document)["input_ids"][:LENGTH] for document in text]
    data = None if case == "own_text" else Dataset.from_dict({"input_ids": ids})
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16),
        tokenizer=tokenizer,
        recipe=recipe(case),
        dataset=data,
        shuffle_calibration_samples=False,
        output_dir=str(out),
    )


def main() -> None:
    case, out = sys.argv[1], Path(sys.argv[2])
    os.environ.update(PLAIN_KERNELS)
    import torch

    torch.set_num_threads(1)
    quantize(case, out)
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.glob("*.safetensors"))
    }
    print(json.dumps({"arithmetic": arithmetic(), "files": files}))


if __name__ == "__main__":
    main()
