"""Products are compiled once, and nothing depends on their being there."""

import ctypes
import shutil

import pytest
import torch
from torch import nn

from moeq_plugin.core.codebook import CodebookFormat, encode
from moeq_plugin.core.packed_codebook import PackedFormat
from moeq_plugin.kernels import build
from moeq_plugin.models.packed import CodebookLinear


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """Compile into an empty directory, by a process that has not asked yet."""
    monkeypatch.setenv("MOEQ_CACHE", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_second_process_finds_what_the_first_has_compiled(anew):
    assert isinstance(build.library(), ctypes.CDLL)
    (made,) = anew.glob("*.so")
    when = made.stat().st_mtime_ns

    build.library.cache_clear()
    assert isinstance(build.library(), ctypes.CDLL)

    assert [path.stat().st_mtime_ns for path in anew.iterdir()] == [when]
    assert anew.stat().st_mode & 0o022 == 0  # what lies there is loaded as code


@pytest.mark.parametrize(
    ("name", "value"), [("MOEQ_KERNELS", "0"), ("CXX", "false"), ("CXX", "/no/such/compiler")]
)
def test_without_a_compiler_the_result_is_the_same(anew, monkeypatch, name, value):
    form = CodebookFormat(4, 2, group_rows=8, group_columns=16)
    plain = nn.Linear(48, 40)
    encoded = encode(plain.weight.detach(), form)
    packed = CodebookLinear(plain, PackedFormat.of(encoded))
    packed.requires_grad_(False).fill(packed.form.pack(encoded))
    x = torch.randn(3, 48)
    with torch.no_grad():
        expected = nn.functional.linear(x, encoded.decode(), plain.bias)
    monkeypatch.setenv(name, value)

    assert build.library() is None
    assert torch.equal(packed(x), expected)
    assert torch.equal(packed(x), expected)  # from codes that were kept
    assert not list(anew.iterdir())
