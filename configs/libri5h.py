# Recognition of real speech in an hour or two of two cores: SmolLM2-135M, Whisper-base's encoder and k-means,
# four hours of LibriSpeech. docs/real_run.md has the commands that make its data, and what came of it.
parent = "135m.py"
out_dir = "out/libri5h"
lower = True                # LibriSpeech is all capitals, which SmolLM2 reads badly
text_vocab = 600            # merges of SmolLM2's BPE: with all of them one dev token in ten never occurs
rows_from_text = True       # else the model does not begin to listen in the time that we have
new_rows = 5.0              # 2e-3 to 3e-3 for what SmolLM2 has never seen
semantic_asr = True         # without repetitions 50 frames a second become 30, and are learned faster
time_masks = 10             # as the recipes have it; without them 4 h are learned by heart: LOG.md
softmax = "grammar"
special_weight = 1.0
loss_region = "target"
prompt_len = 100            # 2 s of the voice
mixture = {"asr": 1.0}
max_audio_s = 30.0

# pieces of up to 5 words, then of up to 15, then whole utterances: align.py makes them
curriculum = {"data/libri-5": 0.05, "data/libri-15": 0.05}

row_frames = 1408           # some three utterances a step
batch_rows = 1
grad_accum = 1
shard = 1
max_steps = 800
warmup = 0.02
decay = 0.5
final_lr = 0.0
lr = 4e-4
checkpointing = False
save_every = 100
eval_every = 50
temperature = 0.5
acoustic_temperature = 0.7
max_speech_s = 20.0
tts_utterances = 40
