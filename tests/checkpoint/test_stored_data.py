"""What is read of files: the same bytes whether files stay open or not, and codes out of words."""

import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moeq_plugin.checkpoint import headers
from moeq_plugin.checkpoint.headers import files_stay_open, read_bytes, read_header
from moeq_plugin.core.bit_packing import unpack_rows
from moeq_plugin.untrusted.broken import UnreadableFileError


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def tensors(tmp_path):
    """Tensors of more files than may be open at once."""
    for number in range(headers._MAX_OPEN + 3):
        content = {f"{number}.{name}": torch.randn(3, 5) for name in "ab"}
        save_file(content, tmp_path / f"{number:03d}.safetensors")
    paths = sorted(tmp_path.glob("*.safetensors"))
    return [tensor for path in paths for tensor in read_header(path)]


def test_files_that_stay_open_hold_the_same_bytes(tensors):
    parts = [(tensor, begin, size) for tensor in tensors for begin, size in ((0, None), (4, 8))]
    random.Random(0).shuffle(parts)
    expected = [read_bytes(*part) for part in parts]
    before = open_files()
    with files_stay_open():
        assert [read_bytes(*part) for part in parts] == expected
        assert open_files() <= before + headers._MAX_OPEN
    assert open_files() == before


def test_they_are_closed_after_a_failure_and_are_what_was_opened(tensors):
    before, first = open_files(), tensors[0]
    expected = read_bytes(first)

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), files_stay_open():
        read_bytes(first)
        first.path.unlink()
        os.mkfifo(first.path)
        assert read_bytes(first) == expected
        fail()
    assert open_files() == before
    with pytest.raises(UnreadableFileError, match="not a regular file"):
        read_bytes(first)


@pytest.mark.parametrize("num_bits", range(1, 17))
def test_codes_are_the_digits_of_the_number_that_the_words_spell(num_bits):
    rng = random.Random(num_bits)
    for count in (1, 7, 32, 33):
        rows = [[rng.randrange(1 << num_bits) for _ in range(count)] for _ in range(3)]
        numbers = [sum(code << i * num_bits for i, code in enumerate(row)) for row in rows]
        num_words = -(-count * num_bits // 32)
        words = [n.to_bytes(4 * num_words, "little") for n in numbers]
        packed = torch.frombuffer(bytearray(b"".join(words)), dtype=torch.int32)
        found = unpack_rows(packed.view(3, num_words), num_bits, count)
        assert found.dtype == torch.int32
        assert found.tolist() == rows
