"""The sizes that RWKV-6 and RWKV-7 have in common, as a transformers configuration."""

from __future__ import annotations

from typing import Any, Self

from transformers import PreTrainedConfig

from moeq_plugin.rwkv.official import Tensors


class RWKVConfig(PreTrainedConfig):
    """Sizes of an RWKV of either version; a version adds its own and its defaults.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: channels; a multiple of ``head_dim``.
        num_hidden_layers: blocks.
        head_dim: channels per head.
        intermediate_size: channels inside the channel mix; ``None`` for the version's default.
        decay_low_rank_dim: rank of the two factors that the decays depend on.
        norm_eps: of the layer norms.
        head_norm_eps: of the norm over each head's output.
        initializer_range: standard deviation of new matrices.
        use_cache: whether the model returns its state by default.
    """

    vocab_size: int = 65536
    hidden_size: int = 768
    num_hidden_layers: int = 12
    head_dim: int = 64
    intermediate_size: int | None = None
    decay_low_rank_dim: int = 64
    norm_eps: float = 1e-5
    head_norm_eps: float = 64e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the sizes.

        Raises:
            ValueError: if the heads do not fill the channels.
        """
        if self.hidden_size % self.head_dim:
            raise ValueError(
                f"hidden_size must be a multiple of head_dim {self.head_dim}, "
                f"got {self.hidden_size}"
            )
        super().__post_init__(**kwargs)

    @classmethod
    def of_tensors(cls, tensors: Tensors) -> Self:
        """Read the sizes of a model from its official tensors.

        Args:
            tensors: by official name. What is missing or too much is not noticed here, but by
                :func:`moeq_plugin.rwkv.official.to_state_dict`.
        """
        raise NotImplementedError
