"""Data that cannot be calibrated on are refused by row and reason; what is lost is said."""

import pytest
import torch
from helpers import VOCABULARY, NoProcessor, dataset, int4, oneshot, tiny_model, tokens

pytest.importorskip("llmcompressor")

from datasets import Dataset, IterableDataset
from llmcompressor import oneshot as host_oneshot
from loguru import logger
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerFast

from moeq_plugin import MoEQuantModifier
from moeq_plugin.integrations.llm_compressor.preflight import count_tokens
from moeq_plugin.records.run import Basis


@pytest.fixture
def model(tmp_path):
    return tiny_model("qwen3_moe", tmp_path / "model")


def recipe(**more):
    return MoEQuantModifier(config_groups=int4(16), **more)


def tokenizer():
    words = {str(i): i for i in range(VOCABULARY)}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "0")))
    made.pad_token, made.model_max_length = "0", 512
    return made


def rows(*ids):
    return Dataset.from_dict({"input_ids": list(ids)})


WRONG = {
    "empty ids": (lambda: rows([4, 5], [], [6]), r"row 1 of the calibration data has no tokens"),
    "an id too large": (lambda: rows([4], [5, VOCABULARY]), "row 1 .*the token id 128, which the"),
    "a negative id": (lambda: rows([4, -1]), "row 0 .*has the token id -1"),
    "floats": (lambda: rows([0.5, 1.0]), "expected lists of integers"),
    "texts as ids": (lambda: rows(["a"], ["b"]), "expected lists of integers"),
    "text and ids": (
        lambda: Dataset.from_dict({"text": ["1", None], "input_ids": [None, [4]]}),
        r"row 0 of the calibration data has no `input_ids` \(1 of 2 rows",
    ),
    "an empty text": (
        lambda: Dataset.from_dict({"text": ["1 2", "", "3"]}),
        "row 1 of the calibration data has no tokens: its text is empty",
    ),
    "no text": (lambda: Dataset.from_dict({"text": ["1", None]}), "row 1 .* has no `text`"),
    "numbers as text": (lambda: Dataset.from_dict({"text": [1, 2]}), "holds int64, expected str"),
    "another column": (
        lambda: Dataset.from_dict({"prompt": ["1"]}),
        "the columns prompt, expected .* text_column=",
    ),
    "a list of texts": (lambda: ["1 2", "3"], r'a list: pass Dataset.from_dict\(\{"text": rows'),
    "a list of dicts": (lambda: [{"text": "1"}], r"a list: pass Dataset.from_list\(rows\)"),
    "a tensor": (lambda: tokens(2, 8), "are a Tensor, expected a datasets.Dataset"),
    "a stream": (
        lambda: IterableDataset.from_generator(lambda: iter([{"input_ids": [4]}])),
        r"streamed.*Dataset.from_list\(list\(dataset.take",
    ),
    "a loader of a stream": (
        lambda: DataLoader(
            IterableDataset.from_generator(lambda: iter([{"input_ids": [4]}])), batch_size=1
        ),
        "the DataLoader has no length",
    ),
    "a loader of tensors": (
        lambda: DataLoader(TensorDataset(tokens(2, 8))),
        "batch 0 is a list, expected a dict of tensors with `input_ids`",
    ),
    "embeddings that are no numbers": (
        lambda: [{"inputs_embeds": torch.full((1, 4, 64), float("nan"))}],
        "NaN or infinity in `inputs_embeds`",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_it_is_refused_before_calibration(kind, model, tmp_path):
    make, message = WRONG[kind]
    if kind == "embeddings that are no numbers":
        with pytest.raises(ValueError, match=message):
            count_tokens(make(), model)
        return
    with pytest.raises(ValueError, match=message):
        oneshot(model, recipe(work_dir=str(tmp_path / "w")), make(), processor=tokenizer())
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("name", ["num_calibration_samples", "max_seq_length", "batch_size"])
@pytest.mark.parametrize("value", [0, -3])
def test_numbers_that_mean_nothing(name, value, model):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected a number from 1 on"):
        oneshot(model, recipe(), **{name: value})


def test_recipes_of_the_host_alone_are_its_own_business(model):
    from llmcompressor.modifiers.gptq import GPTQModifier

    stock = GPTQModifier(config_groups=int4(16), ignore=["lm_head", "re:.*gate$"])
    oneshot(model, stock, num_calibration_samples=0)  # which means all to it


@pytest.mark.parametrize("kind", ["path", "mapping", "list of paths", "text"])
def test_recipes_in_every_form(kind, model, tmp_path):
    import json

    content = {"a_stage": {"a_modifiers": {"MoEQuantModifier": {"config_groups": int4(16)}}}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content))
    forms = {
        "path": path, "mapping": content, "list of paths": [path], "text": json.dumps(content),
    }  # fmt: skip
    oneshot(model, forms[kind], dataset(2), output_dir=str(tmp_path / "out"))
    assert "quantized 32 of 32" in said_in(tmp_path / "out")


def said_in(directory):
    from moeq_plugin.records.run import RunRecord

    return RunRecord.load(directory)[0].summary(32)


def test_a_recipe_that_is_no_file(model, tmp_path):
    with pytest.raises(ValueError, match="nowhere.yaml is not a file"):
        oneshot(model, tmp_path / "nowhere.yaml")


def warnings_of(run):
    said = []
    sink = logger.add(said.append, format="{message}", level="WARNING")
    try:
        run()
    finally:
        logger.remove(sink)
    return "".join(said)


def test_what_the_collator_cuts_off_is_counted(model):
    data = rows(*(tokens(1, length)[0].tolist() for length in (64, 48, 60, 40)))
    modifier = recipe()
    said = warnings_of(lambda: oneshot(model, modifier, data, batch_size=4))
    assert "52 of 212 calibration tokens are lost: rows are cut to the shortest" in said
    assert modifier.record.calibration.endswith(", 52 tokens cut off by the collator")


def test_a_limit_that_was_asked_for_loses_nothing(model):
    data = rows(*(tokens(1, length)[0].tolist() for length in (64, 48, 60, 40)))
    counted = []

    def collated(**arguments):
        modifier = recipe()
        oneshot(model, modifier, data, **arguments)
        counted.append(modifier.record.calibration)

    assert "lost" not in warnings_of(lambda: collated(batch_size=4, max_seq_length=40))
    assert counted == ["160 tokens in 1 batch"]


def test_padding_without_a_mask_is_said(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path, pad_token_id=0)
    ids = tokens(4, 32)
    ids[:, 20:] = 0
    said = warnings_of(lambda: oneshot(model, recipe(), rows(*ids.tolist())))
    assert "48 of 128 calibration tokens look like padding" in said


def test_padding_with_a_mask_is_not(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path, pad_token_id=0)
    ids = tokens(4, 32)
    ids[:, 20:] = 0
    data = Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": (ids > 0).long().tolist()}
    )
    assert "look like padding" not in warnings_of(lambda: oneshot(model, recipe(), data))


