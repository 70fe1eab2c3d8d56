"""The workshop: tokenizer and weights from the corpus into a folder, by a team of processes.

What a training has made so far is in the folder at any time, so that a stopped one is not lost.
"""

from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import Qwen2ForCausalLM

from .checkpoint import read_figures, save_checkpoint
from .corpus import Corpus
from .report import plot_losses
from .team import Team, run_team
from .tokenizer import save_tokenizer, train_tokenizer
from .train import Recipe, Trained, new_network, train

_TOKENIZER_SAMPLES = 20_000


def make_checkpoint(folder: Path, recipe: Recipe, *, vocab_size: int, num_processes: int) -> None:
    """Fills the folder with all but the README."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = islice(Corpus(recipe.seed), _TOKENIZER_SAMPLES)
    texts = (text for sample in samples for text in (sample.prompt, sample.answer))
    save_tokenizer(train_tokenizer(texts, vocab_size=vocab_size), folder)
    run_team(num_processes, _train, folder, recipe, False)


def continue_checkpoint(folder: Path, recipe: Recipe, *, num_processes: int) -> None:
    """Trains what is in the folder for one more leg, on samples that it has not seen."""
    run_team(num_processes, _train, folder, recipe, True)


def _train(team: Team, folder: Path, recipe: Recipe, is_next_leg: bool) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    trained = _resume(folder, recipe) if is_next_leg else new_network(tokenizer, recipe)
    train(team, tokenizer, trained, keep=lambda trained: _keep(trained, folder))


def _resume(folder: Path, recipe: Recipe) -> Trained:
    figures = read_figures(folder)
    return Trained(
        model=Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32),
        recipe=recipe,
        losses=[float(loss) for loss in figures["losses"].split()],
        num_tokens=int(figures["tokens"]),
        train_s=float(figures["minutes"]) * 60,
        num_legs=int(figures["legs"]) + 1,
    )


def _keep(trained: Trained, folder: Path) -> None:
    save_checkpoint(trained.model, folder, trained.figures())
    plot_losses(trained.losses, folder / "loss.png")
