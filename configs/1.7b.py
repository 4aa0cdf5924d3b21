# OpusLM on SmolLM2-1.7B: config.json of HuggingFaceTB/SmolLM2-1.7B; all else as for 135M.
parent = "135m.py"
out_dir = "out/1.7b"
init_from = "HuggingFaceTB/SmolLM2-1.7B"
n_layer = 24
n_head = 32
n_kv_head = 32
d_model = 2048
d_ff = 8192
rope_theta = 1.3e5
checkpointing = True        # recipe
