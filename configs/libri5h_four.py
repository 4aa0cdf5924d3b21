# After configs/libri5h.py, which recognises: all four tasks, from its weights, in ninety minutes of one core.
#   python anneal.py configs/libri5h_four.py --init_from=out/libri5h
# Its rate has come down to zero, so it says one of its own. docs/real_run.md has what came of it.
out_dir = "out/libri5h-four"
mixture = {"asr": 1.0, "tts": 0.3, "speech": 0.1, "text": 0.25}
datasets = {"data/libri": 0.6, "data/libri-15": 0.2, "data/libri-5": 0.2}   # short: to learn to read
prompt_len = 100            # 2 s of the voice: 10 s would be most of a row
row_frames = 1792           # 30 s of speech with its voice and text
max_steps = 700
lr = 2e-4
warmup = 0.03               # AdamW's moments start anew
tts_utterances = 40
