"""``optimum-cli moeq``: quantize a Mixture-of-Experts model and save it in GPTQ format.

The distribution ``moeq-plugin-optimum`` installs it as ``optimum.commands.register.moeq``, where
Optimum looks for commands of others.
"""

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class MoEQuantCommand(BaseOptimumCLICommand):  # type: ignore[misc] # Optimum may not be installed
    """Quantizes every expert, weighted by the router, and lets none starve."""

    COMMAND = CommandInfo(name="moeq", help="quantize a Mixture-of-Experts model to GPTQ format")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the command's arguments."""
        parser.add_argument("model", help="model directory or id")
        parser.add_argument("out", type=Path, help="new directory for the checkpoint")
        parser.add_argument("--bits", type=int, default=4, help="2, 3, 4 or 8")
        parser.add_argument("--group-size", type=int, default=128, help="-1: one scale per output")
        parser.add_argument("--asymmetric", action="store_true", help="with zero points")
        parser.add_argument(
            "--dataset",
            type=Path,
            help="of any kind that moeq quantize reads; default: the model writes it",
        )
        parser.add_argument("--num-calibration-samples", type=int, default=512, help="sequences")
        parser.add_argument("--max-seq-length", type=int, default=2048, help="tokens of each")
        parser.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="run Python code that the model brings along",
        )
        parser.add_argument(
            "--names",
            default="checkpoint",
            choices=["checkpoint", "modules"],
            help="of tensors; GPTQModel reads Mixtral as modules only",
        )

    def run(self) -> None:
        """Load, quantize and save."""
        from transformers import AutoConfig, AutoTokenizer

        from moeq_plugin.files.new_directory import check_new_directory
        from moeq_plugin.integrations.hf.gptq.quantizer import MoEGPTQQuantizer
        from moeq_plugin.models.auto_class import language_class_of
        from moeq_plugin.untrusted.reading import check_model

        check_new_directory(self.args.out)
        quantizer = MoEGPTQQuantizer(
            bits=self.args.bits,
            group_size=self.args.group_size,
            sym=not self.args.asymmetric,
            dataset=self.args.dataset,
            num_calibration_samples=self.args.num_calibration_samples,
            model_seqlen=self.args.max_seq_length,
            names=self.args.names,
        )
        check_model(self.args.model)
        trust = self.args.trust_remote_code
        config = AutoConfig.from_pretrained(self.args.model, trust_remote_code=trust)
        # the class of the whole model: that of its language part would drop what sees and hears
        model = language_class_of(config).from_pretrained(
            self.args.model, dtype="auto", trust_remote_code=trust
        )
        tokenizer = AutoTokenizer.from_pretrained(self.args.model, trust_remote_code=trust)
        quantizer.save(quantizer.quantize_model(model, tokenizer), self.args.out)
        tokenizer.save_pretrained(self.args.out)


REGISTER_COMMANDS = [MoEQuantCommand]
