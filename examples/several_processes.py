"""Quantize on several processes: each calibrates on a part of the data, all make one checkpoint.

torchrun --nproc-per-node=2 examples/several_processes.py out/two
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import torch
from compressed_tensors.offload import init_dist
from datasets import Dataset
from llmcompressor import oneshot
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeq_plugin import MoEQuantModifier

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "tiny_moe"
SEQUENCES, LENGTH = 64, 256


def main(out: str) -> None:
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun; alone, all data are our part
        if torch.accelerator.is_available():
            init_dist()
        else:
            distributed.init_process_group("gloo")
    tokenizer = AutoTokenizer.from_pretrained(MODEL, model_max_length=10**9)
    text = (ASSETS / "calibration.txt").read_text().replace("\x1e", "")
    ids = torch.tensor(tokenizer(text)["input_ids"][: SEQUENCES * LENGTH]).view(-1, LENGTH)
    data = Dataset.from_dict({"input_ids": ids.tolist()})
    if distributed.is_initialized():
        # a part of its own for each rank: of one data set, llm-compressor gives all the first part
        data = data.shard(distributed.get_world_size(), distributed.get_rank(), contiguous=True)
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto"),
        tokenizer=tokenizer,
        recipe=MoEQuantModifier(scheme="W4A16"),
        dataset=data,
        num_calibration_samples=len(data),
        shuffle_calibration_samples=False,
        output_dir=out,
    )
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
