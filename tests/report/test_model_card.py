import pytest
from written_checkpoint import record, write_checkpoint

from moeq_plugin.report.directory import read_directory
from moeq_plugin.report.model_card import model_card, save_model_card


@pytest.fixture
def found(tmp_path):
    return read_directory(write_checkpoint(tmp_path / "some-moe-W4"))


def test_the_metadata_is_what_hubs_read(found):
    lines = model_card(found).splitlines()
    assert lines[0] == "---"
    metadata = lines[1 : lines.index("---", 1)]
    assert metadata == [
        "base_model: someone/some-moe", "base_model_relation: quantized",
        "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- moe",
        "- moeq-plugin", "- llm-compressor", "- quantized", '- "4-bit"', "- compressed-tensors",
    ]  # fmt: skip


def test_the_checklist_of_a_card_is_met(found):
    card = model_card(found)
    for line in (
        "# some-moe-W4",
        "| experts per layer | 8, 2 per token |",
        "| true bits per quantized weight, scales included | 4.750 |",
        "| 75 | W4 int symmetric group 32 |",
        "In 16 bit: `lm_head` (output embedding).",
        "On text that the model wrote itself: 4 sequences",
        "Effective tokens of an expert: at least 0.5",
        "| model.layers.1.mlp.experts.1.up_proj | rounded to nearest | 15 |",
        "vllm serve some-moe-W4 --tensor-parallel-size 1",
        "moeq eval someone/some-moe some-moe-W4 --text FILE",
        "lm_eval --model vllm --model_args pretrained=some-moe-W4,dtype=auto --tasks easy,hard,",
        "| hard (exact_match) | 0.500 ± 0.020 | 0.400 ± 0.020 | 80.0 % |",
        "Worst task: hard, recovery 80.0 %.",
        "- a limit that `somebody` has to know",
        '      scheme: "W4A16"',
        "- torch 2.13.0",
        "- hardware one core",
    ):
        assert line in card, line


def test_no_path_and_no_code_that_reads_other_numbers(found):
    (record,) = found.records
    card = model_card(found)
    assert "./" not in card
    assert "AutoModelForCausalLM" in card
    record.limits = ["transformers 5.17 applies one scheme to all and loads the others wrong"]
    card = model_card(found)
    assert "AutoModelForCausalLM" not in card
    assert 'load_dequantized("some-moe-W4")' in card
    assert "vllm serve" in card
    record.limits = ["vLLM applies the scheme of expert 0 to all of them"]
    card = model_card(found)
    assert "AutoModelForCausalLM" in card
    assert "vllm serve" not in card
    assert "No line that serves it stands here, because of vLLM: vLLM applies the scheme" in card


def test_what_a_hub_reads_is_taken_from_the_original(found, tmp_path):
    (tmp_path / "original").mkdir()
    card = "---\nlicense: other\nlicense_name: some-licence\nlicense_link: https://x.org/L\n"
    card += "language:\n- en\n- de\ntags:\n- not-ours\n---\n# Text\nlicense: mit\n"
    (tmp_path / "original" / "README.md").write_text(card)
    found.records[0].model = str(tmp_path / "original")
    lines = model_card(found).splitlines()
    assert lines[1:7] == [
        "license: other", "license_name: some-licence", "license_link: https://x.org/L",
        "language:", "- en", "- de",
    ]  # fmt: skip
    assert "- not-ours" not in lines
    assert "license: mit" not in lines


def test_only_what_was_given_stands_in_the_recipe(found):
    (record,) = found.records
    record.settings |= {"seed": 0, "work_dir": "/home/me", "affinity_power": 0.0}
    record.given = ["scheme", "affinity_power", "work_dir"]
    recipe = model_card(found).split("```yaml\n")[1].split("```")[0]
    assert "affinity_power: 0.0" in recipe
    assert "seed" not in recipe and "/home/me" not in recipe


def test_the_recipe_is_yaml_that_makes_the_same_settings(found):
    yaml = pytest.importorskip("yaml")
    recipe = model_card(found).split("```yaml\n")[1].split("```")[0]
    modifiers = yaml.safe_load(recipe)["quant_stage"]["quant_modifiers"]
    assert modifiers == {"MoEQuantModifier": {"scheme": "W4A16", "ignore": ["lm_head"]}}


def test_a_path_of_this_machine_is_no_base_model(found, tmp_path):
    found.records[0].model = str(tmp_path)
    card = model_card(found)
    assert "base_model" not in card
    assert str(tmp_path) not in card
    assert f"A quantized copy of `{tmp_path.name}`" in card


@pytest.mark.parametrize("name", ["models/here", "just-a-name", "a/b/c"])
def test_only_what_others_can_find_is_a_base_model(found, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "here").mkdir(parents=True)
    found.records[0].model = name
    assert "base_model" not in model_card(found)


def test_layers_of_several_schemes_are_listed(found):
    linears = found.records[0].linears
    linears[0] = linears[0].__class__(**{**vars(linears[0]), "scheme": "W8 int"})
    assert "| 0 | 24 × W4 | 1 × W8 |" in model_card(found)


def test_without_an_evaluation_the_card_says_so(found):
    found.quality = None
    card = model_card(found)
    assert "No results here yet" in card
    assert "No task was scored" in card


def test_a_card_that_is_there_stays(tmp_path):
    write_checkpoint(tmp_path)
    save_model_card([record()], tmp_path)
    assert (tmp_path / "README.md").read_text().startswith("---")
    (tmp_path / "README.md").write_text("mine")
    save_model_card([record()], tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_card_where_the_files_will_go_stays_too(tmp_path):
    write_checkpoint(tmp_path / "stage")
    (tmp_path / "README.md").write_text("mine")
    save_model_card([record()], tmp_path / "stage", published=tmp_path)
    assert not (tmp_path / "stage" / "README.md").exists()
