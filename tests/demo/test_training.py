from itertools import islice

import torch

from scripts.demo_model.batch import Batches
from scripts.demo_model.corpus import Corpus, Sample
from scripts.demo_model.muon import orthogonalise
from scripts.demo_model.team import Team
from scripts.demo_model.tokenizer import train_tokenizer


def test_orthogonal_updates_have_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 16, 48), (2, 48, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
        assert values.shape == (2, 16)
        assert values.min() > 0.3
        assert values.max() < 1.5


def test_batches_teach_answers_only() -> None:
    samples = list(islice(Corpus(0), 50))
    texts = [sample.prompt + sample.answer for sample in samples]
    tokenizer = train_tokenizer(texts, vocab_size=600)
    parts = next(iter(Batches(iter(samples), tokenizer, batch_size=50)))
    taught = sorted(
        tokenizer.decode(targets[weights > 0].tolist(), skip_special_tokens=False)
        for part in parts
        for targets, weights in zip(part.targets, part.weights, strict=True)
    )
    assert taught == sorted(sample.answer for sample in samples)


def test_batch_weights_of_a_long_answer_sum_to_the_root_of_its_length() -> None:
    tokenizer = train_tokenizer([], vocab_size=256)
    samples = [Sample("text", "ab", "c" * 9)]
    (part,) = next(iter(Batches(iter(samples), tokenizer, batch_size=1)))
    torch.testing.assert_close(part.weights.sum(), torch.tensor(3.0))


def test_team_shares_all_work_once() -> None:
    shares = [list(Team(rank, 3).share(range(10))) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(10))
