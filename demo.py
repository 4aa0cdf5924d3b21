"""Demo: a page in the browser to play with a trained model.

Helper of sample.py:  pip install -e '.[demo]' && python demo.py out/numbers
Type a text and hear it in the voice of a recording while it is made, have speech read, have it continued, and
look inside (explain.py). The page is served to this machine only, unless --host says otherwise. Nobody's
upload can hurt: size, length and time are limited, what is not audio is a message, one request runs at once.
Gradio plays sound while it is made only where ffmpeg is installed; without it, all of it at the end.
"""
import argparse
import contextlib
import functools
import html
import os
import shutil
import time

import gradio
import numpy as np
import soundfile
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from data import Dataset
from eval import find_data
from explain import explain_asr, explain_tts
from script import run_script
from speaker import Speaker
from tokenize_audio import SAMPLE_RATE, load_audio

MAX_SECONDS, MAX_LETTERS, MAX_UPLOAD = 60, 500, "30mb"
MAX_WORK_S = 120            # of a request, once it is its turn
STREAMS = shutil.which("ffmpeg") is not None
ABOUT = "Speech and text by one small language model ({run}, {size:.1f}M parameters). "


class OutOfTime(ValueError):
    pass


@contextlib.contextmanager
def time_limit(seconds):
    """OutOfTime from the model's next product after so many seconds. A thread can't be stopped from outside,
    and lengths alone bound the steps, but not how long a large model takes for one."""
    end = time.monotonic() + seconds

    def look_at_the_clock(module, inputs):
        if time.monotonic() > end:
            hook.remove()               # a page that was left amid its request must not stop the next one's
            raise OutOfTime(f"cut: out of time, after {seconds:.0f} s; try something shorter")

    hook = register_module_forward_pre_hook(look_at_the_clock)
    try:
        yield
    finally:
        hook.remove()


def said_kindly(work):
    """A function for the page, which ends in time: what is wrong with an input becomes a message there."""
    @functools.wraps(work)
    def kind(*arguments):
        try:
            with time_limit(MAX_WORK_S):
                yield from work(*arguments)
        except (ValueError, OSError) as problem:
            raise gradio.Error(str(problem), title="That did not work", print_exception=False) from None
    return kind


def recording(path, what):
    """Path of an upload -> wav (n,) at 16 kHz. ValueError if it is missing, not audio, or too long."""
    if not path:
        raise ValueError(f"please record or upload {what} first")
    try:
        seconds = soundfile.info(path).duration
    except (soundfile.LibsndfileError, TypeError):
        raise ValueError(f"{what} is not in an audio format that we can read: wav, flac, ogg, mp3") from None
    if seconds > MAX_SECONDS:
        raise ValueError(f"{what} has {seconds:.0f} s; at most {MAX_SECONDS} s, please")
    return load_audio(path)


def sound(wav):
    """wav (n,) of floats -> what gradio plays."""
    return SAMPLE_RATE, (np.clip(wav, -1, 1) * 32767).astype(np.int16)


def known_voices(speaker, n=6):
    """Held-out recordings to speak in the voice of, one of each voice, new voices first: those of the data
    that the run was trained on -> [path], at most n; none where these are not here, or the run has one voice
    of its own."""
    found = {}
    if not speaker.config.mixture.get("tts"):
        return []
    try:
        infos = [Dataset(find_data(speaker), split).info for split in ("unseen", "seen")]
    except (ValueError, OSError):                   # moved, or made by another version: the page goes without
        return []
    for name, path in (pair for info in infos for pair in zip(info["speaker"], info["audio"])):
        if len(found) < n and name not in found and os.path.isfile(path) and can_be_prompt(path):
            found[name] = path
    return list(found.values())


def can_be_prompt(path):
    try:
        return soundfile.info(path).duration <= MAX_SECONDS
    except (soundfile.LibsndfileError, TypeError):
        return False


def framed(page):
    """A whole HTML page inside another."""
    return f'<iframe srcdoc="{html.escape(page)}" style="width:100%;height:1500px;border:0"></iframe>'


