"""A mapped file that is read within bounds: nothing changed is lost, nothing changed is missed."""

import contextlib
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeq_plugin.files.mapped import let_go, letting_go, unchanged

MB = 1 << 20
# every page once, as fast as memory allows: holes of a sparse file are pages like others
READ = """
import sys, torch
from pathlib import Path
from moeq_plugin.files.mapped import letting_go
torch.set_num_threads(1)
path, wanted = Path(sys.argv[1]), sys.argv[2] == "yes"
size = path.stat().st_size
bytes_ = torch.from_file(str(path), size=size, dtype=torch.uint8)
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
with letting_go(path, lambda: wanted):
    before = peak()
    for part in bytes_.split(1 << 22):
        part.view(torch.int64).sum()
    print(1024 * (peak() - before))
"""


@pytest.fixture
def on_a_disk(tmp_path):
    """Return a directory whose files can leave memory."""
    if sys.platform != "linux":
        pytest.skip("other systems take no such advice")
    path = tmp_path / "probe"
    path.write_bytes(bytes(MB))
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        mapped = mmap.mmap(file.fileno(), MB, access=mmap.ACCESS_READ)
    assert mapped[::4096].count(0) == MB // 4096
    with contextlib.suppress(OSError):  # older kernels know no such advice
        mapped.madvise(21)
    if resident(path)[1]:
        pytest.skip("this system keeps the pages of such a file in memory")
    return tmp_path


def resident(path):
    """Return the bytes of a file that this process has in memory, of its own and of the file."""
    of_file = re.compile(rf"\S+-\S+ .* {re.escape(str(path))}\n(?:\w+:.*\n)*", re.MULTILINE)
    found = of_file.findall(Path("/proc/self/smaps").read_text())
    own, all_ = (
        sum(1024 * int(kb) for part in found for kb in re.findall(rf"^{name}: +(\d+)", part, re.M))
        for name in ("Anonymous", "Rss")
    )
    return own, all_ - own


def test_what_was_written_to_stays_and_the_rest_is_found_again(on_a_disk):
    path = on_a_disk / "file"
    content = torch.randint(0, 256, (8 * MB,), dtype=torch.uint8)
    with path.open("wb") as file:
        content.numpy().tofile(file)
        os.fsync(file.fileno())
    mapped = torch.from_file(str(path), size=len(content), dtype=torch.uint8)
    written = slice(3 * MB + 100, 4 * MB + 100)
    mapped[written] = content[written] = 7
    assert torch.equal(mapped, content)
    own, of_file = resident(path)
    assert own >= MB
    assert of_file > 6 * MB

    let_go(path)

    assert resident(path) == (own, 0)
    assert torch.equal(mapped, content)


def test_other_files_stay(on_a_disk):
    path, other = on_a_disk / "file", on_a_disk / "file.other"
    for file in (path, other):
        file.write_bytes(bytes(MB))
    mapped = torch.from_file(str(other), size=MB, dtype=torch.uint8)
    mapped.sum()

    let_go(path)

    assert resident(other)[1] == MB


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["yes", "no"])
def test_pages_pile_up_to_half_a_gigabyte(wanted, on_a_disk):
    path, size = on_a_disk / "sparse", 3 << 30
    with path.open("wb") as file:
        file.truncate(size)

    peak = int(subprocess.check_output([sys.executable, "-c", READ, str(path), wanted]))

    assert (peak < size / 2) == (wanted == "yes")
    assert peak > 500 * MB


def test_a_file_that_is_written_to_is_noticed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="file was written to while it was read"), unchanged(path):
        path.write_bytes(b"new")
    os.utime(path, ns=(0, 0))
    with pytest.raises(ValueError, match="was written to"), unchanged(path):
        path.open("ab").write(b"er")
        os.utime(path, ns=(0, 0))


def test_a_file_that_is_only_read_or_replaced_is_not(tmp_path):
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"old")
    other.write_bytes(b"new")
    with unchanged(path):
        path.read_bytes()
        other.rename(path)


def test_an_error_inside_is_the_one_that_is_raised(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), unchanged(path), letting_go(path, lambda: True):
        path.write_bytes(b"new")
        raise KeyError
