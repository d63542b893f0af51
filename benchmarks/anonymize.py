"""What `lediflow anonymize` is worth on held-out faces, and what its detector finds.

    python benchmarks/anonymize.py runs/faces --data faces.parquet --features FOLDER
    python benchmarks/anonymize.py --data faces.parquet --detector --grounds photos.parquet
    python benchmarks/anonymize.py --data faces.parquet --alignment

The first needs a trained LeDiFlow run. Each face is laid on a grey ground at 2.5 times the model's side,
found, and replaced. The features are those of a vision network (folder or Hub id of transformers), of the
ellipse that is replaced, grey around it. A row tells how alike a face is before and after (cosine, mean
over the faces), how often the original nearest to the result among all N is its own (a guess: 1/N), the
same with hair and ears in view, and in how many results the detector finds a face. Rows that replace
nothing stand for scale: the same face saved as JPEG again, and another person's.

--detector lays faces of several sizes into photos without people, and counts what is found and what is none.
--alignment measures where the faces lie in the pictures: `lediflow.faces.UTKFACE` for those of UTKFace.
"""

import argparse
import io
import json
import sys

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from lediflow import UserError
from lediflow.data.images import ImageData
from lediflow.evaluation.tables import markdown_table
from lediflow.faces import UTKFACE, FaceDetector, measure_alignment
from lediflow.metrics.features import open_features
from lediflow.pictures import to_pil
from lediflow.pipelines.face_regions import face_region
from lediflow.pipelines.load import load_pipeline

WAYS = [("original", s) for s in (0.0, 0.5, 1.0)] + [("fill", s) for s in (0.0, 0.5, 1.0)]
SIZES = (10, 14, 18, 22, 26, 32, 40, 64)
SCORES = (0.2, 0.3, 0.5)


def pictures(dataset, count, split, side):
    """The first pictures of a dataset, PIL, squares of a side."""
    data = ImageData(dataset, split=split, image_size=side, cache_gb=0)
    return to_pil(torch.stack([data[i]["image"] for i in range(min(count, len(data)))]).float() / 127.5 - 1)


