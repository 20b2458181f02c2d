"""Figures on the length of a training, for the rule of `--size` and for the expectations that a run prints."""

TOKENS_PER_PARAMETER = 20  # best use of a given amount of computation (arXiv:2203.15556)
MAX_EPOCHS = 4  # a text read up to four times is nearly as good as fresh text (arXiv:2305.16264)

# Epochs of a small text with dropout and an early stop (--size auto).
# On 100 kB of English prose (one seed, bits per byte held out): 0.9 M parameters with dropout 0.1, 300 steps, 8.7
# epochs 2.05; 0.44 M, 239 steps 2.14; 1.1 M without dropout, 4 epochs 2.11; with a constant rate the best of 26 epochs
# was the ninth (2.14), the last had 2.79.
AUTO_EPOCHS = 8