def test_few_tokens_are_few_outside_of_experts_too(model):
    """One token gives attention second moments of rank one."""
    modifier = recipe(ignore=["lm_head", "re:.*experts.*"])
    said = warnings_of(lambda: oneshot(model, modifier, rows([5])))
    assert {r.basis for r in modifier.record.linears} == {Basis.FEW}
    assert "8 on fewer tokens than they need" in said


def test_enough_tokens_are_their_own(model):
    modifier = recipe(ignore=["lm_head", "re:.*experts.*"])
    said = warnings_of(lambda: oneshot(model, modifier, dataset(2, 32)))
    assert {r.basis for r in modifier.record.linears} == {Basis.OWN}
    assert "fewer tokens" not in said


def test_looking_at_shuffled_data_does_not_change_them(model):
    """What the loader draws for the look is drawn again for the run."""
    loader = DataLoader(
        tokens(32, 8), shuffle=True, collate_fn=lambda r: {"input_ids": torch.stack(r)}
    )
    torch.manual_seed(3)
    expected = [batch["input_ids"] for batch in loader]
    torch.manual_seed(3)
    counted = count_tokens(loader, model)
    assert counted.num_tokens == 32 * 8
    assert all(torch.equal(a, b["input_ids"]) for a, b in zip(expected, loader, strict=True))


def test_a_loader_of_dicts_works(model):
    loader = DataLoader(tokens(8, 32), collate_fn=lambda r: {"input_ids": torch.stack(r)})
    modifier = recipe()
    host_oneshot(model=model, recipe=modifier, dataset=loader, processor=NoProcessor())
    assert modifier.record.count(Basis.NONE) == 0
