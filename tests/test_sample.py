"""Claim: decoding emits only what each stream may say, keeps the delay, and answers from the command line."""
import copy
import dataclasses
import io
import json
import os
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, run_here

from attention import KVCache
from config import load_config
from data import Dataset
from decode import beam_search, generate, pick, prepare_for_decoding, step
from eval import evaluate, listening, perplexities, table
from explain import explain_tts
from heads import stream_logits
from interleave import EOS, PAD, SPEECH, TEXT, delay, generation_prefix, speech_codes
from model import Model, ModelConfig
from sample import write_stream
from speaker import Speaker, cut_text
from tokenize_audio import cut_wav
from train import train


@pytest.fixture(scope="module")
def model(toy):
    config = ModelConfig(toy.size, toy.streams, toy.text, n_layer=2,
                          n_head=2, n_kv_head=1, d_model=32, d_ff=64)
    return prepare_for_decoding(Model(config).init_weights(torch.Generator().manual_seed(0)))


def test_each_stream_only_says_its_own_ids(toy, toy_example, model):
    """At a temperature so high that every allowed id is drawn, none of another stream or modality appears."""
    nothing = {"speech": toy_example()["speech"][:0]}
    prefixes = [generation_prefix(toy, "tts", toy_example(5, 2 + i, seed=i) | nothing) for i in range(8)]
    generator = torch.Generator().manual_seed(0)
    options = (20, 5, 100.0, 100.0, 1000, generator)
    drawn = torch.cat([frames for frames, _ in generate(model, toy, prefixes, SPEECH, *options)])
    for n, (start, end) in enumerate(toy.streams):
        assert set(drawn[:, n].tolist()) == set(range(start, end)), f"stream {n}"
    text = torch.cat([frames for frames, _ in generate(model, toy, prefixes, TEXT, *options)])
    assert set(text[:, 0].tolist()) == set(range(toy.text_start, toy.size)) and (text[:, 1:] == PAD).all()
    assert EOS not in drawn


@pytest.mark.parametrize("by, guidance", [(1, 1.0), (0, 1.0), (1, 3.0)])
def test_greedy_decoding_is_the_argmax_of_the_full_forward(by, guidance, toy, toy_example, model):
    """We decode, then feed the whole delayed sequence at once: every token must be the best of its mask.
    Without a delay too, where a frame's tokens all come at once; and with guidance, which weighs two whole
    sequences, with a text and a voice before the speech and without."""
    toy, nothing = dataclasses.replace(toy, delay=by), {"speech": toy_example()["speech"][:0]}
    prefixes = [generation_prefix(toy, "tts", toy_example(4, n, seed=n) | nothing) for n in (2, 5)]
    free = generation_prefix(toy, "speech", {})
    found = generate(model, toy, prefixes, SPEECH, 12, 12, unguided=free, guidance=guidance)
    assert len(found) == 2
    if guidance != 1:
        plain = generate(model, toy, prefixes, SPEECH, 12, 12)
        assert not torch.equal(found[0][0], plain[0][0]), "it changes what is said"
    tail = torch.full((8, 9), PAD)
    tail[0, 0] = EOS

    def scores(prefix, frames, t, n):
        delayed = delay(torch.cat([prefix, frames, tail]), by)
        row = len(prefix) + t + by * n - 1                          # predicts the delayed row of this token
        return stream_logits(model, model(delayed, [len(delayed)])[row], n, slice(*toy.streams[n]))

    for prefix, (frames, _) in zip(prefixes, found):
        assert len(frames) == 12
        for t in range(len(frames)):
            for n, (start, _) in enumerate(toy.streams):
                given, unguided = scores(prefix, frames, t, n), scores(free, frames, t, n)
                assert frames[t, n] == start + (guidance * given + (1 - guidance) * unguided).argmax()


