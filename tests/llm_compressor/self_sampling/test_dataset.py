"""The sampled set as a data set for the host, as a report and as a file."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from helpers import int4, oneshot, tiny_model

pytest.importorskip("llmcompressor")

from datasets import load_dataset
from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeq_plugin import MoEQuantModifier
from moeq_plugin.core.sampling import EBSSConfig
from moeq_plugin.files.sampled_set import SampledSetFile
from moeq_plugin.integrations.llm_compressor.self_sampling.dataset import ebss_dataset, sample_set
from moeq_plugin.models.self_sampling import SelfSampler

TINY = Path(__file__).parents[3] / "examples" / "assets" / "tiny_moe"


def small(**changes):
    return EBSSConfig(**{"num_sequences": 4, "seq_len": 16, "tau": 1.2, **changes})


@pytest.fixture
def model(tmp_path):
    return tiny_model("qwen3_moe", tmp_path / "model")


@pytest.fixture
def messages():
    found = []
    handle = logger.add(lambda message: found.append(str(message)), level="INFO")
    yield found
    logger.remove(handle)


@pytest.fixture
def disk_full_after(monkeypatch):
    """Let the sequences file take a number of lines and half a line more."""

    def fill(lines):
        real, left = SampledSetFile.append, [lines]

        def append(self, sequence):
            left[0] -= 1
            if left[0] < 0:
                with self.path.open("a") as file:
                    file.write('{"index": 3, "input_i')
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(self, sequence)

        monkeypatch.setattr(SampledSetFile, "append", append)

    return fill


def test_columns_are_ids_and_statistics(model):
    dataset = ebss_dataset(model, config=small())
    assert dataset.column_names == ["input_ids", "nll", "imbalance"]
    assert [len(ids) for ids in dataset["input_ids"]] == [16] * 4
    assert all(math.isfinite(value) for value in [*dataset["nll"], *dataset["imbalance"]])


def test_ids_come_back_from_the_data_set_as_they_were_sampled(model):
    special = sorted({model.config.bos_token_id, model.config.eos_token_id} - {None})
    expected = SelfSampler(model, small(), special_ids=special).run()
    ids = ebss_dataset(model, config=small())["input_ids"]
    assert list(ids) == [sequence.input_ids for sequence in expected]


def test_the_host_calibrates_with_it(model):
    dataset = ebss_dataset(model, config=small())
    oneshot(model, MoEQuantModifier(config_groups=int4(16), ignore=["lm_head"]), dataset)
    assert hasattr(model.model.layers[0].mlp.experts[0].down_proj, "weight_scale")


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(TINY)


def test_a_degenerate_set_is_reported_with_a_warning(shipped, messages):
    config = EBSSConfig(num_sequences=8, seq_len=96, tau=math.inf)
    report = sample_set(*shipped, config).report
    assert report.distinct_4gram < 0.2
    assert len(report.samples) == 5
    assert len(report.layer_imbalance) == 4
    assert any("EBSS: the sampled text repeats itself" in message for message in messages)


def test_ngram_blocking_makes_the_warning_go_away(shipped, messages):
    config = EBSSConfig(num_sequences=8, seq_len=96, no_repeat_ngram=4)
    report = sample_set(*shipped, config).report
    assert report.distinct_4gram == 1
    assert not any("repeats itself" in message for message in messages)


def test_prompts_may_be_texts(shipped):
    prompts = ["def main():", "The"]
    dataset = ebss_dataset(*shipped, small(), prompts=prompts)
    texts = shipped[1].batch_decode(list(dataset["input_ids"]))
    assert [text.startswith(prompts[i % 2]) for i, text in enumerate(texts)] == [True] * 4


def test_texts_need_a_tokenizer(model):
    with pytest.raises(ValueError, match="prompts are texts, so a tokenizer is needed"):
        ebss_dataset(model, config=small(), prompts=["The"])


def test_special_tokens_of_the_tokenizer_and_rows_without_token_are_left_out(shipped):
    model, tokenizer = shipped
    missing = set(range(len(tokenizer), model.config.vocab_size)) | set(tokenizer.all_special_ids)
    for ids in ebss_dataset(model, tokenizer, small(num_sequences=16))["input_ids"]:
        assert not missing & set(ids)


class TestFile:
    def test_round_trip_with_a_manifest_and_a_hash(self, model, tmp_path):
        path = tmp_path / "set.jsonl"
        dataset = ebss_dataset(model, config=small(tau=math.inf), path=path)
        file = SampledSetFile(path)
        manifest = file.read_manifest()
        assert [sequence.input_ids for sequence in file.read()] == list(dataset["input_ids"])
        assert manifest["is_complete"]
        assert manifest["config"]["tau"] == "inf"
        assert manifest["config"]["seed"] == 0
        assert manifest["model"].endswith("model")
        assert manifest["versions"]["torch"] == torch.__version__
        other = load_dataset("json", data_files=str(path), split="train")
        assert list(other["input_ids"]) == list(dataset["input_ids"])

    def test_a_complete_set_is_read_and_not_sampled_again(self, model, tmp_path, monkeypatch):
        path = tmp_path / "set.jsonl"
        first = ebss_dataset(model, config=small(), path=path)
        monkeypatch.setattr(SelfSampler, "_sample", None)
        assert ebss_dataset(model, config=small(), path=path).to_dict() == first.to_dict()

    def test_an_interrupted_set_is_continued(self, model, tmp_path, monkeypatch, messages):
        path, real = tmp_path / "set.jsonl", SelfSampler._sample

        def stop_at_two(self, batch, starts, base):
            if 2 in batch:
                raise KeyboardInterrupt
            return real(self, batch, starts, base)

        monkeypatch.setattr(SelfSampler, "_sample", stop_at_two)
        with pytest.raises(KeyboardInterrupt):
            ebss_dataset(model, config=small(), path=path, max_cached_tokens=1)
        assert any("2 sequences are finished, kept in" in message for message in messages)
        assert not SampledSetFile(path).read_manifest()["is_complete"]
        assert [sequence.index for sequence in SampledSetFile(path).read()] == [0, 1]

        monkeypatch.setattr(SelfSampler, "_sample", real)
        continued = ebss_dataset(model, config=small(), path=path)
        assert list(continued["input_ids"]) == list(
            ebss_dataset(model, config=small())["input_ids"]
        )

    def test_a_full_disk_costs_the_file_and_not_the_set(
        self, model, tmp_path, messages, monkeypatch, disk_full_after
    ):
        path = tmp_path / "set.jsonl"
        disk_full_after(2)
        dataset = ebss_dataset(model, config=small(), path=path)
        assert len(dataset) == 4
        assert any("No space left on device" in message for message in messages)
        assert [sequence.index for sequence in SampledSetFile(path).read()] == [0, 1]

        monkeypatch.undo()
        continued = ebss_dataset(model, config=small(), path=path)
        assert list(continued["input_ids"]) == list(dataset["input_ids"])
        assert [sequence.index for sequence in SampledSetFile(path).read()] == [0, 1, 2, 3]

    def test_a_line_that_does_not_fit_is_removed_again(self, model, tmp_path):
        path = tmp_path / "set.jsonl"
        ebss_dataset(model, config=small(), path=path)
        before, sequence = path.read_bytes(), SampledSetFile(path).read()[0]

        class FullDisk(type(path)):
            def open(self, mode="r", **options):
                file = super().open(mode, **options)
                if mode == "a":
                    write = file.write
                    file.write = lambda text: (write(text[:9]), file.flush(), full())
                return file

        def full():
            raise OSError(errno.ENOSPC, "full")

        with pytest.raises(OSError, match="full"):
            SampledSetFile(FullDisk(path)).append(sequence)
        assert path.read_bytes() == before

    def test_refuses_to_continue_another_set(self, model, tmp_path):
        path = tmp_path / "set.jsonl"
        ebss_dataset(model, config=small(), path=path)
        with pytest.raises(ValueError, match="is another set: config .*'seed': 0.*'seed': 1"):
            ebss_dataset(model, config=small(seed=1), path=path)
        with pytest.raises(ValueError, match="is another set: prompts None there, "):
            ebss_dataset(model, config=small(), path=path, prompts=[[3]])

    def test_refuses_lines_without_a_manifest(self, model, tmp_path):
        path = tmp_path / "set.jsonl"
        path.write_text("{}\n")
        with pytest.raises(ValueError, match="exists without set.manifest.json"):
            ebss_dataset(model, config=small(), path=path)

    def test_refuses_a_complete_set_that_was_changed(self, model, tmp_path):
        path = tmp_path / "set.jsonl"
        ebss_dataset(model, config=small(), path=path)
        lines = path.read_text().splitlines()
        row = json.loads(lines[1])
        row["input_ids"][3] += 1
        lines[1] = json.dumps(row)
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(ValueError, match="was changed after it was sampled"):
            SampledSetFile(path).read()

    def test_names_a_line_that_cannot_be_read(self, model, tmp_path):
        path = tmp_path / "set.jsonl"
        path.write_text('{"index": 0}\n{"index": 1}\n')
        with pytest.raises(ValueError, match="line 1: not a sequence"):
            SampledSetFile(path).read()
