# Ablation: acoustic tokens alone, eight streams, the first level in stream 0; each weighs 1/8.
parent = "1.7b.py"
out_dir = "out/1.7b_acoustic"
token_streams = "acoustic"
