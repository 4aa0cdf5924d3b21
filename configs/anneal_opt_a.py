# Annealing, composition A: python anneal.py configs/anneal_opt_a.py --init_from=out/1.7b/step_0500000
# Known (arXiv 2506.17611, Table 3): LibriSpeech and FLEURS, beside four other corpora of
# high quality that B has too; 85k steps, the rate in a line to zero; spliced long-form examples among them.
# Unknown: the other four, the weights, how long a splice may be, whether the batch changes. We guess, below.
# FLEURS names no speakers, so each of its clips is one: none is spliced, and its voice prompt is cut from the
# clip itself, as in the recipe wherever a speaker has one utterance. LibriSpeech makes the long examples.
# In the paper's table A gives 5.1 % TTS WER in its domain and 15.5 % out of it, without annealing 21.7 %.
datasets = {"data/librispeech": 1.0, "data/fleurs": 1.0}    # folders that prepare.py made, and their weights
max_steps = 85_000
splice_frames = 1500        # guess: joined up to 30 s, which the rows of the pre-training hold
