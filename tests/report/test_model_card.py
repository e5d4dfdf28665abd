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
        "- moeq-plugin", "- llm-compressor", "- compressed-tensors",
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
        "vllm serve ./some-moe-W4",
        "moeq eval someone/some-moe ./some-moe-W4 --text FILE",
        "lm_eval --model vllm --model_args pretrained=./some-moe-W4,dtype=auto --tasks easy,hard,",
        "| hard (exact_match) | 0.500 ± 0.020 | 0.400 ± 0.020 | 80.0 % |",
        "Worst task: hard, 80.0 % of its score left.",
        "- a limit that `somebody` has to know",
        '      scheme: "W4A16"',
        "- torch 2.13.0",
        "- hardware one core",
    ):
        assert line in card, line


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
