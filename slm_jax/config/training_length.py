"""Figures on the length of a training, for the rule of `--size` and for the expectations that a run prints."""

TOKENS_PER_PARAMETER = 20  # best use of a given amount of computation (arXiv:2203.15556)
MAX_EPOCHS = 4  # a text read up to four times is nearly as good as fresh text (arXiv:2305.16264)
