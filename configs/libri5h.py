# The whole recipe in small, on real speech: SmolLM2-135M, Whisper-base's encoder with k-means, SoundStream
# with 8 x 1024 codes, and four hours of LibriSpeech. README has the commands that make its data. Not run in
# full yet.
parent = "135m.py"
out_dir = "out/libri5h"
lower = True                # LibriSpeech is all capitals, which SmolLM2 reads badly
text_vocab = 600            # merges of SmolLM2's BPE: with all of them one dev token in ten never occurs
rows_from_text = True       # else the model does not begin to listen in the time that we have
softmax = "grammar"
special_weight = 1.0
loss_region = "target"
prompt_len = 100            # 2 s of the voice
mixture = {"asr": 1.0, "tts": 0.5, "speech": 0.1, "text": 0.1}
max_audio_s = 30.0

# 2 rows x 2,048 frames a step
row_frames = 2048
batch_rows = 2
grad_accum = 1
shard = 1
max_steps = 2000
warmup = 0.02
decay = 0.7
final_lr = 0.0
lr = 4e-4
checkpointing = False
save_every = 100
eval_every = 200
temperature = 0.5
acoustic_temperature = 0.7
max_speech_s = 20.0
tts_utterances = 40
