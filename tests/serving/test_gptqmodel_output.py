"""What GPTQModel itself writes gives no alarm, with its source and without (`make gptq-env`)."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from helpers import tokens
from test_gptq_readers import GPTQMODEL, needs_gptqmodel, write_original

from moeq_plugin import verify_checkpoint

BASE = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "act_group_aware": False}
# what is true of some all the same: vLLM does not read them, others do
REFUSED = {"vllm-refuses"}
CASES = {
    "plain": (BASE, set()),
    "act order": ({**BASE, "desc_act": True}, REFUSED),
    "groups in place": ({**BASE, "act_group_aware": True}, set()),
    "rows in act order": ({**BASE, "group_size": -1, "desc_act": True}, set()),
    "2 bits": ({**BASE, "bits": 2}, REFUSED),
    "3 bits": ({**BASE, "bits": 3}, REFUSED),
    "8 bits": ({**BASE, "bits": 8}, set()),
    "asymmetric": ({**BASE, "sym": False}, REFUSED),
    "version 2": ({**BASE, "format": "gptq_v2"}, set()),
    "dynamic": (
        {**BASE, "dynamic": {
            r"-:.*layers\.0\.self_attn.*": {}, r"+:.*o_proj.*": {"bits": 8, "group_size": 16},
        }},
        set(),
    ),
}  # fmt: skip
FAMILIES = ("llama", "qwen3_moe")
pytestmark = [pytest.mark.slow, *needs_gptqmodel]


@pytest.fixture(scope="module", params=FAMILIES)
def written(request, tmp_path_factory):
    """Return a directory with the model and what GPTQModel has made of it for each case."""
    path = tmp_path_factory.mktemp(request.param)
    write_original(request.param, path / "model")
    jobs = [[str(path / "model"), str(path / name), made] for name, (made, _) in CASES.items()]
    process = subprocess.run(
        [GPTQMODEL, Path(__file__).with_name("gptq_writer.py")],
        input=json.dumps({"prompts": tokens(16, 64).tolist(), "jobs": jobs}),
        capture_output=True,
        text=True,
        timeout=1800,
        # it wants two workers, whatever the machine has
        env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"},
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return path


@pytest.mark.parametrize("name", CASES)
def test_it_gives_no_alarm(name, written):
    for source in (None, written / "model"):
        found = verify_checkpoint(written / name, source, target="vllm").findings
        assert {finding.check for finding in found} == CASES[name][1], found
        for target in ("transformers", "gguf"):
            assert not verify_checkpoint(written / name, source, target=target).errors
