"""Checkpoints to resume from (fp32 weights, optimizer moments) and exports to use (bf16 shards)."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_SHARD = "15MB"


@dataclass
class Progress:
    """Where training stands: optimizer steps done, index of the stage, its first step, seconds trained."""

    step: int = 0
    stage: int = 0
    seconds: float = 0.0


def save(folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write ``checkpoint.safetensors`` (the progress rides in its header), replacing the last one."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    partial = folder / "checkpoint.partial"
    save_file(tensors, partial, metadata={"progress": json.dumps(asdict(progress))})
    partial.replace(folder / "checkpoint.safetensors")


def load(folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> Progress:
    """Read the checkpoint of ``folder`` into model and optimizer; a fresh ``Progress`` when there is none."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return Progress()
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"weight.{name}"])
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
        if keys:
            moments = {key: tensors[f"{key}.{name}"] for key in keys}
            on = {
                key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()
            }
            optimizer.state[parameter] = on
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return Progress(**json.loads(header["__metadata__"]["progress"]))


def export(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the model in bf16 with its tokenizer, as ``from_pretrained`` reads it."""
    tensors = {name: value.detach().to("cpu", torch.bfloat16) for name, value in model.state_dict().items()}
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(tensors)
    half.save_pretrained(folder, max_shard_size=_SHARD)
    tokenizer.save_pretrained(folder)
