"""Families beyond those of ``test_vllm.py`` in real vLLM: loaded and computed right, or refused.

vLLM names and fuses the weights of each family in its own way. Its integer kernels are replaced by
exact products, as there, so a quantized checkpoint has to compute what its weights do elsewhere:
in transformers, or, where vLLM computes something else than transformers with any weights, as
plain 16-bit weights in vLLM. What vLLM cannot do here is recorded with its words, so that a newer
vLLM that can shows.
"""

import json

import pytest

pytest.importorskip("llmcompressor")

from test_vllm import VLLM_PYTHON
from vllm_families import FAMILIES, RECORDED, sentence, try_in_vllm

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="no .venv-vllm: run `make vllm-env` first"),
]


@pytest.fixture(scope="module")
def tried(request, tmp_path_factory):
    """What vLLM does with those families whose tests are to run."""
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    names = {call.params["family"] for call in calls if call and "family" in call.params}
    wanted = [name for name in FAMILIES if name in names]
    return try_in_vllm(wanted, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_computes_what_the_checkpoint_stands_for_or_says_why_not(family, tried):
    """No tensor is missing or left over where it loads: that would be a refusal."""
    assert tried[family] == json.loads(RECORDED.read_text())[family]


def test_errors_are_recorded_without_what_differs_between_runs():
    missing = "ValueError: Following weights were not initialized from checkpoint: {'b', 'a'}"
    assert sentence(missing) == "Following weights were not initialized from checkpoint"
    assert sentence("KeyError: 'layers.1.mlp.gate.bias'") == "'layers.1.mlp.gate.bias'"
