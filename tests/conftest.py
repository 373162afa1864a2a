"""One thread: on tiny tensors several threads on few cores wait for each other more than they compute."""

import torch

torch.set_num_threads(1)
