"""Figures like the paper's 5 and 6, of a run and held-out pictures of what it was trained on.

    python benchmarks/editing_figures.py runs/demo --data digits --output figures

interpolation.png  between pairs of pictures: along z, then along the noise w, each a row
variants.png       the picture; z changed and the noise kept (5); z kept and the noise changed (5)
inpainting.png     the picture, what the model keeps, and the same two ways of changing what was masked
restyling.png      collages of flat squares, and what the model makes of them at three strengths
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from editing import held_out

from lediflow import load_pipeline
from lediflow.pictures import image_grid

EACH = 5
TENSOR = {"output_type": "pt"}


def interpolation(pipe, images):
    rows = []
    for a, b in zip(images[::2], images[1::2], strict=True):
        for space, path in (("latent", "linear"), ("noise", "slerp")):
            way = pipe.interpolate(a, b, num_images=2 * EACH - 1, space=space, path=path, **TENSOR)
            rows.append(torch.cat([a[None], way.images, b[None]]))
    return rows


def variants(pipe, images):
    rows = []
    for y in images:
        z = pipe.vary(y, 0.5, num_images=EACH, constant_noise=True, **TENSOR).images
        noise = pipe.vary(y, 0.0, num_images=EACH, **TENSOR).images
        rows.append(torch.cat([y[None], z, noise]))
    return rows


def inpainting(pipe, images):
    side, rows = images.shape[-1], []
    for i, y in enumerate(images):
        mask = torch.zeros(side, side)
        half, first = side // 2, i % 2 * (side // 2)
        mask[first : first + half] = 1  # above, below
        if i % 4 > 1:
            mask = mask.T
        shown = torch.where(mask.bool(), torch.zeros_like(y), y)
        z = pipe.inpaint(y, mask, strength=0.5, num_images=EACH, constant_noise=True, **TENSOR).images
        noise = pipe.inpaint(y, mask, num_images=EACH, **TENSOR).images
        rows.append(torch.cat([y[None], shown[None], z, noise]))
    return rows


def restyling(pipe, images):
    collages = F.interpolate(F.adaptive_avg_pool2d(images, 8), images.shape[-2:])
    return [
        torch.cat(
            [collage[None]]
            + [pipe.restyle(collage, strength=s, num_images=3, **TENSOR).images for s in (0.3, 0.5, 0.7)]
        )
        for collage in collages
    ]


FIGURES = {f.__name__: f for f in (interpolation, variants, inpainting, restyling)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder of a LeDiFlow model of pixels")
    parser.add_argument("--data", required=True, help="dataset that the run was trained on")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--first", type=int, default=0, help="first of the pictures")
    parser.add_argument("--rows", type=int, default=4, help="how many pictures, an even number")
    parser.add_argument("--scale", type=int, default=1, help="enlarge pixels so many times")
    parser.add_argument("--output", type=Path, required=True)
    a = parser.parse_args()
    pipe = load_pipeline(a.run)
    pipe.set_progress_bar_config(disable=True)
    images = held_out(pipe, a.data, a.split, a.first + a.rows)[a.first :]
    a.output.mkdir(parents=True, exist_ok=True)
    for name, figure in FIGURES.items():
        image_grid(figure(pipe, images), scale=a.scale).save(a.output / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
