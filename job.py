"""Job: the stages of the main command, each a process of its own, and what they took.

Helper of train.py. A stage gets its memory back to the system when it ends, training runs under torchrun, and
a signal to the job reaches the stage that is at work, which saves and ends.
"""
import json
import os
import signal
import subprocess
import sys
import threading
import time

from shards import write_file


def memory_of_family(root):
    """Memory in MB of a process and its descendants now, shared pages counted once (PSS); None off Linux."""
    parents, family, kb = {}, {root}, 0
    try:
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/stat") as f:
                    parents[int(name)] = int(f.read().rpartition(")")[2].split()[1])
            except OSError:         # it has ended meanwhile
                continue
        for pid in sorted(parents):
            ancestor = pid
            while ancestor in parents and ancestor not in family:
                ancestor = parents[ancestor]
            if ancestor in family:
                try:
                    with open(f"/proc/{pid}/smaps_rollup") as f:
                        kb += next(int(line.split()[1]) for line in f if line.startswith("Pss:"))
                except (OSError, StopIteration):
                    continue
    except OSError:
        return None
    return kb / 1024


def run_stage(name, command, peak):
    """Run a stage -> its seconds; the most memory seen goes to peak[0]. Exits if it fails or is stopped."""
    began, done, told = time.time(), threading.Event(), []

    def watch():
        pause = 1.0
        while not done.wait(pause):
            start = time.time()
            peak[0] = max(peak[0], memory_of_family(os.getpid()) or 0)
            pause = max(1.0, 100 * (time.time() - start))       # of large processes it takes a while

    stage = subprocess.Popen(command, start_new_session=True)   # Ctrl-C comes to us alone, and we pass it on

    def pass_on(number, _):
        told.append(number)
        stage.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        code = stage.wait()
    finally:
        done.set()
        watcher.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        sys.exit(128 + told[0])
    if code:
        why = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        print(f"train.py: {name} failed ({why}); its message is above", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)
    return time.time() - began


def report(out, seconds, peak, voice):
    """Add times and memory to what eval.py found, and say what is where."""
    with open(f"{out}/results.json") as f:
        results = json.load(f)
    results["peak_memory_mb"], results["seconds"] = peak[0] or None, results["seconds"] | seconds
    measured = {name: results[name] for name in ("seconds", "peak_memory_mb")}      # for later eval.py runs
    for name, content in (("results", results), ("run", measured)):
        write_file(f"{out}/{name}.json", json.dumps(content, indent=1))
    print(f"""
prepare {seconds['prepare']:.0f} s, train {seconds['train']:.0f} s, evaluate {seconds['eval']:.0f} s; """
          f"""{results['frames_per_second']:.0f} frames/s, peak memory {peak[0]:.0f} MB
{out}/results.json    the figures above          {out}/curves.png    losses over the run
{out}/wavs            spoken by the model (.model.wav) beside the originals after tokenizing (.original.wav)

try next:
  python sample.py {out} asr {voice}
  python sample.py {out} tts "seven three five" --prompt {voice} --out spoken.wav
  python sample.py {out} continue {voice} --out continued.wav""")
