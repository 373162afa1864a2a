"""nanosport: DeepSport (arXiv 2511.12908) in plain PyTorch, from video to gated tool-use RL."""
