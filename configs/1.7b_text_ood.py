# Ablation of the paper: the same speech, but text from another source than the base LLM's own training text.
# It reports that this costs most of what the LLM knew (MMLU 46.0 -> 30.5).
parent = "1.7b.py"
out_dir = "out/1.7b_text_ood"
corpus = "data/manifest_text_ood.tsv"
