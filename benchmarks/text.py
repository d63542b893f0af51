"""How well a model follows words: R-precision among names it never met, and distances.

    python benchmarks/text.py runs/emoji --data shared/data/emoji128-train.parquet \
        --validation shared/data/emoji128-validation.parquet --features MODEL

Some held-out names are drawn by the seed, and images are made of each: of its text, of its class (where the
model has classes), of both, and of nothing. An image counts as right at 1 if its nearest real held-out image
of those names, in the features, has the name that was asked for, and at 5 if the name is among the 5 nearest.
Chance is 1 and 5 over the number of names. "real" is the share for the real images themselves, each judged by
the others. The distance is the MMD of images made of the training set's own texts, of its classes in turn, or
of nothing, against the training set.
"""

import argparse
import json

import torch

from lediflow import UserError
from lediflow.data.images import ImageData
from lediflow.devices import check_device
from lediflow.evaluation.measure import notes_of
from lediflow.evaluation.request import drawn_prompts, texts_of
from lediflow.evaluation.tables import markdown_table
from lediflow.metrics.bootstrap import estimate_mean, resampled
from lediflow.metrics.features import open_features
from lediflow.metrics.retrieval import name_ranks, r_precision
from lediflow.metrics.scores import RealFeatures, distances
from lediflow.networks.text import plain_words
from lediflow.pipelines.load import load_pipeline

COLUMNS = ("text", "caption")


def one_name(text):
    """What tells names apart: "gem stone" and "gemstone" are one."""
    return plain_words(text).replace(" ", "")


def chosen_names(texts, count, seed):
    """Draw names that at least two real images have: {what tells it apart: its first text, in words}."""
    found = {}
    for text in texts:
        found.setdefault(one_name(text), []).append(text)
    several = sorted(name for name, of in found.items() if name and len(of) > 1)
    if len(several) < count:
        raise UserError(f"only {len(several)} held-out names have two images or more; give --names fewer")
    order = torch.randperm(len(several), generator=torch.Generator().manual_seed(seed))
    # the text with most words: one that is written in one word says less
    return {
        several[i]: max(found[several[i]], key=lambda text: text.count(" ")) for i in order[:count].tolist()
    }


def features(network, pixels, batch_size):
    """Features (N, D) of images, batch by batch."""
    return torch.cat([network(pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size)])


def ways(pipeline, texts, labels):
    """What is asked for in each way, for images of these texts and classes."""
    found = {"text": {"prompt": texts}}
    if pipeline.flow.classes():
        found["class"] = {"class_labels": labels}
        found["text and class"] = {"prompt": texts, "class_labels": labels}
    return {**found, "nothing": {"prompt": ""}}


def real_shares(found, names):
    """Shares for real images, each judged by the others."""
    ranks = []
    for i in range(len(found)):
        rest = torch.arange(len(found)) != i
        ranks.append(name_ranks(found[i : i + 1], names[i : i + 1], found[rest], names[rest]))
    return torch.cat(ranks)


def measured(arguments):
    """Return the rows of the table."""
    device = check_device(arguments.device)
    pipeline = load_pipeline(arguments.model).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.reader is None:
        raise UserError(f"{arguments.model} was trained without text")
    columns = (arguments.column,) if arguments.column else COLUMNS
    channels, side, _ = pipeline(1, output_type="pt").images.shape[1:]
    options = {"image_size": side, "channels": channels, "texts": columns}
    (train, held_out), _ = notes_of(
        lambda: [ImageData(path, **options) for path in (arguments.data, arguments.validation)]
    )
    network, batch_size = open_features(arguments.features, device), arguments.batch_size
    strength = {"latent_guidance": arguments.guidance} if hasattr(pipeline, "sampler") else {}
    strength = strength or {"guidance": arguments.guidance}

    def made(count, seed, **told):
        told |= {} if told.get("prompt") == "" else strength
        return pipeline(count, seed=seed, batch_size=batch_size, output_type="pt", **told).images

    names = chosen_names(held_out.texts, arguments.names, arguments.seed)
    number = {name: i for i, name in enumerate(names)}
    rows = [i for i, text in enumerate(held_out.texts) if one_name(text) in number]
    real = features(network, held_out.images[rows], batch_size)
    real_names = torch.tensor([number[one_name(held_out.texts[i])] for i in rows])
    first = {
        int(name): int(held_out.labels[row])
        for name, row in reversed(list(zip(real_names, rows, strict=True)))
    }
    classes = [first[i] for i in range(len(names))]
    count = len(names) * arguments.images
    asked = torch.arange(count) % len(names)
    counts = resampled(count, 200, seed=arguments.seed)

    found = []
    reference = RealFeatures.of(features(network, train.images, batch_size))
    prompts = drawn_prompts(texts_of(arguments.data, columns), range(arguments.num_images), arguments.seed)
    whole = ways(pipeline, prompts, None)
    for way, told in ways(pipeline, list(names.values()), classes).items():
        ranks = name_ranks(
            features(network, made(count, arguments.seed, **told), batch_size), asked, real, real_names
        )
        shares = {f"R@{k}": estimate_mean(r_precision(ranks, k), counts) for k in (1, 5)}
        row = {
            name: f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f})" for name, share in shares.items()
        }
        if way in ("text", "class", "nothing"):
            images = features(
                network, made(arguments.num_images, arguments.seed + 1, **whole[way]), batch_size
            )
            (scores, _) = notes_of(
                lambda images=images: distances(network, images, reference, replicates=0, seed=0)
            )
            row["distance"] = f"{scores[network.headline].value:.4g}"
        found.append({"made of": way, **row})
    ranks = real_shares(real, real_names)
    found.append({"made of": "real", **{f"R@{k}": f"{r_precision(ranks, k).mean():.3f}" for k in (1, 5)}})
    return found


def main():
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="run folder, saved pipeline or Hub id")
    parser.add_argument("--data", required=True, help="DATASET it was trained on")
    parser.add_argument("--validation", required=True, help="DATASET of other names")
    parser.add_argument("--features", required=True, help="folder or Hub id of a vision model")
    parser.add_argument("--column", help="of the texts; default: text or caption")
    parser.add_argument("--names", type=int, default=50, help="held-out names")
    parser.add_argument("--images", type=int, default=8, help="generated images of each name")
    parser.add_argument("--num-images", type=int, default=1000, help="generated images behind a distance")
    parser.add_argument("--guidance", type=float, help="of the latent sampler, or of a flow without one")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        rows = measured(arguments)
    except UserError as error:
        parser.error(str(error))
    if arguments.json:
        print(json.dumps(rows))
        return
    columns = ["made of", "R@1", "R@5", "distance"]
    print(markdown_table(columns, [[row.get(name, "") for name in columns] for row in rows]))


if __name__ == "__main__":
    main()
