# OpusLM on SmolLM2-135M. Shape: config.json of HuggingFaceTB/SmolLM2-135M. Training: OpusLM (arXiv
# 2506.17611, "paper" below) where it says it, else the configuration files of its ESPnet recipes
# ("recipe"). It needs data: a manifest of your own (see README), and real hardware. Not run by us in full.
out_dir = "out/135m"
corpus = "data/manifest.tsv"

# ---- body: the base LLM, exactly; a difference is an error at the start
init_from = "HuggingFaceTB/SmolLM2-135M"
text_model = "base"         # its tokenizer: 49,152 text tokens
model_type = "llama"
n_layer = 30
n_head = 9
n_kv_head = 3
d_model = 576
d_ff = 1536
rope_theta = 1e5
norm_eps = 1e-5

# ---- tokens: 5000 semantic clusters, 8 levels of 1024 acoustic codes (paper)
n_semantic = 5000
n_acoustic = 1024
n_level = 8
prompt_len = 500            # 10 s of the voice (recipe: speaker_prompt_length)

# ---- loss
loss_region = "whole"       # recipe, pre-training: all but pads is learned
special_weight = 10.0       # recipe, pre-training: modality_weights; text 1, semantic 1/2, acoustic 1/16
time_masks = 10             # recipe: SpecAugment of recognition, each of 0 to 5 % of the speech
softmax = "original"        # recipe: stream 0 over all ids, streams 1..8 over all acoustic ids
mixture = {"asr": 1.0, "tts": 1.0, "speech": 1.0, "text": 1.0}      # proportions: unknown, so even ones

# ---- batch: 1M frames a step (paper)
#   128 rows x 8,192 frames = 1,048,576.   8,192 is n_ctx of the recipe, a row holds many utterances.
#    8 GPUs: 128 rows = 8 x 16, grad_accum = 16, one row a GPU at a time
#   24 GPUs: 120 rows = 24 x 5, batch_rows = 120, grad_accum = 5:  983,040 frames
#   64 GPUs: 128 rows = 64 x 2, grad_accum = 2
row_frames = 8192
batch_rows = 128
grad_accum = 16

# ---- schedule and optimiser
max_steps = 500_000         # paper: 500k updates, 5.2e11 frames
warmup = 0.05               # recipe: 25k steps up to the peak, then linear
decay = 0.95
final_lr = 0.1              # recipe: 2e-5 of 2e-4 is left, where annealing takes over
lr = 2e-4                   # recipe: SmolLM2
muon_lr = 0.0               # AdamW for everything (recipe)
beta1, beta2 = 0.9, 0.95    # recipe
weight_decay = 3e-7         # recipe
clip = 1.0                  # recipe
save_every = 5000           # recipe: an epoch
eval_every = 5000

# ---- decoding (recipe, later models)
temperature = 0.8
acoustic_temperature = 0.8
top_k = 30
max_speech_s = 40.96        # 2,048 frames
