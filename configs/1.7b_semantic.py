# Ablation: semantic tokens alone, one stream; it recognises, but what it says has no sound.
parent = "1.7b.py"
out_dir = "out/1.7b_semantic"
token_streams = "semantic"
