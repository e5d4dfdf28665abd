import pytest
from written_checkpoint import write_checkpoint

from moeq_plugin.report.directory import read_directory


@pytest.fixture
def found(tmp_path):
    """What is known of a checkpoint written by hand."""
    return read_directory(write_checkpoint(tmp_path))
