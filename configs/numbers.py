# Spoken numbers: recognition and synthesis from scratch on two CPU cores. What each choice gave: LOG.md.
out_dir = "out/numbers"

# Eight narrow layers learn more in the same time than six of width 192.
n_layer = 8
n_head = 4
n_kv_head = 2
d_model = 128
d_ff = 352

n_acoustic = 64             # 64 codes a level sound nearly like 256 here, and leave the loss to what matters
prompt_len = 40             # 0.8 s of the voice
loss_region = "target"      # in so few steps, the given (random texts, voice prompts) is not worth learning

# 2 rows x 1024 frames = 2,048 frames a step, x 1,650 steps = 3.4M frames, a few of them padding
row_frames = 1024
batch_rows = 2
max_steps = 1650
decay = 0.7
mixture = {"asr": 1.0, "tts": 2.0, "speech": 0.05, "text": 0.05}
lr = 0.01
muon_lr = 0.01
muon_iterations = 3

guidance = 1.5              # of synthesis: a quarter of its errors less than without
shard = 1                   # whole copies of so small a model: FSDP2 over gloo takes half as long again
