from written_checkpoint import PROMPT

from moeq_plugin.report.section_run import run_section, samples_section, verdict


def test_the_tiles_are_the_numbers_that_matter(found):
    tiles = dict(verdict(found).tiles)
    assert tiles["linears quantized"] == "75"
    assert tiles["not on enough tokens of their own"] == "3"
    assert tiles["true bits per quantized weight"] == "4.750"
    assert tiles["mean KL, nats per token"] == "0.02"
    assert tiles["recovery of the worst task (hard)"] == "80.0 %"


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
