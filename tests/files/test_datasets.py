"""Data of every kind becomes rows to calibrate on, is read as far as needed, and said in a line."""

import json
import logging
import subprocess
import sys
from logging.handlers import BufferingHandler

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("datasets")

import datasets
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moeq_plugin.files.data_source import DataSource
from moeq_plugin.files.datasets import interleaved, read_dataset, shares
from moeq_plugin.files.first_look import check_first_rows

on_a_busy_machine = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
ROWS = [{"text": f"1 2 {number}"} for number in range(6)]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    words = ["?", *map(str, range(100)), "user", "assistant", "<", ">"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE)


def write(path, rows):
    {
        ".jsonl": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
        ".json": lambda: path.write_text(json.dumps(rows)),
        ".csv": lambda: datasets.Dataset.from_list(rows).to_csv(path),
        ".parquet": lambda: datasets.Dataset.from_list(rows).to_parquet(path),
        "": lambda: datasets.Dataset.from_list(rows).save_to_disk(path),
    }[path.suffix]()
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "directory"])
def test_every_kind_of_file_gives_the_same_rows(name, tmp_path):
    found = read_dataset(write(tmp_path / name, ROWS), 4)
    assert found.dataset.to_list() == ROWS[:4]
    assert found.summary == f"{name}: 4 rows of `text`"


def test_an_arrow_file_and_the_train_split(tmp_path):
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "splits")
    assert read_dataset(tmp_path / "splits", 9).dataset.to_list() == ROWS
    (arrow,) = (tmp_path / "splits" / "train").glob("*.arrow")
    assert read_dataset(arrow, 9).dataset.to_list() == ROWS


def test_a_text_is_cut_into_pieces_of_which_nothing_is_lost(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(str(number) for number in range(50)))
    pieces = read_dataset(path, 9, tokenizer=tokenizer, max_seq_length=16).dataset["input_ids"]
    assert [len(piece) for piece in pieces] == [16, 16, 16, 2]
    assert tokenizer.decode(sum(pieces, [])) == " ".join(map(str, range(50)))
    assert len(read_dataset(path, 2, tokenizer=tokenizer, max_seq_length=16).dataset) == 2


CONVERSATION = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CONVERSATION},
        {"conversations": [{"from": "human", "value": "1 2"}, {"from": "gpt", "value": "3"}]},
        {"prompt": "1 2", "response": "3"},
        {"prompt": "1 2", "completion": "3"},
        {"messages": [{**CONVERSATION[0], "content": [{"type": "text", "text": "1 2"}]},
                      {**CONVERSATION[1], "content": [{"type": "text", "text": "3"}]}]},
    ],
)  # fmt: skip
def test_conversations_are_said_as_the_template_says_them(row, tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [row])
    (ids,) = read_dataset(path, tokenizer=tokenizer).dataset["input_ids"]
    assert ids == tokenizer.apply_chat_template(CONVERSATION, return_dict=True)["input_ids"]
    assert tokenizer.decode(ids) == "< user > 1 2 < assistant > 3"
    plain = read_dataset(path, tokenizer=tokenizer, chat_template=False)
    assert plain.dataset["text"] == ["1 2\n\n3"]
    assert "(messages joined as plain paragraphs)" in plain.summary
    assert read_dataset(path).dataset["text"] == ["1 2\n\n3"]


def test_messages_for_a_tokenizer_without_a_template_are_said_to_be_joined(tmp_path, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    path = write(tmp_path / "a.jsonl", [{"messages": CONVERSATION}])
    found = read_dataset(path, tokenizer=bare)
    assert found.dataset["text"] == ["1 2\n\n3"]
    assert found.summary == (
        "a.jsonl: 1 row of `messages` (no chat template in this tokenizer: messages joined as "
        "plain paragraphs)"
    )


def test_fewer_rows_than_asked_for_are_told(tmp_path, recwarn):
    path = write(tmp_path / "a.jsonl", ROWS)
    read_dataset(path, 6)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"a\.jsonl: 6 rows of `text`; 7 rows were asked for"):
        read_dataset(path, 7)


def test_content_is_text(tmp_path):
    found = read_dataset(write(tmp_path / "a.csv", [{"content": "NA"}, {"content": "b"}]))
    assert found.dataset.to_list() == [{"text": "NA"}, {"text": "b"}]


def test_rows_with_nothing_in_them_are_left_out_and_counted(tmp_path):
    rows = [*ROWS, {"text": ""}, {"text": None}, {"text": " \n"}]
    found = read_dataset(write(tmp_path / "a.jsonl", rows))
    assert found.dataset.to_list() == ROWS
    assert found.summary == "a.jsonl: 6 rows of `text`, 3 left out: nothing in them"


def test_a_template_makes_no_text_of_blanks(tmp_path, tokenizer):
    blank = {"messages": [{"role": "user", "content": " "}]}
    path = write(
        tmp_path / "a.jsonl", [blank, {"messages": CONVERSATION}, {"messages": CONVERSATION}]
    )
    found = read_dataset(path, tokenizer=tokenizer)
    assert len(found.dataset) == 2
    assert found.summary.endswith("1 left out: nothing in them")


