"""A sealed file is what was written, or is refused."""

import pytest

from moeq_plugin.files.sealed import SealedFile


@pytest.fixture
def sealed(tmp_path):
    file = SealedFile(tmp_path / "table.json")
    assert not file.is_there()
    file.write(lambda new: new.write_text('{"loss": 0.25}\n'))
    assert file.is_there()
    return file


def test_any_flipped_bit_of_the_file_or_its_seal_is_refused(sealed, tmp_path):
    for path in list(tmp_path.iterdir()):
        content = path.read_bytes()
        for bit in range(8 * len(content)):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"table.json was changed after"):
                sealed.is_there()
        path.write_bytes(content)
    assert sealed.is_there()


def test_a_file_without_its_seal_is_refused(sealed, tmp_path):
    (tmp_path / "table.json.sha256").unlink()
    with pytest.raises(ValueError, match="was changed after it had been written"):
        sealed.is_there()


def test_what_is_written_again_has_a_seal_of_its_own(sealed):
    sealed.write(lambda new: new.write_text('{"loss": 0.5}\n'))
    assert sealed.is_there()


def test_a_kill_between_the_two_leaves_no_file_without_its_seal(tmp_path):
    file = SealedFile(tmp_path / "table.json")

    def stop(new):
        new.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file.write(stop)
    assert not file.is_there()
