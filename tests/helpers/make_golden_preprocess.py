"""Makes golden_preprocess.json with the published processor; needs torchvision and Pillow (the
project does not):

python -m venv golden && golden/bin/pip install torch==2.13.0 transformers==5.23.0 pillow
golden/bin/pip install --no-deps torchvision
golden/bin/python tests/helpers/make_golden_preprocess.py
"""

import hashlib
import json
from pathlib import Path

import torch

# A CUDA wheel's own ops do not load on the CPU; only their names are needed.
library = torch.library.Library("torchvision", "DEF")
for op in ("nms", "qnms"):
    library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

SIZES = (
    (97, 131),
    (360, 640),
    (16, 16),
    (197, 353),
)  # height, width; odd, usual, below min_pixels, odd
BOUNDS = (
    (3136, 12845056),
    (3136, 50176),
)  # min and max pixels: the published ones, and a cap that shrinks
RESIZED = (
    (16, 16),
    (1, 1),
    (28, 1920),
    (1920, 28),
    (5, 900),
    (197, 353),
    (1080, 1920),
    (42, 42),
    (3, 600),
    (224, 225),
)


def image(height: int, width: int) -> torch.Tensor:
    """(3, H, W) uint8 by formula: smooth in one direction, busy in the other."""
    c, y, x = torch.meshgrid(
        torch.arange(3), torch.arange(height), torch.arange(width), indexing="ij"
    )
    return ((x * x * (c + 1) + 7 * y * x + 13 * y + 31 * c) % 256).to(torch.uint8)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def main():
    import torchvision
    import transformers
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import (
        Qwen2VLImageProcessor,
        smart_resize,
    )

    cases = []
    for low, high in BOUNDS:
        for size in SIZES:
            out = Qwen2VLImageProcessor(min_pixels=low, max_pixels=high)(
                images=[image(*size)], return_tensors="pt"
            )
            patches = out["pixel_values"]
            assert patches.dtype == torch.float32
            values = {
                str(i): patches.flatten()[i].item() for i in (0, 1, 196, 1176, patches.numel() - 1)
            }
            grid = out["image_grid_thw"][0].tolist()
            cases.append(
                {
                    "size": size,
                    "bounds": [low, high],
                    "grid": grid,
                    "sha256": digest(patches),
                    "values": values,
                }
            )
    resized = [(size, smart_resize(*size, 28, 3136, 50176)) for size in RESIZED]
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, transformers {transformers.__version__}"
    record = {
        "made_by": f"tests/helpers/make_golden_preprocess.py: Qwen2VLImageProcessor, {versions}, CPU",
        "smart_resize": resized,
        "cases": cases,
    }
    Path(__file__).with_name("golden_preprocess.json").write_text(
        json.dumps(record, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
