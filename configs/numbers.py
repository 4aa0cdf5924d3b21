# Spoken numbers: recognition and synthesis from scratch on two CPU cores, in minutes.
out_dir = "out/numbers"
