# One voice that reads any English sentence aloud, from random weights: a synthetic voice, Whisper-base's
# clusters and SoundStream. docs/one_voice.md has the commands, and what came of it on two cores.
out_dir = "out/one_voice"
data = "data/one-20"        # pieces of 1 to 20 words
curriculum = {"data/one-4": 0.31}       # of 1 to 4 before: without them it hardly begins to read

n_layer = 8
n_head = 4
n_kv_head = 2
d_model = 256
d_ff = 704

mixture = {"plain_tts": 2.0, "asr": 0.5, "speech": 0.1}     # asr to choose among samples, speech for guidance
semantic_asr = True
loss_region = "target"

# 2 rows x 1024 frames = 2,048 frames a step
row_frames = 1024
batch_rows = 2
max_steps = 4000
decay = 0.6
lr = 5e-3
muon_lr = 0.01
muon_iterations = 3
shard = 1

eval_every = 250
save_every = 250
temperature = 0.1           # semantic tokens: a slip of one is another sound
acoustic_temperature = 0.7
guidance = 1.5
max_speech_s = 12.0