def test_a_source_that_is_half_empty_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "1"}, {"input_ids": [1]}])
    with pytest.raises(ValueError, match=r"1 of 2 rows have no `input_ids`.* row 0"):
        read_dataset(path)


def test_a_mixture_has_its_shares_in_every_stretch(tmp_path, tokenizer):
    a = write(tmp_path / "a.jsonl", [{"input_ids": [1, n]} for n in range(90)])
    b = write(tmp_path / "b.csv", [{"text": "2 2"}] * 90)
    mixed = read_dataset([f"{a}:0.75", f"{b}:0.25"], 40, tokenizer=tokenizer)
    first = [row["input_ids"][0] for row in mixed.dataset]
    of_b = tokenizer("2")["input_ids"][0]
    assert [first[n : n + 8].count(of_b) for n in range(0, 40, 8)] == [2] * 5
    assert mixed.summary == "a.jsonl: 30 rows of `input_ids`; b.csv: 10 rows of `text`"
    with pytest.raises(ValueError, match="needs the tokenizer"):
        read_dataset([a, b], 40)


@on_a_busy_machine
@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=6), st.integers(6, 1000))
def test_shares_are_whole_and_near(weights, total):
    counts = shares(weights, total)
    assert sum(counts) == total
    assert min(counts) >= 1
    exact = [weight / sum(weights) * total for weight in weights]
    assert all(abs(a - max(b, 1)) <= len(weights) for a, b in zip(counts, exact, strict=True))


@on_a_busy_machine
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_mixing_keeps_every_row_and_the_order_of_each_source(lengths):
    parts = [[{"of": n, "row": i} for i in range(length)] for n, length in enumerate(lengths)]
    mixed = interleaved(parts)
    for number, part in enumerate(parts):
        assert [row for row in mixed if row["of"] == number] == part


def test_a_weight_is_no_part_of_a_name_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b:0.5").touch()
    assert DataSource.parse("b:0.5") == DataSource("b:0.5")
    assert DataSource.parse("a.jsonl:2") == DataSource("a.jsonl", 2.0)
    assert DataSource.parse("owner/name") == DataSource("owner/name")
    with pytest.raises(ValueError, match="must be positive"):
        DataSource.parse("a.jsonl:-1")


def test_rows_may_have_different_columns(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "source": "c"}\n')
    rows = read_dataset(path, 9).dataset.to_list()
    assert rows == [{"text": "a", "source": None}, {"text": "b", "source": "c"}]


@pytest.mark.parametrize("content", ["", "\n", '"text"', "{", "\xff", '{"a": 1}'])
def test_what_is_no_data_set_is_refused(content, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match=r"data\.jsonl"):
        read_dataset(path, 4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: it has no row"),
        (b" \n\t\n", "nothing but blanks"),
        (b'{"text": "1"}\n\n{"text"\n', "line 3 is not JSON"),
        (b'{"text": "1"}\n[1]\n', "line 2 is not a JSON object"),
        (b'{"a": 1}\n{"b": 1}', "the columns a, b: expected `text`"),
    ],
)
def test_the_first_look_needs_no_package(content, said, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    code = (
        "import sys; from moeq_plugin.cli.data import Data\n"
        f"try: Data(({str(path)!r},), 9, 9).check()\nexcept ValueError as error: print(error)\n"
        "print({'torch', 'datasets', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message, imported = done.stdout.splitlines()
    assert said in message and str(path) in message
    assert imported == "set()"


def test_what_stands_behind_the_first_look_is_not_judged_by_it(tmp_path, monkeypatch):
    monkeypatch.setattr("moeq_plugin.files.first_look._LOOKED_AT", 40)
    path = write(tmp_path / "a.jsonl", [{"a": 1}] * 9 + ROWS)
    check_first_rows(path, 99)  # `text` comes later
    path.write_text('{"text": "1"}\n' * 9 + "{")
    check_first_rows(path, 99)
    check_first_rows(path, 2)


def test_a_row_that_is_broken_further_down_is_said_once(tmp_path, monkeypatch):
    heard = BufferingHandler(9)
    logging.getLogger("datasets").addHandler(heard)
    monkeypatch.setattr("moeq_plugin.files.first_look._LOOKED_AT", 1)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "1"}\n{"text": \n')
    with pytest.raises(ValueError, match="cannot be read as a data set"):
        read_dataset(path, 9)
    logging.getLogger("datasets").removeHandler(heard)
    assert heard.buffer == []


def test_a_text_of_blanks_is_refused(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(" \n\n\t\n")
    with pytest.raises(ValueError, match="nothing but blanks"):
        read_dataset(path, 4, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("name", "said"), [("a.xlsx", "'.xlsx' are not read"), ("folder", "no `save_to_disk` wrote")]
)
def test_what_is_not_read_names_what_is(name, said, tmp_path):
    path = tmp_path / name
    path.write_text("1") if path.suffix else path.mkdir()
    with pytest.raises(ValueError, match=said) as error:
        read_dataset(path, 4)
    assert ".parquet" in str(error.value)


@pytest.mark.parametrize("rows", [0, -3])
def test_at_least_one_row_is_asked_for(rows, tmp_path):
    with pytest.raises(ValueError, match="at least 1 row"):
        read_dataset(tmp_path / "data.jsonl", rows)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        read_dataset(tmp_path / "absent", 4)
