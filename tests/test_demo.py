"""Claim: the page works in a real browser; whatever one uploads, the answer is sound, text or a message."""
import io
import shutil

import numpy as np
import pytest
import soundfile

from data import Dataset
from speaker import Speaker
from tokenize_audio import load_audio

gradio = pytest.importorskip("gradio", reason="pip install -e '.[demo]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def speaker(tiny_run):
    return Speaker(tiny_run)


@pytest.fixture(scope="module")
def voice(tiny_data):
    return Dataset(tiny_data, "unseen").info["audio"][0]


def last(values):
    """The last of what an action yields."""
    *_, final = values
    return final


def test_actions_speak_and_read(speaker, voice):
    import demo
    speak, read, go_on, look_at_speech, _ = demo.actions(speaker)
    pieces = list(speak("seven three", voice, 3))
    (_, whole, note), rate = pieces[-1], demo.SAMPLE_RATE
    assert whole[0] == rate and whole[1].dtype == np.int16 and len(whole[1]) > 0 and "of sound in" in note
    if demo.STREAMS:
        assert sum(len(piece[1]) for piece, _, _ in pieces[:-1]) == len(whole[1])
    text, note = last(read(voice))
    assert text == (speaker.transcribe_wavs([load_audio(voice)])[0][0] or "(nothing)") and "read in" in note
    (_, wav), note = last(go_on(voice, 0))
    assert len(wav) > len(load_audio(voice)) * 0.9 and "are new" in note
    assert "<iframe" in last(look_at_speech("seven three", voice, 3))


def test_a_model_of_one_voice_asks_for_none(speaker, monkeypatch):
    import demo
    speak, _, _, look_at_speech, _ = demo.actions(speaker)
    monkeypatch.setitem(speaker.config.mixture, "plain_tts", 1.0)
    assert "of sound in" in last(speak("seven three", None, 3))[2]
    assert "<iframe" in last(look_at_speech("seven three", None, 3))


def test_held_out_voices_are_offered_where_they_are(speaker, tiny_data, monkeypatch):
    import demo
    infos = [Dataset(tiny_data, split).info for split in ("unseen", "seen")]
    who = {path: name for info in infos for name, path in zip(info["speaker"], info["audio"])}
    found = demo.known_voices(speaker)
    assert found[0] in infos[0]["audio"] and len({who[path] for path in found}) == len(found), "one of each"
    assert demo.known_voices(speaker, 1) == found[:1]
    monkeypatch.setitem(speaker.state, "data", "/nowhere")
    monkeypatch.setattr(speaker.config, "data_dir", "/nowhere")
    assert demo.known_voices(speaker) == [], "data that have moved: the page goes without"


def test_bad_input_is_a_message(speaker, voice, tmp_path):
    import demo
    speak, read, *_ = demo.actions(speaker)
    (tmp_path / "text.wav").write_text("this is no sound")
    soundfile.write(tmp_path / "long.wav", np.zeros(16000 * 61, np.float32), 16000)
    for action, words, message in (
            (speak, ("", voice, 0), "type a text"), (speak, ("a" * 900, voice, 0), "900 letters"),
            (speak, ("seven", None, 0), "upload a voice"), (read, (None,), "upload speech"),
            (read, (str(tmp_path / "text.wav"),), "not in an audio format"),
            (read, (str(tmp_path / "long.wav"),), "61 s; at most 60 s")):
        with pytest.raises(gradio.Error, match=message):
            list(action(*words))


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_in_a_browser(speaker, voice, tmp_path):
    """Someone opens the page, has a text spoken and a recording read, and uploads a text as a recording."""
    playwright = pytest.importorskip("playwright.sync_api")
    import demo
    (tmp_path / "text.wav").write_text("this is no sound")
    blocks = demo.make_page(speaker)
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        with playwright.sync_playwright() as p:
            browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page()
            page.set_default_timeout(60_000)
            page.goto(url)
            page.get_by_label("Text").first.fill("seven three")
            page.get_by_label("Seed").first.fill("3")
            page.locator("#voices button, #voices tr.tr-body").first.click()    # one of the held-out voices
            page.locator("a[download]").first.wait_for()
            page.get_by_label("Remove").or_(page.get_by_label("Clear")).first.click()
            with page.expect_response(lambda response: "/upload" in response.url):
                page.locator("input[type=file]").first.set_input_files(voice)
            page.locator("a[download]").first.wait_for()
            page.get_by_role("button", name="Speak", exact=True).click()
            page.get_by_text("times real time").wait_for()
            wav = page.request.get(page.locator("#whole a[download]").get_attribute("href")).body()
            samples, rate = soundfile.read(io.BytesIO(wav))
            assert rate == demo.SAMPLE_RATE and len(samples) > 0

            page.get_by_role("tab", name="Read").click()
            page.locator("#read-speech input[type=file]").set_input_files(voice)
            page.locator("#read-speech a[download]").wait_for()
            page.get_by_role("button", name="Read", exact=True).click()
            page.get_by_text("s of sound read in").wait_for()
            heard = speaker.transcribe_wavs([load_audio(voice)])[0][0] or "(nothing)"
            assert page.locator("#heard textarea").input_value() == heard

            page.get_by_label("Remove").or_(page.get_by_label("Clear")).last.click()
            page.locator("#read-speech input[type=file]").set_input_files(tmp_path / "text.wav")
            page.locator("#read-speech a[download]").wait_for()
            page.get_by_role("button", name="Read", exact=True).click()
            page.get_by_text("not in an audio format").wait_for()
            browser.close()
    finally:
        blocks.close()
