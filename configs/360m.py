# OpusLM on SmolLM2-360M: config.json of HuggingFaceTB/SmolLM2-360M; all else as for 135M.
parent = "135m.py"
out_dir = "out/360m"
init_from = "HuggingFaceTB/SmolLM2-360M"
n_layer = 32
n_head = 15
n_kv_head = 5
d_model = 960
d_ff = 2560
