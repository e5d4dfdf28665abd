import json
import sys

import pytest
import torch
from helpers import int4, oneshot, tiny_model

pytest.importorskip("llmcompressor")

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from moeq_plugin import MoEQuantModifier
from moeq_plugin.cli import app
from moeq_plugin.cli.measure import Models
from moeq_plugin.cli.quality import read_windows
from moeq_plugin.cli.tasks import task_score
from moeq_plugin.integrations.llm_compressor.checkpoint.loading import load_dequantized
from moeq_plugin.records.quality import QualityRecord

runner = CliRunner()


def word_tokenizer():
    """Numbers are their own token ids."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(128)}, "0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="127", pad_token="127")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model, its quantized copy with experts of two schemes, and a text."""
    directory = tmp_path_factory.mktemp("tiny")
    model = tiny_model("qwen3_moe", directory / "base")
    word_tokenizer().save_pretrained(directory / "base")
    groups = {
        "group_0": {**int4(16)["group_0"], "targets": ["re:.*layers.0.*experts.*_proj$"]},
        "group_1": {**int4(32, num_bits=8)["group_0"], "targets": ["re:.*layers.1.*_proj$"]},
    }
    oneshot(model, MoEQuantModifier(config_groups=groups))
    model.save_pretrained(directory / "quant")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 127, (1000,), generator=generator).tolist()
    (directory / "text.txt").write_text(" ".join(map(str, ids)))
    return directory


def invoke(tiny, *arguments):
    return runner.invoke(
        app, ["eval", str(tiny / "base"), str(tiny / "quant"), *map(str, arguments)]
    )


def test_a_quantized_checkpoint_is_compared_and_written(tiny, tmp_path):
    out = tmp_path / "eval.json"

    done = invoke(
        tiny, "--text", tiny / "text.txt", "--seq-len", 40, "--num-sequences", 6, "--json", out
    )

    assert done.exit_code == 0, done.output
    assert "text: 6 sequences, 234 tokens predicted" in done.output
    record = QualityRecord.load(out)
    found = record.texts["text"]
    assert 0 < found["kl"] < 1
    assert found["kl_stderr"] > 0
    assert len(found["routing"]["layers"]) == 2
    assert 0.5 < found["routing"]["jaccard"] < 1
    assert record.settings == {"seq_len": 40, "num_sequences": 6, "dtype": "float32"}
    assert len(record.continuations) == 3
    assert record.continuations[0].prompt.split()[:3] == (tiny / "text.txt").read_text().split()[:3]


def test_predictions_that_are_kept_stand_for_the_model(tiny, tmp_path):
    side, after, again = (tmp_path / f"{name}.json" for name in ("side", "after", "again"))
    request = ["--text", tiny / "text.txt", "--seq-len", 40, "--num-sequences", 6]
    kept = ["--reference", tmp_path / "reference.safetensors"]
    spread = ["--device-map", "auto"]
    for more in (
        ["--json", side, *spread],
        [*kept, "--device-map", "cpu", "--json", after],
        [*kept, "--json", again],
    ):
        done = invoke(tiny, *request, *more)
        assert done.exit_code == 0, done.output
    one, *others = (QualityRecord.load(path) for path in (side, after, again))
    for other in others:
        assert other.continuations == one.continuations
        assert other.texts["text"]["kl"] == pytest.approx(one.texts["text"]["kl"], rel=1e-4)
        assert other.texts["text"]["routing"] is None

    done = invoke(tiny, *request[:-1], 5, *kept)
    assert done.exit_code == 2
    assert "other tokens than asked for now" in done.output
    done = invoke(tiny, *request, "--reference", tiny / "quant" / "model.safetensors")
    assert done.exit_code == 2
    assert "no file of predictions" in done.output


def test_a_model_is_no_distance_from_itself(tiny, tmp_path):
    out, base = tmp_path / "eval.json", str(tiny / "base")
    request = ["eval", base, base, "--text", str(tiny / "text.txt"), "--seq-len", "40"]
    done = runner.invoke(app, [*request, "--json", str(out)])
    assert done.exit_code == 0, done.output
    found = QualityRecord.load(out).texts["text"]
    assert found["kl"] == found["nll_change"] == 0
    assert found["top1_agreement"] == found["routing"]["jaccard"] == 1


