"""Anneal: the second stage. From a checkpoint, the rate falls in a line to zero on curated, long-form data.

Twelfth file of the reading order (arXiv 2506.17611, its annealing stage: 85k steps on small, clean corpora).
  python anneal.py configs/anneal_opt_a.py --init_from=out/1.7b/step_0500000
  python anneal.py --init_from=out/numbers/step_0001000 --max_steps=300 --recombine_frames=500
It is the one training loop with other settings: all is as in the run that it begins from, but for what a
config file or a flag says, and for the schedule

      rate   ________________
            /                |.              pre-training: warmup, then constant
           /                 |  .            annealing: from where the rate is, with the optimizers' moments,
          /                  |    .          to zero

Take a checkpoint from before the decay; `keep_every` keeps some.
"""
import dataclasses

import train
from checkpoint import newest, read_state
from config import read_arguments, read_config


def annealing_settings(arguments):
    """Config files and flags, with init_from among them -> all settings of the annealing run, as a dict."""
    said = read_arguments(arguments)
    start = newest(said.get("init_from", ""))
    if not start:
        raise ValueError("where from? --init_from=a run of ours or one of its checkpoints")
    before, state = read_config(f"{start}/config.json"), read_state(start)
    if "data" not in state:
        raise ValueError(f"{start} is an export, without what its training knew: anneal from the run's own "
                         "checkpoint")
    factor = train.learning_rate(before, state["step"])
    if factor == 0 and "lr" not in said:
        raise ValueError(f"the rate of {start} has come down to zero already: begin from a checkpoint before "
                         "its decay (keep_every), or say --lr")
    settings = dataclasses.asdict(before)
    if {"data", "datasets", "corpus"} & set(said):
        settings |= {"data": "", "datasets": {}}
    elif not before.datasets:
        settings["data"] = state["data"]
    settings |= {"out_dir": said["init_from"].rstrip("/") + "-annealed", "rows_from_text": False}
    settings |= {"lr": before.lr * factor, "muon_lr": before.muon_lr * factor}
    settings |= {"curriculum": {}, "warmup": 0.0, "decay": 1.0, "final_lr": 0.0, "moments": "lr" not in said}
    return settings | said


def main(arguments):
    how = [a for a in arguments if a in ("--resume", "--worker")]
    settings = annealing_settings([a for a in arguments if a not in how])
    print(f"annealing {settings['init_from']}: {settings['max_steps']} steps, from a rate of "
          f"{settings['lr']:.3g} to 0", flush=True)
    flags = [f"--{name}={value}" for name, value in settings.items()]
    train.main(flags + how)


if __name__ == "__main__":
    train.run(main)
