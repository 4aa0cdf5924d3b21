"""Claim: a batch is a pure function of (seed, step), nearly full, and its prompts are other utterances."""
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import random_dataset, real_lengths
from config import Config
from data import Dataset, Loader
from interleave import SPECIAL, changes, undelay
from tokenize_text import TextTokenizer

MIXTURE = {"asr": 1.0, "tts": 2.0, "speech": 0.2, "text": 0.2}
SMALL = Config(mixture=MIXTURE, batch_rows=4, row_frames=768, prompt_len=20, seed=3)


@pytest.fixture(scope="module")
def loader(tiny_data):
    return Loader(Dataset(tiny_data, "train"), SMALL)


def test_order_depends_on_seed_and_step_alone(loader, tiny_data):
    first = loader.batch(7)
    loader.batch(2)
    again = Loader(Dataset(tiny_data, "train"), SMALL).batch(7)
    assert torch.equal(first.tokens, again.tokens) and first.lengths == again.lengths
    assert not torch.equal(first.tokens, loader.batch(8).tokens)
    other = Loader(Dataset(tiny_data, "train"), replace(SMALL, seed=4)).batch(7)
    assert not torch.equal(first.tokens, other.tokens)


def test_workers_shares_make_up_the_global_batch(loader):
    """A share may have shorter rows than the whole has: only padding is missing there."""
    whole, shares = loader.batch(5), [loader.batch(5, range(rank, 4, 2)) for rank in range(2)]
    for rank, share in enumerate(shares):
        S = share.tokens.shape[1]
        assert torch.equal(whole.tokens[rank::2, :S], share.tokens)
        assert not whole.tokens[rank::2, S:].any() and not whole.weight[rank::2, S:].any()


def test_rows_are_nearly_full_and_keep_documents_apart(loader):
    for step in range(20):
        batch = loader.batch(step)
        for row, lengths in enumerate(batch.lengths):
            assert sum(lengths) == batch.tokens.shape[1] <= 768
            start = 0
            for length in lengths:
                piece = undelay(batch.tokens[row, start:start + length])
                if piece[0, 0] == SPECIAL["<sos/eos>"]:
                    assert 64 <= piece[1, 0] < 128, "a document begins with eos and its task"
                else:       # text alone, or the padding at the end
                    assert (piece[:, 1:] == 0).all()
                last = batch.targets[row, start + length - 1]
                assert (batch.weight[row, start + length - 1] > 0).equal(last > 0)
                start += length
    plans = [sum(loader.length(task, members) for row in loader.plan(step) for task, members, _ in row)
             for step in range(20)]
    assert np.mean(plans) > 0.9 * 4 * 768
    assert loader.dropped < 0.05 * sum(len(row) for step in range(20) for row in loader.plan(step))


def test_lengths_are_known_before_anything_is_read(tiny_data):
    """What packing counts on is what a document takes, whatever the task reads of the speech."""
    for semantic_asr in (False, True):
        loader = Loader(Dataset(tiny_data, "train"), replace(SMALL, semantic_asr=semantic_asr))
        for task in MIXTURE:
            for i in (0, 5, 70):
                assert len(loader.document(task, [i], 0)[0]) - 1 == loader.length(task, [i])
    counted = [int(changes(loader.dataset[i][0][:, 0]).sum()) for i in range(len(loader.dataset))]
    assert loader.dataset.count_changes().tolist() == counted


def test_recognition_hears_with_gaps_in_training_alone(tiny_data):
    """SpecAugment on tokens: about ten times 2.5 % of the speech become pad, the text and lengths stay."""
    dataset = Dataset(tiny_data, "train")
    plain, masked = (Loader(dataset, replace(SMALL, time_masks=n)) for n in (0, 10))
    unmasked = Loader(dataset, replace(SMALL, time_masks=10), held_out=True)
    gone = []
    for i in range(40):
        whole, gaps, heard = (loader.document("asr", [i], i)[0] for loader in (plain, masked, unmasked))
        differ = (whole != gaps).any(-1)
        T = len(dataset[i][0])
        assert (gaps[differ] == 0).all() and not differ[:3].any() and not differ[3 + T:].any()
        gone.append(float(differ.sum()) / T)
        assert torch.equal(gaps, masked.document("asr", [i], i)[0]), "the same gaps each time, for a seed"
        assert torch.equal(whole, heard), "an evaluation hears it whole"
        assert torch.equal(plain.document("tts", [i], i)[0], masked.document("tts", [i], i)[0])
    assert 0.1 < np.mean(gone) < 0.25


