"""A recipe asks for an allocation in one way, or for none."""

import itertools

import pytest

pytest.importorskip("llmcompressor")

from moeq_plugin.core.allocation import BitBudget
from moeq_plugin.integrations.llm_compressor.allocation.request import AllocationRequest
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity_config import SensitivityConfig
from moeq_plugin.models.scheme_units import Target

BUDGETS = {"bits_per_weight": 4.5, "size_gb": 1.0, "allocation": "moeq_allocation.json"}
SCHEMES = {"scheme": "W4A16", "config_groups": {}}
SUBSETS = [
    dict(some)
    for n in range(len(BUDGETS) + len(SCHEMES) + 1)
    for some in itertools.combinations([*BUDGETS.items(), *SCHEMES.items()], n)
]


def request(**given):
    fields = {**dict.fromkeys(BUDGETS), **given}
    return AllocationRequest(
        **fields,
        options=("W4A16", "W8A16"),
        target=Target.VLLM,
        robust=False,
        sensitivity=SensitivityConfig(),
    )


def refused(asked, schemes):
    try:
        asked.check_alone(schemes.get("scheme"), schemes.get("config_groups"))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("given", SUBSETS, ids=lambda given: "+".join(given) or "nothing")
def test_a_budget_stands_alone_and_schemes_without_one_are_not_our_business(given):
    budgets = {name: value for name, value in given.items() if name in BUDGETS}
    asked = request(**budgets)

    assert asked.is_asked == bool(budgets)
    message = refused(asked, given)
    assert (message is not None) == (bool(budgets) and len(given) > 1)
    if message is not None:
        every = "bits_per_weight, size_gb, allocation, scheme, config_groups"
        assert message == f"give exactly one of {every}, got {' and '.join(given)}"


def test_a_budget_of_nothing_is_still_a_budget():
    """Zero is refused as a budget, and not taken for a recipe without one."""
    asked = request(bits_per_weight=0.0)
    assert asked.is_asked
    with pytest.raises(ValueError, match="must be positive"):
        asked.budget  # noqa: B018 - it is the look that is refused


@pytest.mark.parametrize("name", ["bits_per_weight", "size_gb"])
def test_the_budget_is_the_one_that_was_given(name):
    assert request(**{name: 2.5}).budget == BitBudget(**{name: 2.5})
