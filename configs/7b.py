# OpusLM on OLMo-2 7B: config.json of allenai/OLMo-2-1124-7B; all else as for 135M.
parent = "135m.py"
out_dir = "out/7b"
init_from = "allenai/OLMo-2-1124-7B"        # 100,352 text tokens
model_type = "olmo2"
n_layer = 32
n_head = 32
n_kv_head = 32
d_model = 4096
d_ff = 11008
rope_theta = 5e5
norm_eps = 1e-6             # Hugging Face's; some descriptions of the published checkpoint say 1e-5
lr = 1e-4                   # recipe: OLMo-2
final_lr = 0.2              # 2e-5 is left
checkpointing = True        # recipe; without it a row of 8,192 frames needs four times the memory
