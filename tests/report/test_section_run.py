from written_checkpoint import PROMPT

from moeq_plugin.records.run import Basis
from moeq_plugin.report.section_run import run_section, samples_section, verdict


def test_a_rounded_linear_or_a_limit_or_a_broken_file_is_worth_a_look(found):
    assert verdict(found).word == "check this"
    assert verdict(found).limits == ["a limit that `somebody` has to know"]
    record = found.records[0]
    record.limits = []
    assert verdict(found).level == "warn"
    record.linears = [x for x in record.linears if x.basis is not Basis.NONE]
    assert verdict(found).word == "healthy"
    found.problems = ["a file could not be read"]
    assert verdict(found).word == "check this"


def test_the_tiles_are_the_numbers_that_matter(found):
    tiles = dict(verdict(found).tiles)
    assert tiles["linears quantized"] == "75"
    assert tiles["on a fallback"] == "3"
    assert tiles["true bits per quantized weight"] == "4.750"
    assert tiles["mean KL, nats per token"] == "0.02"
    assert tiles["left in the worst task (hard)"] == "80.0 %"


def test_without_a_record_the_verdict_is_open(found):
    found.records = []
    assert verdict(found).level == "unknown"


def test_settings_versions_and_what_was_kept_are_listed(found):
    tables = {part.caption: part.rows for part in run_section(found).parts}
    assert ["model", "someone/some-moe"] in tables["Made from"]
    assert ["hardware", "one core"] in tables["Made from"]
    assert ["torch", "2.13.0"] in tables["Versions"]
    assert ["scheme", "W4A16"] in tables["Settings of MoEQuantModifier"]
    assert all(row[0] != "bits_per_weight" for row in tables["Settings of MoEQuantModifier"])
    assert tables["Kept in 16 bit"] == [["lm_head", "output embedding"]]


def test_continuations_stand_in_pairs_before_calibration_text(found):
    quotes = samples_section(found).quotes
    assert quotes[0][1] == f"{PROMPT} ▸  original"
    assert quotes[1][1] == f"{PROMPT} ▸  quantized"
    assert [text for _, text in quotes[2:]] == ["once upon a time", PROMPT]
    found.quality, found.records = None, []
    assert "moeq eval" in samples_section(found).missing[0]
