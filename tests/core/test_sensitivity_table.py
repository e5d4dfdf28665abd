import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest

from moeq_plugin.core.sensitivity import SensitivityTable


def table(**changes):
    given = SensitivityTable(
        rows=("0.up", "0.down", "1.up"),
        options=("w2", "w4"),
        domains=("text", "code"),
        loss=np.array([[[4.0, 1.0], [3.0, 0.1], [2.0, math.inf]]] * 2),
        num_bytes=np.array([[2, 4], [2, 4], [20, 40]]),
        num_weights=np.array([8, 8, 80]),
        units={"vllm": ("0", "0", "1"), "gguf": ("0.up", "0.down", "1.up")},
        fixed_bytes=7,
        undercovered=("0.up",),
    )
    return replace(given, **changes)


def test_survives_its_file(tmp_path):
    saved = table()
    saved.save(tmp_path / "table.json")

    loaded = SensitivityTable.load(tmp_path / "table.json")

    for field in fields(SensitivityTable):
        before, after = getattr(saved, field.name), getattr(loaded, field.name)
        assert type(before) is type(after)
        np.testing.assert_equal(after, before)
    assert (loaded.loss.dtype, loaded.num_bytes.dtype) == (np.float64, np.int64)


def test_its_file_is_strict_json(tmp_path):
    table().save(tmp_path / "table.json")
    text = (tmp_path / "table.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"][1][2] == [2.0, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": ()}, r"expected domains, rows and options, got \(0, 3, 2\) of them"),
        ({"loss": np.zeros((2, 2, 2))}, r"must have the shapes .*'loss': \(2, 2, 2\)"),
        ({"num_bytes": np.zeros((3, 1))}, r"'num_bytes': \(3, 1\)"),
        ({"num_weights": np.zeros(2)}, r"'num_weights': \(2,\)"),
        ({"loss": np.array([[[1, 1], [-1, 1], [1, 1.0]]] * 2)}, r"must be >= 0 .*\['0.down'\]"),
        ({"loss": np.array([[[1, 1], [1, 1], [1, np.nan]]] * 2)}, r"not NaN; .*\['1.up'\]"),
        ({"units": {"vllm": ("0", "1")}}, r"units must label 3 rows, got {'vllm': 2}"),
    ],
    ids=["no-domain", "loss", "bytes", "weights", "negative", "nan", "units"],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        table(**changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("schema_version"), "'schema_version'$"),
        (lambda c: c.update(schema_version=0), "schema version 0, expected 1"),
        (lambda c: c.pop("num_bytes"), "'num_bytes'$"),
        (lambda c: c.update(extra=1), "unexpected keyword argument 'extra'"),
        (lambda c: c.update(units=[]), "'list' object has no attribute 'items'"),
        (lambda c: c["rows"].pop(), "must have the shapes"),
    ],
    ids=["no-version", "version", "missing", "extra", "units", "rows"],
)
def test_refuses_a_file(tmp_path, change, message):
    path = tmp_path / "table.json"
    table().save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"table.json is not a sensitivity table: .*{message}"):
        SensitivityTable.load(path)


def test_an_undercovered_row_does_without_its_smallest_option():
    floored = table(undercovered=("0.up", "1.up")).floored()

    expected = table().loss.copy()
    expected[:, 0, 0] = math.inf
    np.testing.assert_equal(floored.loss, expected)  # 1.up has one option and keeps it
    assert np.isfinite(table().loss[:, 0, 0]).all()
