"""Train the bundled demo model: tokenizer, curriculum, export and closing exam.

    python tools/train_demo_model.py --out runs/demo

The same settings on the same machine make the same data and the same schedule. A run that was stopped goes
on from its checkpoint when it is started again with the same ``--out``. The settings that are not given are
those of the bundled weights; ``docs/demo-model.md`` says how they came about.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from demo_training import tokenizer as tokenizers  # noqa: E402
from demo_training.exam import sit_exam  # noqa: E402
from demo_training.network import Network, build_model  # noqa: E402
from demo_training.training import Settings, Trainer  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of checkpoint, log and exported model"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6, help="query heads of 64")
    parser.add_argument("--kv-heads", type=int, default=3, help="key and value heads of 64")
    parser.add_argument("--rate", type=float, default=2e-3, help="the highest learning rate")
    parser.add_argument("--steps", type=int, default=15260)
    parser.add_argument("--minutes", type=float, help="end after this time even if steps are left")
    parser.add_argument("--tokens-per-step", type=int, default=64512)
    parser.add_argument("--workers", type=int, default=15, help="processes that make batches")
    parser.add_argument("--report", type=int, default=20, help="steps between log lines")
    parser.add_argument(
        "--gate-scale", type=float, default=1.0, help="0 passes every stage at once (trial run)"
    )
    parser.add_argument("--exam-tokens", type=int, nargs="*", default=[2048, 4096, 8192])
    parser.add_argument("--exam-documents", type=int, default=512)
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def build_config(arguments: argparse.Namespace) -> LlamaConfig:
    """Return the model's configuration."""
    return LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=64,
        max_position_embeddings=tokenizers.MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=tokenizers.PAD,
        bos_token_id=tokenizers.BEGIN,
        eos_token_id=tokenizers.END,
    )


def prepare_tokenizer(folder: Path, arguments: argparse.Namespace) -> PreTrainedTokenizerFast:
    """Load the tokenizer of an earlier run, or train it and save it at once for the data workers."""
    if not (folder / "tokenizer.json").exists():
        tokenizers.train_tokenizer(seed=0, vocabulary=arguments.vocabulary).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def main() -> None:
    """Train, export, sit the exam."""
    arguments = parse_arguments()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = arguments.out / "model"
    tokenizer = prepare_tokenizer(folder, arguments)
    model = build_model(build_config(arguments), arguments.seed)
    settings = Settings(
        arguments.out, arguments.seed, arguments.rate, arguments.steps, arguments.minutes,
        tokens_per_step=arguments.tokens_per_step, workers=arguments.workers, report=arguments.report,
        gate_scale=arguments.gate_scale, compiled=not arguments.no_compile,
    )  # fmt: skip
    trainer = Trainer(model, tokenizer, settings, device)
    trainer.run()
    lengths = tuple(arguments.exam_tokens)
    records = sit_exam(
        Network(model, compiled=False),
        folder,
        lengths,
        arguments.exam_documents,
        arguments.tokens_per_step,
        arguments.workers,
    )
    (arguments.out / "exam.json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
