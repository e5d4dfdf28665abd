"""What an official file takes in memory: two bytes a parameter once all of it has been read."""

import json
import subprocess
import sys

import pytest
import torch
from rwkv_models import VERSIONS, tiny_rwkv

from moeq_plugin.rwkv import to_official

# in a process of its own, whose peak nothing else has raised
LOAD = """
import json, sys, torch
from pathlib import Path
from moeq_plugin.rwkv import load_pth
torch.set_num_threads(1)
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
load_pth(sys.argv[1])  # a tiny one: what every first load takes
before = peak()
model = load_pth(sys.argv[2])
loaded = peak()
for parameter in model.parameters():
    parameter.aminmax()
read = peak()
parameters = sum(parameter.numel() for parameter in model.parameters())
print(json.dumps([(loaded - before) / parameters, (read - before) / parameters]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the peak")
@pytest.mark.parametrize("version", VERSIONS)
def test_loading_takes_two_bytes_a_parameter(version, tmp_path):
    large = {"hidden_size": 1024, "head_dim": 64, "num_hidden_layers": 5, "vocab_size": 16384}
    for name, sizes in {"tiny": {}, "large": large}.items():
        model = tiny_rwkv(version, **sizes).bfloat16()
        torch.save(to_official(model.state_dict()), tmp_path / f"{name}.pth")
    command = [sys.executable, "-c", LOAD, tmp_path / "tiny.pth", tmp_path / "large.pth"]

    loaded, read = json.loads(subprocess.check_output(command))

    assert loaded < 0.3
    assert read < 2.3
