"""Claim: the page works in a real browser; whatever one uploads, the answer is sound, text or a message."""
import io
import shutil
import socket
import time

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


def test_a_request_ends_in_time(speaker, voice, monkeypatch):
    """Speaking keeps what there is; the others say so. The next request has all its time."""
    import demo
    speak, read, go_on, look_at_speech, look_at_reading = demo.actions(speaker)
    seven = ("seven " * 30, voice, 3)
    speaking = speak(*seven)
    next(speaking)                                      # the first half second
    now = time.monotonic() + demo.MAX_WORK_S
    with monkeypatch.context() as later:
        later.setattr(time, "monotonic", lambda: now)
        _, whole, note = last(speaking)
    assert "cut: out of time" in note and 0 < len(whole[1]) <= demo.SAMPLE_RATE
    monkeypatch.setattr(demo, "MAX_WORK_S", -1)
    for action, words in ((speak, seven), (read, (voice,)), (go_on, (voice, 0)), (look_at_speech, seven),
                          (look_at_reading, (voice,))):
        with pytest.raises(gradio.Error, match="out of time"):
            list(action(*words))
    monkeypatch.undo()
    assert "out of time" not in last(speak("seven three", voice, 3))[2]


def test_one_request_runs_at_once(speaker):
    """Whichever button: gradio would give each a queue of its own, while all use the one model."""
    import demo
    ours = {action.__name__ for action in demo.actions(speaker)}
    buttons = [f for f in demo.make_page(speaker).fns.values() if f.api_name in ours]
    assert len(buttons) == 5
    assert {(f.concurrency_id, f.concurrency_limit) for f in buttons} == {("the model", 1)}


@pytest.fixture(scope="module")
def site(tiny_run):
    """What `python demo.py RUN` serves -> its address. It only returns, where the command would wait."""
    import demo
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch, pages = gradio.Blocks.launch, []

    def start(self, **options):
        pages.append(self)
        launch(self, prevent_thread_lock=True, quiet=True, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradio.Blocks, "launch", start)
        demo.main([tiny_run, f"--port={port}"])
    yield f"http://127.0.0.1:{port}/"
    pages[0].close()


def test_this_machine_only(site):
    """127.0.0.2 is this machine too, but not the address that the page is at; 0.0.0.0 would answer."""
    port = int(site.rstrip("/").split(":")[-1])
    socket.create_connection(("127.0.0.1", port), 5).close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), 5)


def test_large_uploads_are_refused(site):
    """Also from a program that has never seen the page."""
    httpx = pytest.importorskip("httpx")
    for megabytes, status in ((1, 200), (31, 413)):
        answer = httpx.post(site + "gradio_api/upload", files={"files": b"x" * (megabytes << 20)}, timeout=60)
        assert answer.status_code == status, answer.text
    assert "exceeded maximum allowed size" in answer.text


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_in_a_browser(speaker, site, voice, tmp_path):
    """Someone opens the page, has a text spoken and a recording read, and uploads an hour, and a text as a
    recording."""
    playwright = pytest.importorskip("playwright.sync_api")
    import demo
    (tmp_path / "text.wav").write_text("this is no sound")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(site)
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
        (tmp_path / "hour.wav").write_bytes(bytes(31 << 20))
        page.locator("#read-speech input[type=file]").set_input_files(tmp_path / "hour.wav")
        page.get_by_text("maximum allowed size").first.wait_for()
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
