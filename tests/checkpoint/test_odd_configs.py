"""Values that are odd in one config and sound in another."""

import pytest

from moeq_plugin.checkpoint.checks.config_values import check_config_values


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"rms_norm_eps": 1e-6}, []),
        ({"rms_norm_eps": None, "layer_norm_eps": 1e-5}, []),  # Cohere's: other norms
        ({"rms_norm_eps": None}, ["rms_norm_eps"]),
        ({"rms_norm_eps": None, "layer_norm_eps": "1e-5"}, ["rms_norm_eps", "layer_norm_eps"]),
        ({"head_dim": 0, "qk_rope_head_dim": 0}, []),  # of latent attention: none of it is turned
        ({"head_dim": 0, "qk_rope_head_dim": 64}, ["head_dim"]),
        ({"head_dim": 0}, ["head_dim"]),
        ({"head_dim": -2, "qk_rope_head_dim": 0}, ["head_dim"]),
        ({"hidden_size": 0, "qk_rope_head_dim": 0}, ["hidden_size"]),
    ],
)
def test_what_a_value_means_depends_on_the_others(values, keys):
    found = check_config_values({"model_type": "of_a_stranger", **values})
    assert [finding.where for finding in found] == [f"config.json: {key}" for key in keys]
