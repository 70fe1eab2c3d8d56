"""Makes the demo model: `python -m scripts.demo_model --help`."""

import argparse
from pathlib import Path

import torch

from .evaluate import Checkpoint, count_demonstrations, judge
from .report import write_readme
from .train import Recipe
from .workshop import continue_checkpoint, make_checkpoint

_NUM_DEMONSTRATIONS = 20


def main() -> None:
    arguments = _parse()
    recipe = Recipe(seed=arguments.seed, num_steps=arguments.steps, minutes=arguments.minutes)
    if arguments.more:
        continue_checkpoint(arguments.out, recipe, num_processes=arguments.processes)
    elif not arguments.only_evaluate:
        make_checkpoint(
            arguments.out, recipe, vocab_size=arguments.vocab, num_processes=arguments.processes
        )
    _evaluate(arguments.out, arguments.seed)


def _parse() -> argparse.Namespace:
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("serve/demo"))
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--steps", type=int, default=recipe.num_steps)
    parser.add_argument("--minutes", type=float, default=recipe.minutes, help="hard limit")
    parser.add_argument("--vocab", type=int, default=4800, help="learned pieces of the tokenizer")
    parser.add_argument("--processes", type=int, default=2, help="that train, one thread each")
    parser.add_argument("--more", action="store_true", help="train what is there one leg more")
    parser.add_argument("--only-evaluate", action="store_true", help="train nothing")
    return parser.parse_args()


def _evaluate(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)  # small matrices: threads only wait for each other
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
