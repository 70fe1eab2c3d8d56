"""Training: a Qwen2 network in float32, on answers only, with Muon and Adam.

The schedule follows the steps, or the clock where that is further: on a busy machine training ends
early but cooled down, on an idle one two runs with one seed are equal.
"""

import math
import time
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

from .batch import Batches, Part
from .corpus import Corpus
from .muon import Muon
from .tokenizer import POSITIONS

_VOCAB_MULTIPLE = 64
_WARM_UP = 0.02
_TAIL = 50  # steps in the mean that is called the final loss


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how hard to train; `minutes` is a hard limit."""

    seed: int = 20261122
    num_steps: int = 2000
    minutes: float = 45.0
    batch_size: int = 40
    lr: float = 3e-3


@dataclass(frozen=True, slots=True)
class Trained:
    """The network and how it got there. `losses` are means per answer token, one a step."""

    model: Qwen2ForCausalLM
    losses: list[float]
    num_tokens: int
    train_s: float
    recipe: Recipe

    def figures(self) -> dict[str, str]:
        """What the checkpoint says about its own making."""
        tail = self.losses[-_TAIL:]
        return {
            "seed": str(self.recipe.seed),
            "steps": str(len(self.losses)),
            "tokens": str(self.num_tokens),
            "tokens_per_second": f"{self.num_tokens / self.train_s:.0f}",
            "minutes": f"{self.train_s / 60:.1f}",
            "final_loss": f"{sum(tail) / len(tail):.4f}",
        }


def train(tokenizer: Tokenizer, recipe: Recipe) -> Trained:
    """Trains a new network; prints its progress."""
    torch.manual_seed(recipe.seed)
    model = Qwen2ForCausalLM(network_config(tokenizer))
    optimizers = _optimizers(model, recipe.lr)
    batches = iter(Batches(iter(Corpus(recipe.seed)), tokenizer, batch_size=recipe.batch_size))
    losses: list[float] = []
    num_tokens, started = 0, time.monotonic()
    while (progress := _progress(len(losses), time.monotonic() - started, recipe)) < 1:
        scale = min(1.0, progress / _WARM_UP + 0.01) * (0.5 + 0.5 * math.cos(math.pi * progress))
        parts = next(batches)
        num_tokens += sum(part.num_tokens for part in parts)
        losses.append(_step(model, parts))
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad()
        if len(losses) % 20 == 0:
            elapsed = time.monotonic() - started
            mean = sum(losses[-20:]) / 20
            print(
                f"step {len(losses)} loss {mean:.4f} {num_tokens / elapsed:.0f} tok/s "
                f"{elapsed / 60:.1f} min",
                flush=True,
            )
    return Trained(model, losses, num_tokens, time.monotonic() - started, recipe)


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
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=stop,
    )


def _progress(num_steps: int, elapsed_s: float, recipe: Recipe) -> float:
    return max(num_steps / recipe.num_steps, elapsed_s / (recipe.minutes * 60))


def _optimizers(model: Qwen2ForCausalLM, lr: float) -> list[tuple[torch.optim.Optimizer, float]]:
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, param in model.named_parameters():
        (matrices if param.ndim == 2 and "embed" not in name else others).append(param)
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [(Muon(matrices, lr=lr, weight_decay=0.05), lr), (adam, lr)]


def _step(model: Qwen2ForCausalLM, parts: list[Part]) -> float:
    """Adds the gradients of one step; returns the mean loss per answer token."""
    total = float(sum(part.weights.sum() for part in parts))
    loss_sum, num_answer_tokens = 0.0, 0
    for part in parts:
        losses, weights = _losses(model, part)
        ((losses * weights).sum() / total).backward()  # type: ignore[no-untyped-call]
        loss_sum += float(losses.detach().sum())
        num_answer_tokens += len(losses)
    return loss_sum / num_answer_tokens


def _losses(model: Qwen2ForCausalLM, part: Part) -> tuple[Tensor, Tensor]:
    """The head runs on answer tokens only: it is a fifth of the network."""
    hidden = model.model(input_ids=part.inputs, use_cache=False).last_hidden_state
    is_answer = part.weights > 0
    logits = model.lm_head(hidden[is_answer])
    return cross_entropy(logits, part.targets[is_answer], reduction="none"), part.weights[is_answer]