def actions(speaker):
    """What the buttons do -> functions speak, read, go_on, look_at_speech, look_at_reading: generators that
    yield the values of their outputs, more than once where something is streamed."""
    def checked(text):
        text = " ".join((text or "").split())
        if not text:
            raise ValueError("please type a text first")
        if len(text) > MAX_LETTERS:
            raise ValueError(f"the text has {len(text)} letters; at most {MAX_LETTERS}, please")
        return text

    def random_numbers(seed):
        return torch.Generator().manual_seed(int(seed or 0))

    def prompt_of(voice):
        """Codes of a voice's recording; None without one, if the model learned to speak without."""
        if not voice and speaker.config.mixture.get("plain_tts"):
            return None
        return speaker.encode(recording(voice, "a voice"))

    def speak(text, voice, seed):
        """-> (a piece of sound or None, the whole or None, a line)"""
        text, generator = checked(text), random_numbers(seed)
        prompt = prompt_of(voice)
        began, first, pieces, how = time.time(), None, [], ""

        def spoken():
            nonlocal how
            try:
                if not (yield from speaker.synthesise_stream([text], prompt, generator)):
                    how = ", cut at its limit"
            except OutOfTime:
                if not pieces:
                    raise
                how = ", cut: out of time"

        for piece in spoken():
            if len(piece):
                first = first or time.time() - began
                pieces.append(piece)
                yield (sound(piece) if STREAMS else None, None,
                       f"speaking: {sum(map(len, pieces)) / SAMPLE_RATE:.1f} s so far")
        if not pieces:
            raise ValueError("the model ended at once and said nothing: try another seed")
        wav, took = np.concatenate(pieces), time.time() - began
        seconds = len(wav) / SAMPLE_RATE
        yield None, sound(wav), (f"{seconds:.2f} s of sound in {took:.2f} s ({seconds / took:.1f} times real "
                                 f"time), the first after {first:.2f} s{how}")

    def read(speech):
        """-> (text, a line)"""
        wav, began = recording(speech, "speech"), time.time()
        (text, ended), took = speaker.transcribe_wavs([wav])[0], time.time() - began
        yield text or "(nothing)", (f"{len(wav) / SAMPLE_RATE:.2f} s of sound read in {took:.2f} s"
                                    + ("" if ended else ", cut at its limit"))

    def go_on(speech, seed):
        """-> (sound, a line)"""
        codes, began = speaker.encode(recording(speech, "speech")), time.time()
        new, ended = speaker.continue_speech(codes, random_numbers(seed))
        wav = speaker.decode(torch.cat([torch.from_numpy(codes), new]))
        yield sound(wav), (f"{len(codes)} frames were given, {len(new)} are new, "
                           f"{'with' if ended else 'without'} an end; {time.time() - began:.2f} s")

    def look_at_speech(text, voice, seed):
        prompt = prompt_of(voice)
        yield framed(explain_tts(speaker, checked(text), prompt, random_numbers(seed))[0])

    def look_at_reading(speech):
        yield framed(explain_asr(speaker, recording(speech, "speech"))[0])

    return [said_kindly(work) for work in (speak, read, go_on, look_at_speech, look_at_reading)]


def make_page(speaker):
    """Speaker -> gradio.Blocks. Held-out recordings of its data are there to pick a voice from."""
    speak, read, go_on, look_at_speech, look_at_reading = actions(speaker)
    upload = functools.partial(gradio.Audio, type="filepath", sources=["upload", "microphone"])
    one = {"concurrency_id": "the model", "concurrency_limit": 1}   # else each button has a queue of its own
    size = sum(p.numel() for p in speaker.model.parameters()) / 1e6
    with gradio.Blocks(title="nanoOpusLM", analytics_enabled=False) as blocks:
        gradio.Markdown("# nanoOpusLM\n" + ABOUT.format(run=speaker.run, size=size))
        with gradio.Tab("Speak"):
            with gradio.Row():
                with gradio.Column():
                    text = gradio.Textbox(label="Text", lines=2, max_length=MAX_LETTERS)
                    voice = upload(label="A voice to speak in, a second or more")
                    voices = known_voices(speaker)
                    if voices:
                        gradio.Examples([[path] for path in voices], voice, label="Or one of these",
                                        elem_id="voices")
                    seed = gradio.Number(0, label="Seed", precision=0)
                    say, look = gradio.Button("Speak", variant="primary"), gradio.Button("Look inside")
                with gradio.Column():
                    live = gradio.Audio(label="As it is made", streaming=True, autoplay=True, visible=STREAMS)
                    whole = gradio.Audio(label="All of it", elem_id="whole")
                    note = gradio.Markdown(elem_id="speak-note")
            inside = gradio.HTML()
            say.click(speak, [text, voice, seed], [live, whole, note], api_name="speak", **one)
            look.click(look_at_speech, [text, voice, seed], inside, api_name="look_at_speech", **one)
        with gradio.Tab("Read"):
            with gradio.Row():
                speech = upload(label="Speech", elem_id="read-speech")
                with gradio.Column():
                    heard = gradio.Textbox(label="What the model heard", elem_id="heard")
                    note = gradio.Markdown()
            listen, look = gradio.Button("Read", variant="primary"), gradio.Button("Look inside")
            inside = gradio.HTML()
            listen.click(read, speech, [heard, note], api_name="read", **one)
            look.click(look_at_reading, speech, inside, api_name="look_at_reading", **one)
        with gradio.Tab("Continue"):
            with gradio.Row():
                beginning = upload(label="The beginning")
                with gradio.Column():
                    continued = gradio.Audio(label="The beginning, and how the model goes on")
                    note = gradio.Markdown()
            seed = gradio.Number(0, label="Seed", precision=0)
            more = gradio.Button("Go on", variant="primary")
            more.click(go_on, [beginning, seed], [continued, note], api_name="go_on", **one)
    return blocks.queue(max_size=16)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines too")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--quant", default="", help="int8: faster decoding on a CPU")
    args = parser.parse_args(arguments)
    page = make_page(Speaker(args.run, quant=args.quant))
    page.launch(server_name=args.host, server_port=args.port, max_file_size=MAX_UPLOAD, share=False,
                show_error=True)


if __name__ == "__main__":
    run_script(main)