def test_a_beam_finds_the_likeliest_text(toy, toy_example, model):
    """One beam is greedy decoding; so many that none is lost find what trying everything finds."""
    prefix = generation_prefix(toy, "asr", {"speech": toy_example(6)["speech"]})
    [(greedy, ended)] = generate(model, toy, [prefix], TEXT, 5, 0)
    found, found_end = beam_search(model, toy, prefix, TEXT, 5, 1)
    assert torch.equal(found, greedy) and not ended and not found_end
    table = [EOS, *range(*toy.text)]

    def after(ids):
        rows = torch.zeros(len(ids), toy.n_stream, dtype=torch.long)
        rows[:, 0] = torch.tensor(ids)
        hidden = model(delay(torch.cat([prefix, rows])), [len(prefix) + len(ids)])[-1]
        return stream_logits(model, hidden, 0, slice(0, toy.size))[table].log_softmax(0)

    best = (-1e9, None)
    for first in table[1:]:
        for ids in ([first], *([first, second] for second in table[1:])):
            chain = [*ids, EOS]
            total = sum(float(after(chain[:k])[table.index(chain[k])]) for k in range(len(chain)))
            best = max(best, (total / len(chain), ids))
    best = max(best, (float(after([])[0]), []))
    found, ended = beam_search(model, toy, prefix, TEXT, 3, 200)
    assert ended and found[:, 0].tolist() == best[1]


def test_continuing_speech_keeps_the_acoustic_tokens_that_were_due(toy, toy_example, model):
    speech = toy_example(6)["speech"]
    prefix = generation_prefix(toy, "speech", {"speech": speech})
    [(frames, ended)] = generate(model, toy, [prefix], SPEECH, 4, 4)
    assert torch.equal(prefix[-6:], speech) and len(frames) == 4 and not ended
    codes = speech_codes(toy, frames)
    assert (codes >= 0).all() and codes[:, 0].max() < 10 and codes[:, 1:].max() < 8


