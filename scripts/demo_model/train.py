"""Training: a Qwen2 network in float32, on answers only, with Muon and Adam.

The schedule follows the steps, or the clock where that is further: on a busy machine training ends
early but cooled down, on an idle one two runs with one seed are equal.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

from .batch import Batches, Part
from .corpus import Corpus
from .muon import Muon
from .team import Team
from .tokenizer import POSITIONS

_VOCAB_MULTIPLE = 64
_WARM_UP = 0.02
_KEEP_STEPS = 100
_TAIL = 50  # steps in the mean that is called the final loss


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how hard to train; `minutes` is a hard limit."""

    seed: int = 20261122
    num_steps: int = 2600
    minutes: float = 58.0
    batch_size: int = 40
    lr: float = 3e-3


@dataclass(slots=True)
class Trained:
    """The network so far and how it got there. `losses` are means per answer token, one a step.

    All but the recipe count the legs before this one too.
    """

    model: Qwen2ForCausalLM
    recipe: Recipe
    losses: list[float] = field(default_factory=list)
    num_tokens: int = 0
    train_s: float = 0.0
    num_legs: int = 1

    def figures(self) -> dict[str, str]:
        """What the checkpoint says about its own making."""
        tail = self.losses[-_TAIL:]
        return {
            "legs": str(self.num_legs),
            "seed": str(self.recipe.seed),
            "steps": str(len(self.losses)),
            "tokens": str(self.num_tokens),
            "tokens_per_second": f"{self.num_tokens / self.train_s:.0f}",
            "minutes": f"{self.train_s / 60:.1f}",
            "final_loss": f"{sum(tail) / len(tail):.4f}",
            "losses": " ".join(f"{loss:.3f}" for loss in self.losses),
        }


@dataclass(frozen=True, slots=True)
class _Leg:
    """Where one leg of a training began."""

    num_steps_before: int
    before_s: float

    def progress(self, trained: Trained) -> float:
        """By the steps, or by the clock where that is further; 1 is the end."""
        by_steps = (len(trained.losses) - self.num_steps_before) / trained.recipe.num_steps
        by_clock = (trained.train_s - self.before_s) / (trained.recipe.minutes * 60)
        return max(by_steps, by_clock)


def new_network(tokenizer: Tokenizer, recipe: Recipe) -> Trained:
    """Returns a network that has learned nothing."""
    torch.manual_seed(recipe.seed)
    return Trained(Qwen2ForCausalLM(network_config(tokenizer)), recipe)


def train(
    team: Team, tokenizer: Tokenizer, trained: Trained, keep: Callable[[Trained], None]
) -> None:
    """Trains one leg; the first member prints the progress and keeps what there is."""
    recipe, leg = trained.recipe, _Leg(len(trained.losses), trained.train_s)
    optimizers = _optimizers(trained.model, recipe.lr, team)
    corpus = Corpus(recipe.seed + trained.num_legs - 1)
    batches = iter(Batches(iter(corpus), tokenizer, batch_size=recipe.batch_size))
    started = time.monotonic()
    progress = 0.0
    while progress < 1:
        parts = next(batches)
        _step(trained, parts, team, leg.before_s + time.monotonic() - started)
        progress = leg.progress(trained)
        scale = min(1.0, progress / _WARM_UP + 0.01) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * max(scale, 0.0)
            optimizer.step()
            optimizer.zero_grad()
        num_steps = len(trained.losses)
        if team.rank == 0 and (num_steps % _KEEP_STEPS == 0 or progress >= 1):
            keep(trained)
        if team.rank == 0 and num_steps % 20 == 0:
            loss = sum(trained.losses[-20:]) / 20
            minutes = trained.train_s / 60
            speed = trained.num_tokens / trained.train_s
            print(
                f"step {num_steps} loss {loss:.4f} {speed:.0f} tok/s {minutes:.1f} min",
                flush=True,
            )


def network_config(tokenizer: Tokenizer) -> Qwen2Config:
    """8 heads, 4 KV heads and an FFN divisible by 4: tensor-parallel sizes 1, 2 and 4 are legal."""
    num_ids = tokenizer.get_vocab_size()
    end, stop = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    return Qwen2Config(
        vocab_size=(num_ids // _VOCAB_MULTIPLE + 1) * _VOCAB_MULTIPLE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=stop,
        eos_token_id=end,
        pad_token_id=stop,
    )


def _optimizers(model: Qwen2ForCausalLM, lr: float, team: Team) -> list[torch.optim.Optimizer]:
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, param in model.named_parameters():
        (matrices if param.ndim == 2 and "embed" not in name else others).append(param)
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [Muon(matrices, lr=lr, team=team, weight_decay=0.05), adam]


def _step(trained: Trained, parts: list[Part], team: Team, elapsed_s: float) -> None:
    """Leaves the team's gradients in the network; the first member's clock counts for all."""
    model = trained.model
    total = float(sum(part.weights.sum() for part in parts))
    sums = torch.zeros(3)  # losses, answer tokens, the first member's seconds
    for part in team.share(parts):
        losses, weights = _losses(model, part)
        ((losses * weights).sum() / total).backward()  # type: ignore[no-untyped-call]
        sums += torch.tensor([float(losses.detach().sum()), len(losses), 0.0])
    if team.rank == 0:
        sums[2] = elapsed_s
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    team.sum([*gradients, sums])
    loss, num_answer_tokens, trained.train_s = sums.tolist()
    trained.losses.append(loss / num_answer_tokens)
    trained.num_tokens += sum(part.num_tokens for part in parts)


def _losses(model: Qwen2ForCausalLM, part: Part) -> tuple[Tensor, Tensor]:
    """The head runs on answer tokens only: it is a fifth of the network."""
    hidden = model.model(input_ids=part.inputs, use_cache=False).last_hidden_state
    is_answer = part.weights > 0
    logits = model.lm_head(hidden[is_answer])
    return cross_entropy(logits, part.targets[is_answer], reduction="none"), part.weights[is_answer]
