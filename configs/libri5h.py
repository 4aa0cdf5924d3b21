# Recognition of real speech in two hours of two cores with bf16: SmolLM2-135M, Whisper-base's encoder,
# k-means, four hours of LibriSpeech and five of synthetic voices. docs/real_run.md has the commands that make
# its data, and what came of it.
parent = "135m.py"
out_dir = "out/libri5h"
lower = True                # LibriSpeech is all capitals, which SmolLM2 reads badly
text_vocab = 600            # merges of SmolLM2's BPE: with all of them few tokens come often enough
rows_from_text = True       # else the model does not begin to listen in the time that we have
new_rows = 5.0              # 2e-3 for what SmolLM2 has never seen
semantic_asr = True         # without repetitions 50 frames a second become 30, and are learned faster
recombine_frames = 420      # pieces of one speaker, from anywhere, joined: no sentence comes twice
time_masks = 0              # each recording is heard once or so: nothing is learned by heart
softmax = "grammar"
special_weight = 1.0
loss_region = "target"
mixture = {"asr": 1.0, "text": 0.25}    # most of the text is prose that nobody spoke: it forgets less

# all of it, and its speech cut into pieces of up to 15 and of up to 5 words: align.py makes them
datasets = {"data/libri": 0.6, "data/libri-15": 0.3, "data/libri-5": 0.1}
curriculum = {"data/libri-5": 0.04, "data/libri-15": 0.04}      # before, and alone

row_frames = 1408           # some three utterances a step
batch_rows = 1
grad_accum = 1
shard = 1
max_steps = 1500
warmup = 0.01
decay = 0.8
final_lr = 0.0
lr = 4e-4
checkpointing = False
save_every = 100
eval_every = 100
