"""vLLM beside our own sampler on a random model of the second family: a process has one engine.

Wide features enter with the prompt and between turns; then weights are changed in place.

    python -m tests.helpers.vllm_family MODEL_FOLDER CLIP
"""

import sys
from pathlib import Path

import numpy as np
import torch

from nanosport.engine.players import Room, load_sampler, make_sampler
from nanosport.engine.sampler import Piece, Sampling
from nanosport.env.tools import STOPS
from nanosport.records import Clip

GREEDY = Sampling(0.0, max_new_tokens=24, stops=STOPS)


def main() -> None:
    folder, clip = Path(sys.argv[1]), Clip(sys.argv[2])
    encoder, ours = load_sampler(folder, GREEDY)
    theirs, cfg = make_sampler("vllm", folder, ours.model, GREEDY, Room(512, 8)), ours.model.cfg
    image = [cfg.image_token_id] * encoder.tokens_per_frame(clip)
    shown = [cfg.vision_start_token_id, *image, cfg.vision_end_token_id]

    def piece(text: int, *indices: int) -> Piece:
        ids = [text, *(token for _ in indices for token in (text + 1, *shown)), text + 2]
        grids = [encoder.grid(clip)] * len(indices)
        return Piece(ids, grids, [(clip, index) for index in indices], encoder)

    def play(sampler) -> list[tuple]:
        """Two turns of each of four conversations, with frames before each."""
        streams = [np.random.default_rng(k) for k in range(4)]
        numbers = sampler.open(piece(900, 0, 30), streams)
        first = dict(sampler.turns())
        for k, number in enumerate(numbers):
            sampler.say(number, piece(910, 10 + 5 * k))
        second = dict(sampler.turns())
        for number in numbers:
            sampler.close(number)
        return [(first[n], second[n]) for n in numbers]

    def compare() -> list:
        wanted, got = play(ours), play(theirs)
        said = [[turn.ids for turn in turns] for turns in wanted]
        assert [[turn.ids for turn in turns] for turns in got] == said
        for some, others in zip(wanted, got):
            for a, b in zip(some, others):
                assert np.allclose(a.sampled_logp, b.sampled_logp, rtol=0, atol=1e-4)
        assert len({turns[1] for turns in map(tuple, said)}) > 1, "frames must matter"
        return said

    before, model = compare(), ours.model
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.model.parameters():
            weight.add_(0.3 * weight.abs().mean() * torch.randn_like(weight))
    named = [(n, w) for n, w in model.named_parameters() if not n.startswith("visual.")]
    theirs.load_weights([(cfg.published_name(name), weight) for name, weight in named], 1)
    assert compare() != before
    print("alike")


if __name__ == "__main__":
    main()
