# Synthesis after recognition: from out/libri5h, short pieces first again. See docs/real_run.md.
parent = "libri5h.py"
out_dir = "out/libri5h_tts"
init_from = "out/libri5h"
rows_from_text = False      # the rows are trained already
prompt_len = 50             # 1 s of the voice: a short piece has no more itself
mixture = {"asr": 0.3, "tts": 1.0, "speech": 0.05, "text": 0.1}
curriculum = {"data/libri-5": 0.25, "data/libri-15": 0.35}
max_steps = 170
warmup = 0.04
decay = 0.4
