"""Makes the demo model: `python -m scripts.demo_model --help`."""

import argparse
from itertools import islice
from pathlib import Path

import torch

from .checkpoint import save_checkpoint
from .corpus import Corpus
from .evaluate import Checkpoint, count_demonstrations, judge
from .report import plot_losses, write_readme
from .tokenizer import save_tokenizer, train_tokenizer
from .train import Recipe, train

_TOKENIZER_SAMPLES = 20_000
_NUM_DEMONSTRATIONS = 20


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    if not arguments.only_evaluate:
        arguments.out.mkdir(parents=True, exist_ok=True)
        _make(arguments)
    _evaluate(arguments.out, arguments.seed)


def _parse() -> argparse.Namespace:
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("serve/demo"))
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--steps", type=int, default=recipe.num_steps)
    parser.add_argument("--minutes", type=float, default=recipe.minutes, help="hard limit")
    parser.add_argument("--vocab", type=int, default=4800, help="learned pieces of the tokenizer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only-evaluate", action="store_true", help="train nothing")
    return parser.parse_args()


def _make(arguments: argparse.Namespace) -> None:
    samples = islice(Corpus(arguments.seed), _TOKENIZER_SAMPLES)
    texts = (text for sample in samples for text in (sample.prompt, sample.answer))
    tokenizer = train_tokenizer(texts, vocab_size=arguments.vocab)
    save_tokenizer(tokenizer, arguments.out)
    recipe = Recipe(seed=arguments.seed, num_steps=arguments.steps, minutes=arguments.minutes)
    trained = train(tokenizer, recipe)
    save_checkpoint(trained.model, arguments.out, trained.figures())
    plot_losses(trained.losses, arguments.out / "loss.png")
    print(trained.figures())


def _evaluate(folder: Path, seed: int) -> None:
    checkpoint = Checkpoint(folder)
    verdicts = judge(checkpoint)
    for verdict in verdicts:
        mark = "right" if verdict.is_right else "WRONG"
        print(f"{mark}  {verdict.question.ask}  ->  {verdict.answer[:80]!r}")
    num_right = count_demonstrations(checkpoint, num=_NUM_DEMONSTRATIONS, seed=seed)
    print(f"{sum(verdict.is_right for verdict in verdicts)} of {len(verdicts)} phrasings right")
    print(f"{num_right} of {_NUM_DEMONSTRATIONS} demonstrations right")
    write_readme(folder, verdicts, num_right=num_right, num_asked=_NUM_DEMONSTRATIONS)


if __name__ == "__main__":
    main()
