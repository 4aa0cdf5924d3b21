"""Claim: frames, templates, delay and weights are what the paper says, at every boundary and for every N."""
import pytest
import torch

from interleave import (
    EOS,
    PAD,
    SPECIAL,
    SPEECH,
    TASKS,
    TEXT,
    Vocab,
    build_sequence,
    delay,
    generation_prefix,
    speech_codes,
    speech_frames,
    task_length,
    text_frames,
    training_example,
    undelay,
)


@pytest.mark.parametrize("N", range(1, 10))
def test_undelay_inverts_delay_with_the_tail(N):
    tokens = torch.randint(1, 100, (5 + N - 1, N), generator=torch.Generator().manual_seed(N))
    tokens[5:] = PAD                        # the N-1 pad frames that every segment ends with
    delayed = delay(tokens)
    assert torch.equal(undelay(delayed), tokens)
    assert sorted(delayed.flatten().tolist()) == sorted(tokens.flatten().tolist()), "nothing lost or invented"
    assert all(delayed[t, n] == (tokens[t - n, n] if t >= n else PAD)
               for t in range(len(tokens)) for n in range(N))


def test_the_delay_of_the_picture():
    tokens = torch.tensor([[11, 12, 13], [21, 22, 23], [0, 0, 0], [0, 0, 0]])
    assert delay(tokens).tolist() == [[11, 0, 0], [21, 12, 0], [0, 22, 13], [0, 0, 23]]


def test_without_a_delay_a_frame_is_one_row():
    tokens = torch.randint(1, 9, (6, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(delay(tokens, 0), tokens) and torch.equal(undelay(tokens, 0), tokens)


def test_delay_refuses_to_lose_a_token():
    with pytest.raises(ValueError, match="end the sequence with 2 pad frames"):
        delay(torch.ones(4, 3, dtype=torch.long))


def test_ranges_follow_each_other_as_in_the_published_models():
    opus = Vocab(n_semantic=5000, n_acoustic=1024, n_level=8, n_text=49152)
    assert opus.streams[0] == (256, 5256) and opus.streams[1] == (5256, 6280) and opus.text_start == 13448
    assert opus.size == 62600 and opus.n_stream == 9
    assert Vocab(5000, 0, 0, 100).n_stream == 1 and Vocab(0, 1024, 8, 100).n_stream == 8


@pytest.mark.parametrize("sizes", [(10, 8, 8), (10, 8, 2), (10, 0, 0), (0, 8, 8)])
def test_a_speech_frame_weighs_as_much_as_one_text_token(sizes):
    vocab = Vocab(*sizes, n_text=12)
    weights = vocab.weights(special_weight=10)
    frame = speech_frames(vocab, torch.zeros(1, vocab.n_stream, dtype=torch.long))
    text = text_frames(vocab, [3])
    assert weights[frame].sum() == pytest.approx(1) and weights[text].sum() == 1
    assert weights[PAD] == 0 and weights[EOS] == 10
    if sizes == (10, 8, 8):
        assert weights[frame[0, 0]] == 0.5 and weights[frame[0, 1]] == 0.0625


def test_the_weights_of_a_frame_can_be_others_for_an_ablation(toy):
    """Every token alike, 9 to a frame, is what the paper's weights are against; text stays 1."""
    weights = toy.weights(frame_weight=9, semantic_share=1 / 9)
    frame = speech_frames(toy, torch.zeros(1, 9, dtype=torch.long))
    assert weights[frame].flatten().tolist() == pytest.approx([1.0] * 9) and weights[toy.text_start] == 1


def marks(vocab, tokens):
    """Stream 0 as a string: names of specials, t text, s speech, . pad."""
    names = {SPECIAL["<sos/eos>"]: "E", SPECIAL["<codec_ssl_start>"]: "S", SPECIAL["<text_bpe_start>"]: "T",
             SPECIAL["<spk_start>"]: "P", PAD: "."} | {i: "K" for i in range(64, 128)}
    return "".join(names.get(i, "t" if i >= vocab.text_start else "s") for i in tokens[:, 0].tolist())


def test_templates_are_those_of_the_original(toy, toy_example):
    entries = toy_example(n_frame=3, n_text=2)
    gap = "." * 8
    expected = {"asr": f"EKSsss{gap}TttE{gap}", "tts": f"EKTtt{gap}Pssss{gap}SsssE{gap}",
                "plain_tts": f"EKTtt{gap}SsssE{gap}", "speech": f"EKSsssE{gap}", "text": f"ttE{gap}"}
    assert set(expected) == set(TASKS)
    for task, picture in expected.items():
        tokens, learn, modality = build_sequence(toy, task, entries)
        assert marks(toy, tokens) == picture
        assert len(tokens) == task_length(toy, task, {"speech": 3, "prompt": 4, "text": 2})
        assert learn.all(), "whole: every row may carry a loss"
        last_target = len(tokens) - 9       # eos belongs to its segment
        assert modality[last_target] == (TEXT if task in ("asr", "text") else SPEECH)


def test_loss_region_target_keeps_the_target_segment_with_marker_and_eos(toy, toy_example):
    _, targets, weight, _ = training_example(toy, "asr", toy_example(3, 2), toy.weights(), "target")
    assert targets[weight[:, 0] > 0][:, 0].tolist()[0] == SPECIAL["<text_bpe_start>"]
    assert targets[weight[:, 0] > 0][:, 0].tolist()[-1] == EOS and (weight[:, 1:] == 0).all()
    with pytest.raises(ValueError, match="whole"):
        build_sequence(toy, "asr", toy_example(), "everything")


def test_every_token_but_the_first_is_learned_once(toy, toy_example):
    tokens, _, _ = build_sequence(toy, "tts", toy_example())
    _, targets, weight, _ = training_example(toy, "tts", toy_example(), toy.weights())
    assert (weight > 0).sum() == (tokens != PAD).sum() - 1
    assert torch.equal(weight > 0, targets != PAD)


def test_codes_and_prefixes(toy, toy_example):
    entries = toy_example(5)
    assert torch.equal(speech_frames(toy, speech_codes(toy, entries["speech"])), entries["speech"])
    prefix = generation_prefix(toy, "tts", {"text": entries["text"], "prompt": entries["prompt"]})
    full, _, _ = build_sequence(toy, "tts", entries)
    assert torch.equal(prefix, full[:len(prefix)]) and prefix[-1, 0] == SPECIAL["<codec_ssl_start>"]


def test_recognition_may_read_semantic_tokens_alone_each_once(toy):
    codes = torch.randint(8, (6, 9), generator=torch.Generator().manual_seed(0))
    codes[:, 0] = torch.tensor([3, 3, 5, 5, 5, 3])
    frames = speech_frames(toy, codes, semantic_only=True)
    assert (frames[:, 0] - toy.streams[0][0]).tolist() == [3, 5, 3] and (frames[:, 1:] == PAD).all()
    assert len(speech_frames(toy, codes[:0], semantic_only=True)) == 0
