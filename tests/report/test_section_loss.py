import pytest
from written_checkpoint import traces

from moeq_plugin.report.section_loss import loss_section


def test_losses_are_means_over_experts_with_their_range(found):
    section = loss_section(found)
    shown = traces(section, "losses")["experts.up_proj"]
    losses = [
        x.loss for x in found.linears if ".1." in x.name[:16] and "up_proj" in x.name and x.loss
    ]
    mean = sum(losses) / len(losses)
    assert shown["y"][1] == pytest.approx(mean)
    assert shown["error_y"]["array"][1] == pytest.approx(max(losses) - mean)
    assert shown["error_y"]["arrayminus"][1] == pytest.approx(mean - min(losses))
    assert section.parts[-1].rows[0][0] == "model.layers.2.mlp.experts.7.down_proj"


def test_ranges_of_many_layers_are_told_on_hover_only(found):
    linears = found.records[0].linears
    last = linears[-1]
    linears.append(
        last.__class__(**{**vars(last), "name": last.name.replace("layers.2", "layers.20")})
    )
    section = loss_section(found)
    shown = traces(section, "losses")["experts.up_proj"]
    assert "error_y" not in shown
    assert " to " in shown["hovertext"][1]
    assert "bars reach" not in section.charts[0].caption


def test_without_losses_there_is_a_sentence(found):
    found.records = []
    assert loss_section(found).charts == []
    assert loss_section(found).missing
