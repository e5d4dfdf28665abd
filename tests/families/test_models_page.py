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