def test_an_example_as_long_as_a_row_is_drawn_too(tiny_data):
    """Rows as long as the longest example, one in a step: no step is empty, and what is joined still fits."""
    dataset = Dataset(tiny_data, "train")
    config = Config(mixture={"asr": 1}, batch_rows=1, row_frames=4096)
    sizes = [Loader(dataset, config).length("asr", [i]) for i in range(len(dataset))]
    for joined in (0, 4000):
        loader = Loader(dataset, replace(config, row_frames=max(sizes), recombine_frames=joined))
        plans = [loader.plan(step) for step in range(400)]
        assert all(row for plan in plans for row in plan)
        if joined:
            members = [loader.members("asr", i, seed) for i in range(20) for seed in range(20)]
            assert max(map(len, members)) > 1
            assert max(loader.length("asr", some) for some in members) <= max(sizes)
        else:
            assert {i for plan in plans for row in plan for _, [i], _ in row if sizes[i] > 0.97 * max(sizes)}


def test_tasks_come_in_the_mixture_that_was_asked_for(loader):
    counts = dict.fromkeys(MIXTURE, 0)
    for step in range(100):
        for row in loader.plan(step):
            for task, *_ in row:
                counts[task] += 1
    total = sum(counts.values())
    for task, weight in MIXTURE.items():
        assert counts[task] / total == pytest.approx(weight / sum(MIXTURE.values()), abs=0.05)


def test_a_prompt_is_of_the_same_speaker_and_another_utterance(loader):
    dataset, rng = loader.dataset, np.random.default_rng(0)
    codes_of = {i: dataset[i][0] for i in dataset.by_speaker[dataset.speakers == dataset.index[0, 4]]}
    for _ in range(20):
        prompt = dataset.draw_prompt(0, 20, rng)
        assert len(prompt) <= 20
        holders = [i for i, codes in codes_of.items() for s in range(len(codes) - len(prompt) + 1)
                   if np.array_equal(codes[s:s + len(prompt)], prompt)]
        assert holders and holders[0] != 0


def test_impossible_wishes_are_explained(loader, tiny_data):
    with pytest.raises(ValueError, match="unknown task 'sing'"):
        Loader(loader.dataset, replace(SMALL, mixture={"sing": 1.0}))
    with pytest.raises(ValueError, match="raise row_frames"):
        Loader(loader.dataset, replace(SMALL, row_frames=64))
    longest = Loader(loader.dataset, replace(SMALL, row_frames=64), held_out=True).row_frames
    lengths = [loader.length(task, [i]) for task in MIXTURE for i in range(len(loader.dataset))]
    assert longest == max(lengths), "an evaluation takes them as they are"


def test_the_loader_feeds_a_fast_gpu_from_one_core(tmp_path):
    """Some 1M frames a second, measured with bench.py; here at least half of that, the best of several."""
    torch.set_num_threads(1)
    loader = Loader(random_dataset(str(tmp_path), real_lengths(300)),
                    Config(mixture={"asr": 1, "tts": 1}, batch_rows=4, row_frames=8192, prompt_len=500))
    speeds = []
    for step in range(12):
        began = time.perf_counter()
        n = loader.batch(step).n_frame
        speeds.append(n / (time.perf_counter() - began))
    assert max(speeds) > 0.5e6, f"{max(speeds):.0f} frames/s"


def test_random_utterances_of_a_speaker_may_become_one(tiny_data):
    """Then no sentence comes twice. Texts are written as if they had always been one; the voice prompt is
    none of them."""
    dataset = Dataset(tiny_data, "train")
    dataset.index[:, 4] = np.arange(len(dataset)) // 10         # speakers with ten utterances each
    dataset.by_speaker, dataset.speakers = np.arange(len(dataset)), dataset.index[:, 4]
    tokenizer = TextTokenizer.load(f"{tiny_data}/text_tokenizer")
    loader = Loader(dataset, replace(SMALL, row_frames=1024, recombine_frames=400))
    drawn = [loader.members("asr", 3, seed) for seed in range(20)]
    assert len(set(map(tuple, drawn))) > 10 and max(map(len, drawn)) > 2
    for seed, members in enumerate(drawn):
        assert members[0] == 3 and {k // 10 for k in members} == {0}, "one speaker"
        assert len(members) == 1 or sum(len(dataset[k][0]) for k in members) <= 400
        tokens = loader.document("asr", members, seed)[0]
        ids = tokens[tokens[:, 0] >= dataset.vocab.text_start, 0] - dataset.vocab.text_start
        assert tokenizer.decode(ids) == " ".join(dataset.info["text"][k] for k in members)
        assert len(tokens) - 1 == loader.length("asr", members)
    assert loader.members("speech", 3, 0) == [3], "only where there is a text"
    members = [3, 5, 5, 8]
    prompts = {dataset.draw_prompt(3, 10 ** 6, np.random.default_rng(seed), members).tobytes()
               for seed in range(100)}
    others = set(range(10)) - set(members)
    assert prompts == {dataset[k][0].tobytes() for k in others}, "all of the others, and no more"
