"""The training loop: batches in, stages advanced by accuracy, checkpoints and a log out."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_training import checkpoints
from demo_training.batches import Batch, StageData, stream
from demo_training.network import Network
from demo_training.scores import Scores
from demo_training.stages import STAGES

_CONTEXT_WEIGHT = 0.1
_FINAL_RATE = 0.03


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        out: folder of checkpoint, log, tokenizer and exported model.
        seed: of the weights and of all data.
        rate: the highest learning rate.
        steps: optimizer steps in all.
        minutes: when given, training also ends after this time (the schedule follows what ends first).
        warmup: steps of linear warm-up.
        cooldown: share of the training at the end in which the learning rate falls.
        tokens_per_step: tokens of a batch.
        workers: processes that make batches.
        report: steps between log lines, and between looks at the gate.
        gate_scale: multiplies every stage's gate (0 passes all of them: for a trial run).
        save_seconds: seconds between checkpoints, at the least.
        compiled: whether to use torch.compile.
    """

    out: Path
    seed: int
    rate: float
    steps: int
    minutes: float | None = None
    warmup: int = 300
    cooldown: float = 0.4
    tokens_per_step: int = 64512
    workers: int = 15
    report: int = 20
    gate_scale: float = 1.0
    save_seconds: float = 60.0
    compiled: bool = True


class Trainer:
    """Trains one model; ``run`` returns when steps or minutes are used up."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        settings: Settings,
        device: torch.device,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.device = model.to(device), tokenizer, settings, device
        self.network = Network(model, settings.compiled)
        self.optimizer = _optimizer(model, settings.rate, device)
        self.progress = checkpoints.load(settings.out, model, self.optimizer)
        self.scores = Scores(device)

    def run(self) -> None:
        """Train to the end, saving on the way."""
        settings, progress = self.settings, self.progress
        batches = self._batches()
        mark = saved = time.monotonic()
        while self._done() < 1:
            loss = self._step(next(batches))
            progress.step += 1
            if progress.step % settings.report:
                continue
            value = loss.item()
            now = time.monotonic()
            progress.seconds += now - mark
            rate = settings.report / (now - mark)
            mark = now
            self._log(value, rate)
            if self._passed():
                progress.stage += 1
                batches = self._batches()
            self.scores.reset()
            if now - saved > settings.save_seconds:
                self.save()
                saved = mark = time.monotonic()
        self.save()

    def save(self) -> None:
        """Write checkpoint and export."""
        checkpoints.save(self.settings.out, self.model, self.optimizer, self.progress)
        checkpoints.export(self.settings.out / "model", self.model, self.tokenizer)

    def _batches(self) -> Iterator[Batch]:
        stage, settings = STAGES[self.progress.stage], self.settings
        shapes = stage.shapes(settings.tokens_per_step)
        folder, seed = settings.out / "model", f"{settings.seed}/{stage.name}"
        data = StageData(folder, seed, shapes, stage.weights, stage.ruler_share)
        return iter(stream(data, self.progress.step, settings.steps, settings.workers))

    def _step(self, batch: Batch) -> torch.Tensor:
        ids, answers, kinds = (t.to(self.device) for t in (batch.ids, batch.answers, batch.kinds))
        ids = ids.long()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * self._rate_factor()
        with torch.autocast(self.device.type, torch.bfloat16):
            losses, right = self.network(ids)
        loss = weighted_loss(losses, ids, answers)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scores.add(right, answers, kinds)
        return loss.detach()

    def _done(self) -> float:
        """Return how much of the training is over, 0 to 1."""
        settings, progress = self.settings, self.progress
        by_steps = progress.step / settings.steps
        return max(by_steps, progress.seconds / (60 * settings.minutes)) if settings.minutes else by_steps

    def _rate_factor(self) -> float:
        warm = min(1.0, (self.progress.step + 1) / self.settings.warmup)
        left = min(1.0, (1 - self._done()) / self.settings.cooldown)
        fall = _FINAL_RATE + (1 - _FINAL_RATE) * (1 - math.cos(math.pi * max(left, 0.0))) / 2
        return warm * fall

    def _passed(self) -> bool:
        stage = STAGES[self.progress.stage]
        if stage.gate is None:
            return False
        if stage.ruler_share is None:
            accuracy = self.scores.token_accuracy()
        else:
            accuracy = self.scores.by_kind().get("fact", (0, 0.0))[1]
        return accuracy >= stage.gate * self.settings.gate_scale

    def _log(self, loss: float, rate: float) -> None:
        progress = self.progress
        line = {
            "step": progress.step,
            "seconds": round(progress.seconds, 1),
            "stage": STAGES[progress.stage].name,
            "loss": round(loss, 4),
            "steps_per_second": round(rate, 2),
            "tokens_right": round(self.scores.token_accuracy(), 4),
            "answers_right": {kind: round(share, 3) for kind, (_, share) in self.scores.by_kind().items()},
        }
        with (self.settings.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def weighted_loss(losses: torch.Tensor, ids: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over answer tokens plus a tenth of the mean over other tokens (padding aside).

    Args:
        losses: [rows, tokens] loss of predicting the token after each position.
        ids: [rows, tokens] token ids; id 0 is padding.
        answers: [rows, tokens] number of the answer each token belongs to, 0 for none.
    """
    said = torch.nn.functional.pad(answers[:, 1:], (0, 1)) > 0
    given = (torch.nn.functional.pad(ids[:, 1:], (0, 1)) > 0) & ~said
    answer_loss = (losses * said).sum() / said.sum().clamp(min=1)
    context_loss = (losses * given).sum() / given.sum().clamp(min=1)
    return answer_loss + _CONTEXT_WEIGHT * context_loss


def _optimizer(model: LlamaForCausalLM, rate: float, device: torch.device) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=device.type == "cuda")
