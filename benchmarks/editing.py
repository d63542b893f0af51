"""What editing is worth on held-out pictures: reconstruct, invert, interpolate, vary, inpaint, restyle.

    python benchmarks/editing.py runs/flowers --data photos --features FOLDER
    python benchmarks/editing.py runs/demo --data digits --features FOLDER --images 64 --only inpainting

The features are those of a vision network (a folder or Hub id of transformers). LPIPS is measured where the
package lpips imports, Telea's inpainting where OpenCV does. Plain flow matching is RUN/baseline, where it was
trained. Prints a table for each part, and with --output writes results.json.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lediflow import LeDiFlowPipeline, UserError, load_pipeline, ode
from lediflow.conditions import Conditions
from lediflow.data.images import ImageData
from lediflow.evaluation.tables import markdown_table
from lediflow.metrics.features import open_features
from lediflow.metrics.manifold import manifold
from lediflow.metrics.pairs import Lpips, psnr, ssim
from lediflow.pictures import to_float, to_uint8
from lediflow.pipelines.photos import filled
from lediflow.sources import image_noise

FRAMES = 9
SOLVERS = {"euler": (8, 32), "midpoint": (2, 4, 8, 16), "rk4": (4, 8), "dopri5": (1,)}


def mean(values):
    return round(float(values.double().mean()), 4)


def rms(values):
    return round(float(values.double().square().mean().sqrt()), 4)


def few_evaluations(pipe):
    """Solver and steps of 1, 2 and 4 evaluations of the flow."""
    one = "mean" if pipe.flow.average_velocity else "euler"
    return {1: (one, 1), 2: ("midpoint", 1), 4: ("midpoint", 2)}


def reconstruction(pipe, images, **_):
    """How like the picture is what comes back, from the prior's mean to four evaluations."""
    try:
        lpips = Lpips()
    except UserError:
        lpips = None
    rows = {}
    for evaluations, (solver, steps) in few_evaluations(pipe).items():
        out = pipe.reconstruct([*images], solver=solver, steps=steps, output_type="pt")
        rows.setdefault("mean of the prior", out.prior_mean)
        rows.setdefault("sample of the prior", out.prior_sample)
        rows[f"flow, {ode.in_words(solver, steps)}: NFE {evaluations}"] = out.images
    return [
        {"made by": name, "PSNR": mean(psnr(made, images)), "SSIM": mean(ssim(made, images))}
        | ({"LPIPS": mean(lpips(made, images))} if lpips else {})
        for name, made in rows.items()
    ]


@torch.no_grad()
def inversion(pipe, images, **_):
    """Relative errors of w -> z -> w, and of picture -> x -> picture."""
    few = images[:16]
    w = image_noise(pipe.auxiliary.z_shape, seed=0, indices=range(len(few)), stream="w")
    z = pipe.encode(few).mean
    rows = []
    for solver, all_steps in SOLVERS.items():
        for steps in all_steps:
            how = {"solver": solver, "steps": steps}
            there = pipe.sample_z(w, **how)
            back = pipe.invert_z(there.end, **how)
            flow = pipe.flow_field(Conditions(z=z))
            x = ode.integrate(flow, few, reverse=True, **how)
            again = pipe.carry(x.end, z, **how)
            rows.append(
                {
                    "solver": ode.in_words(solver, steps),
                    "evaluations there and back": there.nfe + back.nfe,
                    "w -> z -> w": f"{float((back.end - w).norm() / w.norm()):.1e}",
                    "image -> x -> image": f"{float((again.end - few).norm() / few.norm()):.1e}",
                }
            )
    return rows