def test_every_expert_is_loaded_as_it_is_stored(tiny):
    # plain transformers applies the scheme of layer 0 to layer 1 and loads other numbers
    exact, loaded = (
        load_dequantized(tiny / "quant"),
        Models("", str(tiny / "quant"), "float32", trust_remote_code=False).load_quantized(),
    )
    for name, weight in exact.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.float()), name
    assert (
        Models("", str(tiny / "base"), "bfloat16", trust_remote_code=False).load_quantized().dtype
        == torch.bfloat16
    )


def test_windows_are_spread_over_the_text_and_do_not_overlap(tiny):
    words = list(map(int, (tiny / "text.txt").read_text().split()))
    found = read_windows(word_tokenizer(), tiny / "text.txt", 100, 4)
    starts = [words.index(row[0]) for row in found.tolist()]
    assert found.tolist() == [words[start : start + 100] for start in (0, 200, 500, 700)], starts
    assert len(read_windows(word_tokenizer(), tiny / "text.txt", 300, 64)) == 3


def test_what_a_tokenizer_puts_before_a_text_starts_every_window(tiny):
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "126"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="126 $A", special_tokens=[("126", 126)]
    )
    words = list(map(int, (tiny / "text.txt").read_text().split()))
    found = read_windows(tokenizer, tiny / "text.txt", 101, 10).tolist()
    assert found == [[126, *words[start : start + 100]] for start in range(0, 1000, 100)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --text FILE, --tasks NAMES or both"),
        (["--text", "no.txt"], "no.txt is not a file"),
        (["--text", "text.txt", "--seq-len", "2000"], "has 1000 tokens, fewer than one sequence"),
        (["--text", "text.txt", "--seq-len", "1"], "--seq-len must be at least 2"),
        (["--text", "text.txt", "--num-sequences", "0"], "the other numbers at least 1"),
        (["--text", "binary.txt"], "is not a UTF-8 text"),
        (
            ["--text", "text.txt", "--seq-len", "40", "--dtype", "float31"],
            "one of float32, bfloat16",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request_is_a_message_and_exit_code_2(tiny, arguments, message):
    (tiny / "binary.txt").write_bytes(b"\xff\xfe\x00")
    done = invoke(tiny, *(tiny / a if a.endswith(".txt") else a for a in arguments))
    assert done.exit_code == 2, done.output
    assert message in done.output


def test_a_model_that_is_not_there(tiny):
    request = ["eval", str(tiny / "nothing"), str(tiny / "quant"), "--text", str(tiny / "text.txt")]
    done = runner.invoke(app, request)
    assert done.exit_code == 2
    assert "nothing" in done.output


def test_tasks_without_lm_eval_name_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    done = invoke(tiny, "--tasks", "arc_easy")
    assert done.exit_code == 2
    assert "pip install 'moeq-plugin[eval]'" in done.output


def result(**metrics):
    return {"results": {"t": {"alias": "t", **metrics}}, "higher_is_better": {"t": {"ppl": False}}}


def test_the_metric_is_the_one_that_people_quote():
    before = result(**{"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.6})
    after = result(**{"acc,none": 0.4, "acc_stderr,none": 0.2, "acc_norm,none": 0.3})
    score = task_score("t", before, after)
    assert (score.metric, score.reference, score.score, score.stderr) == (
        "acc_norm",
        0.6,
        0.3,
        None,
    )

    score = task_score(
        "t", result(**{"ppl,none": 8.0, "ppl_stderr,none": "N/A"}), result(**{"ppl,none": 9.0})
    )
    assert (score.metric, score.higher_is_better, score.reference_stderr) == ("ppl", False, None)


@pytest.mark.slow
def test_a_task_of_ones_own_is_scored_on_both_models(tiny, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"q": f"{i} {i + 1}", "choices": [str(i + 2), str(i + 5)], "a": 0} for i in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "count.yaml").write_text(f"""
task: count_on
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{a}}}}"
metric_list: [{{metric: acc}}]
""")
    out = tmp_path / "eval.json"

    done = invoke(tiny, "--tasks", "count_on", "--task-files", tmp_path, "--json", out)

    assert done.exit_code == 0, done.output
    (score,) = QualityRecord.load(out).tasks
    assert (score.task, score.metric) == ("count_on", "acc")
    assert 0 <= score.score <= 1
    assert score.reference_stderr is not None
    assert invoke(tiny, "--tasks", "no_such_task", "--task-files", tmp_path).exit_code == 2
