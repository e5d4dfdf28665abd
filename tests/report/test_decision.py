"""The rules of the decision, each seen to decide by itself."""

from dataclasses import replace

import pytest
from written_checkpoint import borrowing, verified

from moeq_plugin.checkpoint.checks.findings import error, warning
from moeq_plugin.records.quality import TaskScore
from moeq_plugin.records.run import Basis
from moeq_plugin.report.decision import RULES, decide


@pytest.fixture
def good(found):
    """A checkpoint that nothing can be said against."""
    (record,) = found.records
    record.linears = [replace(linear, basis=Basis.OWN) for linear in record.linears]
    record.limits = []
    for text in found.quality.texts.values():
        text["nll_change"], text["nll_change_stderr"] = 0.01, 0.001
    found.quality.tasks = [TaskScore("easy", "acc", True, 0.8, 0.01, 0.79, 0.01)]
    found.verification = verified()
    return found


def test_a_checkpoint_without_a_fault_is_shipped(good):
    assert (decide(good).word, decide(good).reasons) == ("ship it", [])


DO_NOT = {
    "verification": lambda f: setattr(f, "verification", verified(error("zeroed", "x", "all 0"))),
    "starved": lambda f: borrowing(f, 38),  # of 75
    "perplexity": lambda f: f.quality.texts["code"].update(nll_change=0.12),
    "task": lambda f: f.quality.tasks.append(TaskScore("hard", "acc", True, 0.8, 0.01, 0.68, 0.01)),
}
LOOK = {
    "not verified": lambda f: setattr(f, "verification", None),
    "a warning": lambda f: setattr(f, "verification", verified(warning("zeroed", "x", "all 0"))),
    "no record": lambda f: setattr(f, "records", []),
    "a limit": lambda f: f.records[0].limits.append("a reader misreads it"),
    "unreadable": lambda f: f.problems.append("a file could not be read"),
    "not evaluated": lambda f: setattr(f, "quality", None),
    "some starved": lambda f: borrowing(f, 4),
    "perplexity": lambda f: f.quality.texts["code"].update(nll_change=0.03),
    "task": lambda f: f.quality.tasks.append(
        TaskScore("hard", "acc", True, 0.8, 0.001, 0.77, 0.001)
    ),
    "rounded": lambda f: f.records[0].linears.__setitem__(
        0, replace(f.records[0].linears[0], basis=Basis.NONE)
    ),
}


@pytest.mark.parametrize("damage", DO_NOT.values(), ids=DO_NOT)
def test_what_is_not_shipped(damage, good):
    damage(good)
    decision = decide(good)
    assert (decision.word, decision.level, len(decision.reasons)) == ("do not ship", "bad", 1)


@pytest.mark.parametrize("damage", LOOK.values(), ids=LOOK)
def test_what_is_worth_a_look(damage, good):
    damage(good)
    decision = decide(good)
    assert (decision.word, decision.level, len(decision.reasons)) == ("look at it first", "warn", 1)


@pytest.mark.parametrize(
    "harmless",
    [
        lambda f: borrowing(f, 3),
        # two standard errors reach below the rule
        lambda f: f.quality.texts["code"].update(nll_change=0.03, nll_change_stderr=0.006),
        lambda f: f.quality.tasks.append(TaskScore("few", "acc", True, 0.8, 0.05, 0.76, 0.05)),
    ],
)
def test_what_is_within_its_error_is_no_alarm(harmless, good):
    harmless(good)
    assert decide(good).word == "ship it"


def test_the_worst_comes_first_and_alone(good):
    good.problems.append("a file could not be read")
    good.verification = verified(error("zeroed", "x", "all 0"))
    assert len(decide(good).reasons) == 1
    assert "`moeq verify`: 1 error, such as x: all 0." in decide(good).reasons


def test_the_rules_name_every_word_of_a_decision():
    assert [rule.split("**")[1] for rule in RULES] == [
        "do not ship", "look at it first", "ship it",
    ]  # fmt: skip
