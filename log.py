"""Log: what a run tells while it goes on.

Helper of train.py: out.jsonl for programs, a bar for people, plain lines where nobody watches (a file, a
queue), wandb or trackio if wanted; and what it says when numbers stop being numbers.
"""
import dataclasses
import importlib
import json
import math
import os
import sys
import time

from tqdm import tqdm

from config import save_config
from heads import mean_losses
from parallel import local, peak_memory, total
from shards import write_file


class Log:
    """The clock and the lines of a run; sums since the last line."""

    def __init__(self, config, names, state, peak, device, rank):
        """names: of the streams.  state: step, frames, seconds so far.  peak: FLOP/s of all workers."""
        self.config, self.names, self.peak, self.device, self.rank = config, names, peak, device, rank
        self.first, self.began, self.paused, self.shown_at = dict(state), time.time(), 0.0, 0.0
        self.sums, self.flops, self.usual, self.file, self.tracker = None, 0.0, None, None, None
        self.spread = None                  # how far from its running mean, self.usual, the loss mostly is
        watched = rank == 0 and sys.stderr.isatty()
        self.bar = tqdm(total=config.max_steps, initial=state["step"], unit="step", mininterval=2,
                        disable=not watched)
        if rank == 0:
            self.open(state["step"])

    def open(self, step):
        """Open out.jsonl for appending, without lines of steps that will be done again; and the tracker."""
        c, path, kept = self.config, f"{self.config.out_dir}/out.jsonl", []
        save_config(c, f"{c.out_dir}/config.json")
        if os.path.exists(path):
            with open(path) as f:
                kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_file(path, "".join(kept))
        self.file = open(path, "a")
        if c.track:
            self.tracker = importlib.import_module(c.track)
            self.tracker.init(project="nano-opuslm", name=c.out_dir, config=dataclasses.asdict(c))

    def say(self, *words):
        if self.rank == 0:
            with self.bar.external_write_mode():
                print(*words, flush=True)

    def step(self, state, sums, loss, norm, lr, flops, last):
        """Count a step that is done, and stop the clock. Returns the row of a log line, {} between lines.

        state gets its seconds.  sums: of `batch_loss`, over all workers.  loss: weighted, per target frame.
        """
        self.stopped, c = time.time(), self.config
        seconds = self.stopped - self.began - self.paused
        state["seconds"] = self.first["seconds"] + seconds
        self.bar.update()
        self.flops += flops
        if math.isfinite(loss + norm):                          # else it was skipped
            self.sums = [a + b for a, b in zip(sums, self.sums or [0.0] * len(sums))]
            self.usual, self.spread = (self.usual, self.spread) if self.usual else (loss, loss)
            over = loss - self.usual
            if over > max(0.5 * self.usual, 8 * self.spread):       # a mixture of tasks goes up and down
                self.say(f"step {state['step']}: the loss jumped to {loss:.3f}, from about {self.usual:.3f}")
            self.usual, self.spread = self.usual + 0.05 * over, 0.95 * self.spread + 0.05 * abs(over)
        if state["step"] % c.log_every and not last:
            return {}
        done = state["step"] - self.first["step"]
        finite = lambda x: x if math.isfinite(x) else None      # JSON has no NaN
        row = {"step": state["step"], "frames": state["frames"], "loss": finite(loss),
               **mean_losses(self.sums or [], self.names),
               "lr": lr, "grad_norm": finite(norm), "skipped": state["skipped"],
               "frames_per_second": (state["frames"] - self.first["frames"]) / seconds,
               "mfu": self.flops / seconds / self.peak, "memory_mb": peak_memory(self.device),
               "seconds": state["seconds"], "eta_s": seconds / done * (c.max_steps - state["step"])}
        self.sums = None
        shown = " ".join(f"{name} {row[name]:.2f}" for name in ("text", "semantic", "acoustic1", "acoustic8")
                         if name in row)
        self.bar.set_postfix_str(shown)
        if self.bar.disable and (self.stopped - self.shown_at > 20 or last):
            self.shown_at = self.stopped
            self.say(f"step {row['step']}/{c.max_steps}  loss {loss:.3f}  {shown}  "
                     f"{row['frames_per_second']:.0f} frames/s  MFU {100 * row['mfu']:.0f} %  "
                     f"{row['memory_mb']:.0f} MB  {row['eta_s'] / 60:.0f} min to go")
        return row

    def write(self, row):
        if row and self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            if self.tracker:
                self.tracker.log(row, step=row["step"])

    def go(self):
        """Start the clock again: evaluation and saving do not count as training."""
        self.paused += time.time() - self.stopped

    def close(self):
        self.bar.close()
        if self.tracker:
            self.tracker.finish()


def no_progress(config, model, loader, step, norm, losses):
    """Too many steps in a row without a finite loss or gradient: write down where, and stop."""
    names, params = zip(*model.named_parameters())
    broken = total([float(not local(p.grad).isfinite().all()) for p in params])
    path, info = f"{config.out_dir}/nonfinite.json", loader.dataset.info
    documents = [(task, [info["id"][i] for i in members])
                 for row in loader.plan(step) for task, members, _ in row]
    losses = {name: str(x) for name, x in losses.items()}
    report = {"step": step + 1, "grad_norm": str(norm), "losses": losses,
              "gradients": [name for name, n in zip(names, broken) if n], "documents": documents}
    write_file(path, json.dumps(report, indent=1))
    raise ValueError(f"{config.max_bad_steps} steps in a row without a finite loss or gradient: {path} has "
                     "losses, parameters and documents of the last; change something (a lower lr, other "
                     "data) and go on from the last checkpoint with --resume")
