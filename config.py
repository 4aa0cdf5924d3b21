"""Configuration: one flat dataclass; a config file says what differs; --name=value on the command line wins.

Seventh file of the reading order. A config file holds plain assignments and their arithmetic, nothing is
executed into anyone's globals, and a name or type that we don't know is an error that names the closest one.
"""
import ast
import dataclasses
import difflib
import json
import os
import runpy
from dataclasses import dataclass, field


@dataclass
class Config:
    out_dir: str = "out/run"
    # data (see prepare.SETTINGS)
    data: str = ""                  # a folder of prepared data, as it is, instead of what follows
    datasets: dict = field(default_factory=dict)    # {folder: weight}: several, made with the same tokenizers
    data_dir: str = "data"          # prepared corpora live here, each in a folder named by its settings
    corpus: str = "numbers"         # "numbers" or a manifest
    corpus_utterances: int = 9000
    eval_utterances: int = 200      # held out, with known voices and again with new ones
    data_seed: int = 1
    n_semantic: int = 256
    n_acoustic: int = 256
    n_level: int = 8
    switch_penalty: float = 60.0
    fit_utterances: int = 700
    audio_tokenizer: str = ""       # folder of a fitted tokenizer: see pretrained.py
    lower: bool = False             # lower-case the texts
    text_model: str = "word"        # bpe, unigram, char, an LLM's folder or hub id; base: init_from
    text_vocab: int = 0
    max_audio_s: float = 30.0
    # sequences
    mixture: dict = field(default_factory=lambda: {"asr": 1.0, "tts": 1.0, "speech": 0.1, "text": 0.1})
    curriculum: dict = field(default_factory=dict)  # {folder: share of the steps}: alone, one by one, before
    splice_frames: int = 0          # join utterances that follow each other up to this length; 0 = never
    recombine_frames: int = 0       # the same of random utterances of a speaker, in recognition and synthesis
    prompt_len: int = 50            # frames of the TTS voice prompt (500 in OpusLM)
    token_streams: str = "both"     # or semantic, acoustic: one half of the speech tokens (ablations)
    semantic_asr: bool = False      # recognition reads semantic tokens alone, without repetitions
    time_masks: int = 0             # so many spans of what recognition hears in training are hidden
    time_mask_width: float = 0.05   # each of up to this share of it
    loss_region: str = "whole"      # whole (pre-training) or target (fine-tuning)
    special_weight: float = 1.0     # loss weight of markers, task tokens and eos (10 in the original recipes)
    frame_weight: float = 1.0       # loss weight of a speech frame, where a text token has 1
    semantic_share: float = 0.5     # of that, the semantic token's; the acoustic ones share the rest
    delay: int = 1                  # frames by which each stream comes later than the one before; 0 = none
    softmax: str = "grammar"        # or original: see heads.token_losses
    # model
    init_from: str = ""             # folder or hub id of a base LLM, or of a checkpoint: see convert.py
    new_rows: float = 1.0           # rows that are not text learn so many times as fast (whole copies only)
    moments: bool = False           # start with the optimizers' moments of init_from too: see anneal.py
    rows_from_text: bool = False    # a base LLM's semantic rows start from text that goes with them: align.py
    model_type: str = "llama"       # or olmo2: see model.Block
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 2
    d_model: int = 192
    d_ff: int = 512
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    # training
    seed: int = 1
    row_frames: int = 1024          # S, frames in a packed row
    batch_rows: int = 2             # rows of the global batch, over all workers and micro-steps
    grad_accum: int = 1             # micro-steps, each of batch_rows / (workers * grad_accum) rows a worker
    max_steps: int = 2000
    warmup: float = 0.02            # share of the steps
    decay: float = 0.5              # share of the steps at the end, linear to final_lr
    final_lr: float = 0.0           # share of the peak that is left at the end
    lr: float = 3e-3                # AdamW: embeddings, heads, norms
    muon_lr: float = 0.02           # Muon: the blocks' matrices; 0 = AdamW for them too
    muon_iterations: int = 5        # Newton-Schulz rounds a step
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0               # gradient norm
    dtype: str = "auto"             # activations: bfloat16 where the machine multiplies it fast, else float32
    compile: bool = False           # torch.compile for the blocks: where many steps pay for its half minute
    checkpointing: bool = False     # recompute activations in the backward pass: less memory, more time
    shard: int = 0                  # workers that share one copy of the weights (FSDP2): 0 = all; 1 = none
    workers: int = 0                # processes that `python train.py` starts; 0 = one per core on a CPU
    save_every: int = 250           # steps
    keep_last: int = 2              # checkpoints
    keep_every: int = 0             # steps: checkpoints of multiples of it stay for ever; 0 = none
    timeout_s: float = 600.0        # a worker that waits longer for another gives up
    max_bad_steps: int = 10         # in a row with a loss or gradient that is not finite: stop
    track: str = ""                 # wandb or trackio: log there too
    eval_every: int = 250           # steps between held-out losses
    log_every: int = 10
    # evaluation
    tts_utterances: int = 100
    temperature: float = 0.3        # of stream 0; 0 = greedy
    acoustic_temperature: float = 0.7
    top_k: int = 30
    top_p: float = 1.0              # of those, the likeliest with this probability together
    guidance: float = 1.0           # of synthesis: over 1, text and voice count for more (decode.steps)
    max_speech_s: float = 6.0       # speech is cut there if it does not end by itself


