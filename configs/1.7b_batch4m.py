# Ablation of the paper: batches four times as large, for the same number of frames (it found 1M frames
# better).
parent = "1.7b.py"
out_dir = "out/1.7b_batch4m"
batch_rows = 512            # x 8,192 = 4,194,304 frames; 8 GPUs: 8 x 64
grad_accum = 64
max_steps = 125_000