def on_ground(face, side):
    """A face of a side in the middle of a grey square twice as large."""
    ground = Image.new("RGB", (2 * side, 2 * side), (128, 128, 128))
    ground.paste(face.resize((side, side), Image.Resampling.LANCZOS), (side // 2, side // 2))
    return ground


def jpeg(picture):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=60)
    return Image.open(io.BytesIO(file.getvalue()), formats=["JPEG"]).convert("RGB")


def looks(photos, found, features):
    """Unit features (N, D) of the ellipses that are replaced, and of the whole aligned squares."""
    inside, whole = [], []
    for photo, face in zip(photos, found, strict=True):
        region = face_region(face, UTKFACE)
        square = region.cut(photo)
        grey = Image.new("RGB", square.size, (128, 128, 128))
        whole.append(square)
        inside.append(Image.composite(square, grey, region.generated()))
    return unit_features(inside, features), unit_features(whole, features)


def unit_features(squares, features):
    small = [square.resize((128, 128), Image.Resampling.BICUBIC).tobytes() for square in squares]
    pixels = torch.stack([torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in small])
    images = pixels.view(-1, 128, 128, 3).movedim(-1, 1)
    return F.normalize(torch.cat([features(part) for part in images.split(50)]).double(), dim=1)


def nearest_is_own(before, after):
    return round(float(((after @ before.T).argmax(1) == torch.arange(len(before))).double().mean()), 4)


def row(name, before, after, found_again):
    """How alike faces are before and after; each is what `looks` returns."""
    return {
        "faces": name,
        "alike": round(float((before[0] * after[0]).sum(1).mean()), 4),
        "own original is nearest": nearest_is_own(before[0], after[0]),
        "with hair and ears": nearest_is_own(before[1], after[1]),
        "face found after": round(found_again, 4),
    }


def worth(run, faces, features, detector, options):
    """Rows for scale, then one for each way to replace the faces."""
    pipe = load_pipeline(run)
    pipe.set_progress_bar_config(disable=True)
    if not hasattr(pipe, "anonymize"):
        raise UserError(f"{run} is plain flow matching; give a LeDiFlow run")
    side = round(2.5 * pipe.sample_shape[1])
    photos = [on_ground(face, side) for face in faces]
    found = [max(detector(photo), key=lambda face: face.score, default=None) for photo in photos]
    kept = [i for i, face in enumerate(found) if face is not None]
    photos, found = [photos[i] for i in kept], [found[i] for i in kept]
    print(f"{len(kept)} of {len(faces)} faces found; side of a face {side} px", file=sys.stderr)
    before = looks(photos, found, features)
    yield row("saved as JPEG 60, the same face", before, looks([*map(jpeg, photos)], found, features), 1.0)
    yield row("another person's", before, [rows.roll(1, 0) for rows in before], 1.0)
    for content, strength in WAYS:
        told = {"masked_content": content, "strength": strength, **options}
        # the region that was found before, so that before and after are the same square
        after = [
            pipe.replace_faces(photo, [face_region(face, UTKFACE)], [i], **told)[0]
            for i, (photo, face) in enumerate(zip(photos, found, strict=True))
        ]
        again = sum(bool(detector(photo)) for photo in after) / len(after)
        yield row(f"{content}, strength {strength:g}", before, looks(after, found, features), again)


def recall(faces, grounds, detector):
    """For each size of faces the share that is found, by the least score; and what is found where none is."""
    wrong = [[f.score for f in detector(ground, least_score=min(SCORES))] for ground in grounds]
    cells = [(x, y) for y in range(40, 460, 100) for x in range(40, 460, 100)]
    oval = Image.new("L", (64, 64))
    ImageDraw.Draw(oval).ellipse((1, -2, 62, 66), fill=255)
    for size in SIZES:
        hits = dict.fromkeys(SCORES, 0)
        for number, ground in enumerate(grounds[:6]):
            picture = ground.resize((512, 512))
            for j, (x, y) in enumerate(cells):
                face = faces[(number * len(cells) + j) % len(faces)]
                cell = face.resize((size, size), Image.Resampling.LANCZOS)
                picture.paste(cell, (x, y), oval.resize((size, size)))
            found = detector(picture, least_score=min(SCORES))
            for score in SCORES:
                sure = [face for face in found if face.score > score]
                hits[score] += sum(any(_on(face, x, y, size) for face in sure) for x, y in cells)
        total = len(cells) * len(grounds[:6])
        yield {"side, px": size} | {f"score > {s}": round(hits[s] / total, 3) for s in SCORES}
    for name, count in (("found where none is", sum), ("photos with such a find", any)):
        yield {"side, px": name} | {
            f"score > {s}": sum(int(count(score > s for score in scores)) for scores in wrong) for s in SCORES
        }


def _on(face, x, y, size):
    middle = (face.box[0] + face.box[2]) / 2 - x, (face.box[1] + face.box[3]) / 2 - y
    return all(0 < place < size for place in middle)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", help="a trained LeDiFlow run")
    parser.add_argument("--data", required=True, help="DATASET of aligned faces, one in each picture")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--features", help="folder or Hub id of a vision model")
    parser.add_argument("--steps", type=int, help="of the flow")
    parser.add_argument("--solver", help="of the flow")
    parser.add_argument("--detector", action="store_true")
    parser.add_argument("--grounds", help="DATASET of photos without people, for --detector")
    parser.add_argument("--alignment", action="store_true")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    try:
        detector = FaceDetector()
        faces = pictures(a.data, a.images, a.split, 64)
        if a.alignment:
            print(measure_alignment(faces, detector))
            return
        if a.detector:
            if not a.grounds:
                raise UserError("--detector needs --grounds, photos without people")
            rows = list(recall(faces, pictures(a.grounds, 26, "train", 512), detector))
        elif a.run and a.features:
            given = {name: getattr(a, name) for name in ("steps", "solver") if getattr(a, name) is not None}
            rows = list(worth(a.run, faces, open_features(a.features, "cpu"), detector, given))
        else:
            raise UserError("give a run with --features FOLDER, or --detector, or --alignment")
    except UserError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(rows) if a.json else markdown_table(list(rows[0]), [list(r.values()) for r in rows]))


if __name__ == "__main__":
    main()