def test_top_k_and_temperature():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).expand(500, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(pick(logits, 1.0, 2, generator).tolist()) == {1, 2} and set(pick(logits, 0, 4).tolist()) == {1}
    few = pick(logits, 1.0, 4, generator, top_p=0.7)        # 3.0 has 64 % of the probability, 2.0 another 24
    assert set(few.tolist()) == {1, 2} and set(pick(logits, 1.0, 4, generator, top_p=0.6).tolist()) == {1}
    cold, hot = ((pick(logits, t, 4, generator) == 1).float().mean() for t in (0.3, 3.0))
    assert cold > 0.9 > 0.6 > hot


@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
def test_the_fast_step_is_the_plain_one_also_for_ragged_prompts(model_type, toy, toy_example):
    """Joint products and small norms change the order of additions, nothing else; int8 stays close."""
    config = ModelConfig(toy.size, toy.streams, toy.text, n_layer=2, n_head=4, n_kv_head=2, d_model=64,
                         d_ff=96, model_type=model_type)
    plain = Model(config).init_weights(torch.Generator().manual_seed(0)).requires_grad_(False)
    for name, p in plain.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    tokens = torch.stack([delay(generation_prefix(toy, "asr", toy_example(9, 3, seed=i))) for i in range(2)])
    start = torch.tensor([7, 4])
    outputs = {}
    for kind in ("plain", "", "int8"):
        model = plain if kind == "plain" else prepare_for_decoding(copy.deepcopy(plain), kind)
        cache, hidden = KVCache(config, 2, 20), []
        model.extend(tokens[:, :7], cache, torch.zeros(2, dtype=torch.long))
        for t in range(3):
            row = torch.stack([tokens[b, start[b] + t] for b in range(2)])
            hidden.append(step(model, row, cache, start + t) if kind != "plain" else
                          model.extend(row[:, None], cache, start + t)[:, 0])
        outputs[kind] = torch.stack(hidden)
    torch.testing.assert_close(outputs[""], outputs["plain"], rtol=1e-5, atol=1e-5)
    error = (outputs["int8"] - outputs["plain"]).norm() / outputs["plain"].norm()
    assert 0 < error < 0.05


def test_streamed_speech_is_the_speech_in_pieces(tiny_run, tiny_data, monkeypatch):
    """75 frames, with no end before, in pieces of at least 10."""
    speaker, codes = Speaker(tiny_run, dtype="float32"), Dataset(tiny_data, "unseen")[0][0]
    monkeypatch.setattr(speaker, "speech_options", lambda g, texts: dict(
        modality=SPEECH, max_frames=[75], min_frames=75, temperature=0.5, acoustic_temperature=0.5,
        top_k=10, generator=g))
    text = "seven three five"
    [(whole, _)] = speaker.synthesise([text], [codes], torch.Generator().manual_seed(3))
    pieces = list(speaker.synthesise_stream([text], codes, torch.Generator().manual_seed(3), chunk=10))
    assert len(pieces) == 8 and sum(map(len, pieces)) == len(whole) * 320 == 24000
    loud = lambda wav: np.sqrt(np.square(wav[:len(wav) // 320 * 320].reshape(-1, 320)).mean(1))
    streamed, at_once = loud(np.concatenate(pieces)), loud(speaker.decode(whole))
    alike = {shift: np.corrcoef(np.roll(streamed, shift), at_once)[0, 1] for shift in range(-3, 4)}
    assert max(alike, key=alike.get) == 0 and alike[0] > 0.7, "the same sound, frame by frame"

    def goes_on():      # a codec that needs no overlap gets every frame once
        return lambda codes: np.repeat(np.asarray(codes)[:, 1], 320)

    monkeypatch.setattr(speaker.tokenizer, "start_decoding", goes_on)
    pieces = list(speaker.synthesise_stream([text], codes, torch.Generator().manual_seed(3), chunk=10))
    assert np.array_equal(np.concatenate(pieces), np.repeat(np.asarray(whole)[:, 1], 320))
    heard = []          # a long text goes in parts, as texts do, a breath between, and says whether all ended
    monkeypatch.setattr(speaker, "stream_part", lambda part, *_: (heard.append(part), (yield np.ones(5)))
                        and part.startswith("no"))
    pieces = speaker.synthesise_stream(["no. " * 60 + "yes. " * 9, "no more"], codes)
    lengths = []
    with pytest.raises(StopIteration) as end:
        while True:
            lengths.append(len(next(pieces)))
    assert lengths == [5, 1600, 5, 1600, 5] and " ".join(heard) == "no. " * 60 + "yes. " * 9 + "no more"
    assert end.value.value is True


def test_long_texts_and_long_speech_go_in_pieces():
    text = "A first sentence, with a comma. A second one! And then a third, which is long and has no end"
    pieces = cut_text(text, 40)
    assert pieces == ["A first sentence, with a comma.", "A second one!", "And then a third,",
                      "which is long and has no end"]
    assert " ".join(cut_text(text, 9)).split() == text.split(), "no word is lost, be it ever so long"
    wav = np.random.default_rng(0).uniform(-1, 1, 16000 * 5).astype(np.float32)
    wav[26000:30000] = 0
    pieces = cut_wav(wav, 2.0)
    assert np.array_equal(np.concatenate(pieces), wav) and max(map(len, pieces)) <= 32000
    wav[31000:32100] = 0
    assert min(map(len, cut_wav(wav[:32100], 2.0))) >= 1024, "a rest too short to be read is not cut off"
    assert 26000 <= len(pieces[0]) <= 30000, "cut where it is quiet"


def test_the_best_sample_is_what_the_model_itself_reads_best(tiny_run, tiny_data, monkeypatch):
    speaker, dataset = Speaker(tiny_run, dtype="float32"), Dataset(tiny_data, "seen")
    codes = dataset[0][0]
    samples = [(codes[:9], False), (codes[:10], False), (codes[:11], True), (codes[:12], True)]
    monkeypatch.setattr(speaker, "synthesise", lambda texts, prompts, generator: samples)
    monkeypatch.setattr(speaker, "transcribe", lambda codes: ["one", "one two", "one two", "three"])
    [best], wrong = speaker.synthesise_best(["One two"], [None], 4)
    assert len(best[0]) == 11 and wrong == [0.0], "as right as another, but it came to an end"

    class Judge:            # an external one, to whom only the last sample is right, in its own spelling
        def hear(self, wav):
            return "1-2!" if len(wav) == 12 else "three"

    monkeypatch.setattr(speaker, "decode", lambda codes: codes[:, 0])
    [best], wrong = speaker.synthesise_best(["one two"], [None], 4, whisper=Judge())
    assert len(best[0]) == 12 and wrong == [0.0]


def test_guidance_leads_away_from_what_the_model_would_say_of_itself(tiny_run, tiny_data):
    """So it must have learned to speak without text and voice; if not, we say so."""
    speaker, prompt = Speaker(tiny_run), Dataset(tiny_data, "unseen")[0][0]
    speaker.config.guidance = 2.0
    [(codes, _)] = speaker.synthesise(["seven three"], [prompt])
    assert codes.shape[1] == 9 and (codes >= 0).all()
    speaker.config.mixture = {"tts": 1.0}
    with pytest.raises(ValueError, match="a little of the task speech"):
        speaker.synthesise(["seven three"], [prompt])
    start = generation_prefix(speaker.vocab, "speech", {})
    with pytest.raises(ValueError, match="guidance away from what"):
        generate(speaker.model, speaker.vocab, [start], SPEECH, 5, guidance=2.0)


def test_batches_decode_like_single_utterances(tiny_run, tiny_data):
    speaker, dataset = Speaker(tiny_run, dtype="float32"), Dataset(tiny_data, "seen")
    codes = [dataset[i][0] for i in range(4)]
    assert speaker.transcribe(codes) == [text for one in codes for text in speaker.transcribe([one])]
    wavs = [speaker.decode(one) for one in codes[:3]]
    wavs[1] = np.concatenate([*wavs] * 8)                       # longer than a piece
    assert len(wavs[1]) > 16000 * speaker.config.max_audio_s
    assert speaker.transcribe_wavs(wavs) == [read for wav in wavs for read in speaker.transcribe_wavs([wav])]


def test_a_text_that_goes_in_circles_is_cut_at_what_one_can_say_in_the_time(tiny_run, tiny_data, monkeypatch):
    """25 letters a second, though a token of a base LLM has several; one that ends by itself stays whole."""
    codes, ended = [Dataset(tiny_data, "seen")[i][0] for i in range(2)], [False, True]
    speaker = Speaker(tiny_run)
    monkeypatch.setattr("speaker.generate", lambda model, vocab, prefixes, modality, limits: [
        (np.zeros((limit, 9), int), end) for limit, end in zip(limits, ended)])
    monkeypatch.setattr(speaker, "text", lambda frames: "and on " * len(frames))
    order = sorted(range(2), key=lambda i: len(codes[i]))
    read = speaker.recognise(codes)
    assert [read[i][1] for i in order] == ended
    assert len(read[order[0]][0]) == len(codes[order[0]]) // 2 + 8
    assert len(read[order[1]][0]) == 7 * (len(codes[order[1]]) // 2 + 8)


def test_bfloat16_halves_the_weights_and_reads_about_the_same(tiny_run, tiny_data):
    models = {dtype: Speaker(tiny_run, dtype=dtype) for dtype in ("float32", "bfloat16")}
    bytes_of = {dtype: sum(p.nbytes for p in speaker.model.parameters()) for dtype, speaker in models.items()}
    assert bytes_of["float32"] == 2 * bytes_of["bfloat16"]
    loss = {}
    for dtype, speaker in models.items():
        loss[dtype], low, high = perplexities(speaker, Dataset(tiny_data, "seen"))[0]["tts semantic"]
        assert low < loss[dtype] < high
    assert loss["bfloat16"] == pytest.approx(loss["float32"], rel=0.02)
    assert loss["bfloat16"] != loss["float32"]
    assert len(models["bfloat16"].transcribe([Dataset(tiny_data, "seen")[0][0]])) == 1


@pytest.mark.parametrize("task", ["asr", "tts"])
def test_listening_compares_what_is_given_with_anothers(task, tiny_run, tiny_data):
    """Transcripts that all follow the same speech cost the same, and speech that all follows the same text:
    the model can't heed what does not differ. With their own they do not cost the same."""
    speaker, dataset = Speaker(tiny_run, dtype="float32"), Dataset(tiny_data, "seen")
    dataset.vocab = speaker.vocab
    found = listening(speaker, dataset, task)
    assert found["own"] != found["other"] and 1 < found["own"] < 30

    class AllGivenTheSame:
        info, draw_prompt, paired = dataset.info, dataset.draw_prompt, dataset.paired
        __len__ = lambda self: len(dataset)
        __getitem__ = lambda self, i: (dataset[0 if task == "asr" else i][0],
                                       dataset[i if task == "asr" else 0][1], 0)

    same = listening(speaker, AllGivenTheSame(), task)
    assert same["own"] == same["other"]


def test_a_model_of_one_voice_needs_no_prompt(tiny_flags, tiny_data, tmp_path):
    """Of a model that learned plain_tts alone nothing asks for tts, which it does not know."""
    run = str(tmp_path / "one")
    train(load_config([*tiny_flags, f"--out_dir={run}", "--max_steps=3", "--max_speech_s=0.6",
                       "--mixture={'asr': 1, 'plain_tts': 1}"]), tiny_data)
    found = evaluate(run, n=3)
    speaker = Speaker(run)
    assert not speaker.ids("SEVEN").equal(speaker.ids("seven"))
    speaker.config.lower = True
    assert speaker.ids("SEVEN").equal(speaker.ids("seven")), "texts are given as the transcripts were"
    assert found["tts"]["own_asr"]["n"] == 3 and set(found["listening"]) == {"asr", "plain_tts"}
    assert "plain_tts acoustic8" in found["perplexity"]["seen"] and "after its own text" in table(found)
    speaker = Speaker(run)
    wav, about = speaker.speak("seven", None)
    assert len(wav)
    with pytest.raises(ValueError, match="leave the voice prompt away"):
        speaker.speak("seven", Dataset(tiny_data, "seen")[0][0])
    page, _ = explain_tts(speaker, "seven three two", None, torch.Generator().manual_seed(1))
    assert page.count("<audio") == 1


def test_a_player_gets_bare_samples_as_they_come(monkeypatch, capsys):
    """`tts --stream --out - | aplay -r 16000 -f S16_LE`: nothing but samples on stdout."""
    out = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", out)
    def pieces():
        yield np.array([0.0, 1.0])
        yield np.array([-2.0])
        return True

    write_stream("-", pieces())
    assert out.buffer.getvalue() == np.array([0, 32767, -32767], "<i2").tobytes()
    said = capsys.readouterr().err
    assert "the first after" in said and "ended by itself" in said


def test_the_command_line_speaks_and_listens(tiny_run, tiny_data, tmp_path, monkeypatch):
    voice = Dataset(tiny_data, "unseen").info["audio"][0]
    out = str(tmp_path / "x.wav")

    def call(*arguments):
        return run_here(ROOT / "sample.py", tiny_run, *arguments)

    assert len(call("asr", voice, voice)[1].splitlines()) == 2
    assert "x.wav" in call("tts", "seven three five", "--prompt", voice, "--out", out, "--quant=int8")[1]
    wav, sr = soundfile.read(out)
    assert sr == 16000 and len(wav) % 320 == 0
    said = [json.loads(line) for line in call("asr", voice, voice, "--json", "--beam=2")[1].splitlines()]
    assert [row["audio"] for row in said] == [voice, voice] and said[0]["text"] == said[1]["text"]
    code, told, complaint = call("asr", voice, "none.wav", voice, "--json")      # a bad one among good ones
    first, bad, last = (json.loads(line) for line in told.splitlines())
    assert code == 2 and "none.wav: no such file" in complaint and "no such file" in bad["error"]
    assert first == last and first["text"] == call("asr", voice)[1].strip() and "ended" in first
    monkeypatch.setattr(sys, "stdin", io.StringIO("one two\n\nthree\n"))
    code, told, _ = call("tts", "-", "--prompt", voice, "--out", str(tmp_path / "many"), "--best=2")
    rows = [json.loads(line) for line in open(tmp_path / "many/samples.jsonl")]
    assert [row["text"] for row in rows] == ["one two", "three"] and "wrong by its own ear" in told
    assert all(os.path.exists(row["wav"]) and row["wrong"] >= 0 for row in rows)
    told = call("continue", voice, voice, "--json", "--out", str(tmp_path / "on"))[1]
    first, last = map(json.loads, told.splitlines())
    assert first["audio"] == voice and "ended" in first and first["wav"] != last["wav"]
    assert soundfile.info(last["wav"]).duration == last["seconds"] > soundfile.info(voice).duration - 0.02
    assert set(json.loads(call("text", "one", "--json")[1])) == {"text", "ended"}
    assert "x.wav" in call("tts", "one", "--prompt", voice, "--out", out, "--guidance=2")[1]
    assert not np.array_equal(wav, soundfile.read(out)[0])
    for arguments, message in ((("tts", "one"), "without a voice prompt"),
                               (("tts", "one", "--prompt", voice, "--stream", "--best=2"), "without --best"),
                               (("asr", "none.wav"), "no such file"),
                               (("continue", voice, voice, "--out", out), "name a folder"),
                               (("tts", " ", "--prompt", voice), "text is empty")):
        code, _, complaint = call(*arguments)
        assert code == 2 and message in complaint
