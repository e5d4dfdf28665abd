"""The world tokenizer is that of the rwkv package."""

import random
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

import moeq_plugin.rwkv  # noqa: F401
from moeq_plugin.rwkv.tokenizer import VOCABULARY, RWKVWorldTokenizer, read_vocabulary

rwkv_tokenizer = pytest.importorskip("rwkv.rwkv_tokenizer")


@pytest.fixture(scope="module")
def theirs():
    return rwkv_tokenizer.TRIE_TOKENIZER(str(VOCABULARY))


@pytest.fixture(scope="module")
def ours():
    return RWKVWorldTokenizer()


def strings(count):
    """Texts of all kinds: any characters, pieces of code and of many languages, and mixtures."""
    draw = random.Random(0)
    planes = [(0, 0x7F), (0x80, 0x24F), (0x370, 0x5FF), (0x900, 0xDFF), (0x3040, 0x30FF)]
    planes += [(0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF), (0, 0x10FFFF)]
    tokens = [t.decode(errors="ignore") for t in read_vocabulary(VOCABULARY).values()]
    for number in range(count):
        length = draw.randrange(1, 40)
        if number % 3 == 0:
            yield "".join(draw.choice(tokens) for _ in range(length))
        else:
            low, high = draw.choice(planes)
            codes = (draw.randint(low, high) for _ in range(length))
            yield "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)


def test_ten_thousand_strings_get_the_same_ids_and_come_back(ours, theirs):
    for text in strings(10_000):
        ids = ours(text)["input_ids"]
        assert ids == theirs.encode(text), ascii(text)
        assert ours.decode(ids) == text


def test_what_looks_like_a_special_token_is_text(ours, theirs):
    text = "before<|endoftext|>after"
    assert ours(text)["input_ids"] == theirs.encode(text)
    assert ours.decode([0, *theirs.encode("x"), 0], skip_special_tokens=True) == "x"


def test_ids_are_those_of_the_vocabulary(ours):
    assert len(ours._tokens) == 65529
    vocabulary = ours.get_vocab()
    assert vocabulary["<|endoftext|>"] == ours.eos_token_id == ours.pad_token_id == 0
    assert sorted(vocabulary.values()) == [0, *sorted(ours._tokens)]
    assert ours.decode([65535]) == "<|endoftext|>"  # of no token


def test_a_batch_is_padded_on_the_left(ours):
    batch = ours(["one", "one two three"], padding=True)
    assert batch["input_ids"][0][0] == 0
    assert batch["attention_mask"][0] == [0] * (len(batch["input_ids"][1]) - 1) + [1]


def test_bytes_that_are_no_text_are_replaced(ours, theirs):
    ids = theirs.encode("é")[:1] if len(theirs.encode("é")) > 1 else [195 + 1]
    assert "�" in ours.decode(ids)


def test_saved_it_is_found_again_in_a_fresh_process(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    code = (
        "import moeq_plugin.rwkv\nfrom transformers import AutoTokenizer\n"
        f"print(AutoTokenizer.from_pretrained({str(tmp_path)!r})('Ünï 世界')['input_ids'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ours("Ünï 世界")["input_ids"])
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is RWKVWorldTokenizer


@pytest.mark.parametrize("line", ["1 'a'", "x 'a' 1", "1 'a' 2", "1 [1] 1", "1 'a 1"])
def test_a_damaged_vocabulary_is_refused_by_its_line(line, tmp_path):
    path = tmp_path / "vocabulary.txt"
    path.write_text(f"1 'b' 1\n{line}\n")
    with pytest.raises(ValueError, match="line 2 should be an id"):
        read_vocabulary(path)
