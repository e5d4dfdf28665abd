import json
import re

import pytest
from written_checkpoint import PROMPT, record, write_checkpoint

from moeq_plugin.records.run import save_records
from moeq_plugin.report import page
from moeq_plugin.report.directory import read_directory

pytest.importorskip("plotly")


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path):
    text = page.render(read_directory(write_checkpoint(tmp_path)))
    ours = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)="(?!#|data:|README)', ours)
    assert "default-src 'none'" in ours
    assert "url(" not in ours


def test_text_is_text_wherever_it_comes_from(tmp_path):
    found = read_directory(write_checkpoint(tmp_path))
    name = "model.layers.0.mlp.experts.0.</script><b>"
    first = found.records[0].linears[1]
    found.records[0].linears[1] = first.__class__(**{**vars(first), "name": name})
    text = page.render(found)
    assert "<b>" not in text.split("<script>")[0]
    assert PROMPT not in text
    content = re.search(r'id="charts">(.*?)</script>', text, flags=re.DOTALL)[1]
    assert set(json.loads(content)) >= {"bits", "losses", "effective-tokens", "jaccard"}


def test_code_is_what_stands_between_backticks():
    assert page._code("run `a < b` & go") == "run <code>a &lt; b</code> &amp; go"


@pytest.mark.parametrize("kept", ["moeq_run.json", "config.json"])
def test_a_directory_with_little_in_it_still_gives_a_page(tmp_path, kept):
    write_checkpoint(tmp_path)
    for path in tmp_path.iterdir():
        if path.name != kept:
            path.unlink()
    text = page.render(read_directory(tmp_path))
    assert text.count('class="missing"') > 3


def test_a_record_without_linears_still_gives_a_page(tmp_path):
    empty = record()
    empty.linears = []
    save_records([empty], tmp_path)
    assert "Quantized 0 of 0 linears" in page.render(read_directory(tmp_path))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"pip install 'moeq-plugin\[report\]'"):
        page.render(read_directory(write_checkpoint(tmp_path)))