def interpolation(pipe, images, features, real, pairs, **_):
    """Perceptual path length, evenness of the steps, and share of images inside the real set."""
    rows = []
    ends = [*images[: 2 * pairs]]
    base = features(pipe.reconstruct(ends, output_type="pt").images)
    rows.append({"way": "the ends, reconstructed", "inside the real set": inside(base, real)})
    sampled = features(pipe(len(ends), output_type="pt").images)
    rows.append({"way": "new images", "inside the real set": inside(sampled, real)})
    for space in ("latent", "noise"):
        for path in ("linear", "slerp"):
            options = {"num_images": FRAMES, "space": space, "path": path, "output_type": "pt"}
            found = [
                features(pipe.interpolate(a, b, **options).images)
                for a, b in zip(ends[::2], ends[1::2], strict=True)
            ]
            steps = torch.stack([f.diff(dim=0).norm(dim=1) for f in found]).double()
            middle = torch.cat([f[FRAMES // 4 : -(FRAMES // 4)] for f in found])
            rows.append(
                {
                    "way": f"{space}, {path}",
                    "path length": mean((steps * (FRAMES - 1)).square()),
                    "longest step / mean": mean(steps.amax(1) / steps.mean(1)),
                    "inside the real set": inside(middle, real),
                }
            )
    return rows


def variation(pipe, images, features, real, **_):
    """How far variants are from their picture, by strength, and how many are inside the real set."""
    originals = features(images)
    others = originals.roll(1, dims=0)
    rows = [{"way": "another picture", "feature distance": mean((others - originals).norm(dim=1))}]
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        how = {"strength": strength, "num_images": 1, "output_type": "pt"}
        made = features(torch.cat([pipe.vary(y, seed=k, **how).images for k, y in enumerate(images)]))
        rows.append(
            {
                "way": f"strength {strength:g}",
                "feature distance": mean((made - originals).norm(dim=1)),
                "inside the real set": inside(made, real),
            }
        )
    return rows


def inside(features, real):
    return mean(manifold(features, real).precision)


def inpainting(pipe, images, features, real, baseline, **_):
    """A square in the middle made anew: what is outside, the seam, and how good the inside is."""
    side = images.shape[-1]
    mask = torch.zeros(1, 1, side, side, dtype=torch.bool)
    mask[..., side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = True
    known = to_float(to_uint8(images))
    originals = features(known)
    real_seam = seam(known, mask)
    ways = {
        "LeDiFlow, the hidden part seen": lambda y, k: pipe.inpaint(y, mask[0], seed=k, output_type="pt"),
        "the same, strength 0.5": lambda y, k: pipe.inpaint(
            y, mask[0], strength=0.5, seed=k, output_type="pt"
        ),
        "LeDiFlow, the hidden part not seen": lambda y, k: pipe.inpaint(
            y, mask[0], masked_content="fill", seed=k, output_type="pt"
        ),
    }
    if baseline is not None:
        for steps in (2, 8):
            ways[f"flow matching, {steps} midpoint steps"] = lambda y, k, steps=steps: baseline.inpaint(
                y, mask[0], seed=k, solver="midpoint", steps=steps, output_type="pt"
            )
    made = {name: torch.cat([way(y, k).images for k, y in enumerate(known)]) for name, way in ways.items()}
    made["smooth filling"] = filled(known, mask)
    made |= telea(known, mask)
    return [
        {
            "way": name,
            "largest change outside": largest_change(x, known, ~mask[0, 0]),
            "seam": mean(seam(x, mask) / real_seam),
            "PSNR inside": mean(psnr(crop(x, mask), crop(known, mask))),
            "feature distance": mean((features(x) - originals).norm(dim=1)),
            "inside the real set": inside(features(x), real),
        }
        for name, x in made.items()
    ]


def largest_change(x, y, where):
    return int((to_uint8(x).int() - to_uint8(y).int())[..., where].abs().max())


def seam(images, mask):
    """Mean difference of neighbours on both sides of the mask's edge, a number for all images."""
    total, count = 0.0, 0
    for axis in (-1, -2):
        edge = mask.float().diff(dim=axis).abs() > 0
        total += (images.diff(dim=axis).abs() * edge).double().sum()
        count += int(edge.sum()) * images.shape[0] * images.shape[1]
    return total / count


def crop(images, mask):
    rows, columns = mask[0, 0].any(1), mask[0, 0].any(0)
    return images[:, :, rows][..., columns]


def telea(images, mask):
    """Fast marching (Telea 2004), where OpenCV is installed."""
    try:
        import cv2
    except ImportError:
        return {}
    hole = mask[0, 0].to(torch.uint8).numpy()
    made = []
    for image in to_uint8(images).movedim(1, -1).numpy():
        done = cv2.inpaint(np.ascontiguousarray(image), hole, 3, cv2.INPAINT_TELEA)
        made.append(torch.from_numpy(done.reshape(image.shape)).movedim(-1, 0))
    return {"Telea (OpenCV)": to_float(torch.stack(made))}


def restyling(pipe, images, features, real, baseline, **_):
    """Collages of 8x8 flat squares made into pictures: how like the real ones, and how like the collage."""
    collages = F.interpolate(F.adaptive_avg_pool2d(images, 8), images.shape[-2:])
    wanted = F.adaptive_avg_pool2d(images, 8)
    rows = [{"way": "the collages", "inside the real set": inside(features(collages), real)}]
    ways = [("LeDiFlow", pipe, solver, steps) for solver, steps in few_evaluations(pipe).values()]
    ways += [("flow matching", baseline, "midpoint", n) for n in (1, 4)] if baseline is not None else []
    for strength in (0.3, 0.5, 0.7):
        for name, model, solver, steps in ways:
            how = {"solver": solver, "steps": steps, "strength": strength, "output_type": "pt"}
            outputs = [model.restyle(y, seed=k, **how) for k, y in enumerate(collages)]
            made = torch.cat([out.images for out in outputs])
            rows.append(
                {
                    "way": f"{name}, {ode.in_words(solver, steps)}, strength {strength}",
                    "evaluations of the flow": outputs[0].nfe["flow"],
                    "inside the real set": inside(features(made), real),
                    "difference in 8x8": mean(
                        (F.adaptive_avg_pool2d(made, 8) - wanted).square().mean().sqrt()
                    ),
                }
            )
    return rows


PARTS = {f.__name__: f for f in (reconstruction, inversion, interpolation, variation, inpainting, restyling)}


def held_out(pipe, dataset, split, count):
    channels, height, _ = pipe.sample_shape
    if pipe.config.codec_space:
        raise UserError("this benchmark is for models of pixels")
    data = ImageData(dataset, split=split, image_size=height, channels=channels, flip=False)
    batches = []
    for batch in data.in_order(64):
        batches.append(batch)
        if sum(map(len, batches)) >= count:
            break
    return torch.cat(batches)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder of a LeDiFlow model")
    parser.add_argument("--data", required=True, help="dataset that the run was trained on")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--features", required=True, help="folder or Hub id of a vision network")
    parser.add_argument("--images", type=int, default=256, help="held-out pictures")
    parser.add_argument("--pairs", type=int, default=32, help="of pictures to go between")
    parser.add_argument("--only", default="", help=f"comma-separated: {', '.join(PARTS)}")
    parser.add_argument("--output", type=Path, help="folder for results.json")
    a = parser.parse_args()
    try:
        pipe = load_pipeline(a.run)
        if not isinstance(pipe, LeDiFlowPipeline):
            raise UserError(f"{a.run} is no LeDiFlow model")
        folder = Path(a.run) / "baseline"
        baseline = load_pipeline(folder) if folder.exists() else None
        for pipeline in (pipe, baseline):
            if pipeline is not None:
                pipeline.set_progress_bar_config(disable=True)
        images = held_out(pipe, a.data, a.split, a.images)
        network = open_features(a.features, "cpu")

        def features(x):
            return torch.cat([network(part) for part in x.split(32)])

        real = features(images)
        wanted = [name for name in a.only.split(",") if name] or list(PARTS)
        context = {"features": features, "real": real, "baseline": baseline}
        results = {}
        for name in wanted:
            print(f"{name} ...", file=sys.stderr, flush=True)
            results[name] = PARTS[name](pipe, images, pairs=min(a.pairs, len(images) // 2), **context)
            rows = results[name]
            head = list(dict.fromkeys(key for row in rows for key in row))
            print(f"\n{PARTS[name].__doc__}\n")
            print(
                markdown_table(head, [[row.get(key, "") for key in head] for row in results[name]]),
                flush=True,
            )
    except UserError as error:
        sys.exit(f"error: {error}")
    if a.output is not None:
        a.output.mkdir(parents=True, exist_ok=True)
        (a.output / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
