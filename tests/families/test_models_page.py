"""The page of models is what the suite has recorded."""

import json
from pathlib import Path

from models_page import PAGE, text

RECORDED = json.loads((Path(__file__).parent / "recorded_families.json").read_text())


def test_the_page_is_current():
    assert PAGE.read_text() == text(), "run python tests/families/models_page.py"


def test_nearly_all_families_are_quantized():
    refused = [name for name, found in RECORDED.items() if "refusal" in found]
    assert len(RECORDED) - len(refused) >= 60


def test_what_vllm_does_is_recorded_of_every_family_that_it_is_tried_with():
    """One that loads computes the same as elsewhere, or it is said why not."""
    here = Path(__file__).parent
    tried = json.loads((here / "tiny_vllm.json").read_text())["families"]
    served = json.loads((here / "recorded_vllm.json").read_text())
    assert served.keys() == tried.keys()
    assert served.keys() <= RECORDED.keys()
    equal = {name: found["equal"] for name, found in served.items() if "equal" in found}
    assert {*equal.values()} <= {"transformers", "plain"}
    explained = {name for name in equal if "differs" in tried[name]}
    assert explained == {name for name, to in equal.items() if to == "plain"}