def check(name, value):
    """The value in the type of field `name`; ValueError for unknown names and wrong types."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    if name not in fields:
        close = difflib.get_close_matches(name, fields, 1)
        raise ValueError(f"unknown setting {name!r}" + (f": did you mean {close[0]!r}?" if close else
                         f"; there are: {', '.join(fields)}"))
    kind = fields[name].type
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"setting {name!r} takes {kind.__name__}, not {type(value).__name__}: {value!r}")
    return value


def read_file(path):
    """The settings of a config file -> dict. `parent = "1.7b.py"`, a file beside it, is read first."""
    values = {name: value for name, value in runpy.run_path(path).items() if not name.startswith("_")}
    parent = values.pop("parent", None)
    values = {name: check(name, value) for name, value in values.items()}
    return (read_file(os.path.join(os.path.dirname(path), parent)) if parent else {}) | values


def read_arguments(arguments):
    """['configs/numbers.py', '--name=value', ...] -> what they say, as a dict. Strings need no quotes."""
    values, flags = {}, {}
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            if not equals:
                raise ValueError(f"write --{name}=value, not {argument!r}")
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                value = text
            if any(f.name == name and f.type is str for f in dataclasses.fields(Config)):
                value = text
            flags[name] = check(name, value)
        else:
            if not os.path.isfile(argument):
                raise ValueError(f"no config file {argument!r}")
            values |= read_file(argument)
    return values | flags


def load_config(arguments):
    """['configs/numbers.py', '--name=value', ...] -> Config."""
    config = Config(**read_arguments(arguments))
    if config.text_model == "base":
        if not config.init_from:
            raise ValueError("text_model='base' is the tokenizer of init_from, which is not set")
        config.text_model = config.init_from
    if config.splice_frames and config.recombine_frames:
        raise ValueError("splice_frames and recombine_frames both join utterances: set one of them to 0")
    for name in ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "row_frames", "batch_rows",
                 "grad_accum", "max_steps", "save_every", "log_every", "keep_last", "max_bad_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: 1 at least")
    for name in ("mixture", "datasets", "curriculum"):
        for key, share in getattr(config, name).items():
            if type(share) not in (int, float) or share < 0:
                raise ValueError(f"{name}: {key!r} takes a number, 0 or more, not {share!r}")
    if not any(weight > 0 for weight in config.mixture.values()):
        raise ValueError(f"mixture={config.mixture}: no task has a weight")
    if config.semantic_asr and config.token_streams == "acoustic":
        raise ValueError("semantic_asr reads semantic tokens, which token_streams='acoustic' leaves out")
    check_sampling(config)
    return config


def synthesis_task(config):
    """How the model speaks: "tts", with a voice prompt, "plain_tts", without, or None."""
    return next((task for task in ("tts", "plain_tts") if config.mixture.get(task)), None)


def check_sampling(config):
    """ValueError if nothing can be drawn so, or synthesis is to be guided away from what the model never
    learned to say of itself."""
    if config.top_k < 1 or min(config.temperature, config.acoustic_temperature, config.top_p) < 0:
        raise ValueError("top_k is 1 at least, temperatures and top_p are 0 at least")
    if config.guidance != 1 and synthesis_task(config) and not config.mixture.get("speech"):
        raise ValueError("guidance of synthesis is away from what the model would say of itself: it needs a "
                         "little of the task speech in the mixture, or --guidance=1")


def save_config(config, path):
    with open(path, "w") as f:
        json.dump(dataclasses.asdict(config), f, indent=1)


def read_config(path):
    """The Config of a checkpoint or run folder."""
    if not os.path.exists(path):
        raise ValueError(f"{path} is missing: is this the folder of a run or of a checkpoint?")
    with open(path) as f:
        return Config(**{name: check(name, value) for name, value in json.load(f).items()})


def other_settings(before, now):
    """Settings that differ between two Configs, as words for a person."""
    differ = [f"{name} was {value!r}, is {getattr(now, name)!r}"
              for name, value in dataclasses.asdict(before).items() if getattr(now, name) != value]
    return f" with other settings: {'; '.join(differ)}" if differ else ""
