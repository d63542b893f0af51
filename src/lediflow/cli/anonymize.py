"""`lediflow anonymize`: photos -> the same photos with other faces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lediflow.cli.editing import EditSolver, EditSteps, Images, listed_pictures
from lediflow.cli.options import (
    Classes,
    CodecFolder,
    Device,
    Dtype,
    FlowSolver,
    Json,
    Model,
    Steps,
)

if TYPE_CHECKING:
    from lediflow.pipelines.anonymize_files import PhotoFile


def anonymize(
    model: Model,
    images: Images,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for NAME.png; not where the originals are.")
    ],
    show: Annotated[
        bool, typer.Option("--show-boxes", help="Replace nothing: write NAME.boxes.png with what is found.")
    ] = False,
    boxes: Annotated[
        list[str] | None,
        typer.Option(metavar="X,Y,W,H", help="Where a face is, in pixels of one photo; may be given again."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="Picture of the size of one photo: white is replaced, each patch as a face."),
    ] = None,
    strength: Annotated[float, typer.Option(help="Of the change of z, 0 to 1.")] = 1.0,
    content: Annotated[
        str,
        typer.Option(
            help="fill: the model does not see the old face. original: it does, and the new one resembles it."
        ),
    ] = "fill",
    consistent: Annotated[
        bool, typer.Option("--consistent", help="Faces that look like one person's get the same new face.")
    ] = False,
    features: Annotated[
        str | None,
        typer.Option(
            help="Vision model to compare faces by, folder or Hub id; default: the model's own encoder.",
            show_default=False,
        ),
    ] = None,
    same_person: Annotated[
        float | None,
        typer.Option(
            help="Least cosine similarity of one person's faces; default 0.7, for the model's own encoder.",
            show_default=False,
        ),
    ] = None,
    smallest: Annotated[
        float | None,
        typer.Option(
            help="Smallest face to look for, pixels; default 25. Half of it takes four times the time.",
            show_default=False,
        ),
    ] = None,
    least_score: Annotated[
        float | None,
        typer.Option(
            help="How sure the detector must be, 0 to 1; default 0.2. Lower finds more, rightly or not.",
            show_default=False,
        ),
    ] = None,
    aligned_like: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            help="Pictures as the model was trained on, to see where faces lie in them; default: UTKFace.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run wrote.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the new faces; default: one that nobody knows.", show_default=False),
    ] = None,
    steps: Steps = None,
    solver: FlowSolver = None,
    latent_steps: EditSteps = None,
    latent_solver: EditSolver = None,
    classes: Classes = None,
    codec: CodecFolder = None,
    device: Device = None,
    dtype: Dtype = "fp32",
    as_json: Json = False,
) -> None:
    """Replace the faces in photos by faces that the model makes up.

    Finding them needs `pip install 'lediflow[faces]'`; with --boxes or --mask nothing is searched for. Pixels
    outside of the faces stay bit for bit, and metadata such as place and time are left out. No detector finds
    every face: look at each result before you hand it on.

    Leaves with 0 if faces were replaced in every photo, with 1 if one had none or could not be read.

    Examples:

        lediflow anonymize runs/faces photos/ --output anonymous --show-boxes

        lediflow anonymize runs/faces photos/ --output anonymous --consistent

        lediflow anonymize runs/faces party.jpg --output anonymous --boxes 40,30,64,80 --boxes 180,32,60,76
    """
    from lediflow.devices import DTYPES, check_device, settle_precision
    from lediflow.errors import UserError
    from lediflow.files import check_output
    from lediflow.pipelines.anonymize import SAME_PERSON
    from lediflow.pipelines.anonymize_files import SameFaces, anonymize_files, show_boxes
    from lediflow.pipelines.inpainting import check_strength
    from lediflow.pipelines.load import load_pipeline
    from lediflow.pipelines.recipes import tool_of

    place = check_device(device)
    number_format = settle_precision(dtype, place)
    check_strength(strength)
    files = photo_files(images, output, overwrite=overwrite or show)
    detector, find, mask_values = _finder(files, boxes, mask, smallest, least_score, aligned_like)
    check_output(output)
    if show:
        _tell(model, output, show_boxes(files, output, find, silent=as_json), as_json, preview=True)
        return
    pipeline: Any = load_pipeline(model).to(place)
    tool_of(pipeline, "anonymize", model)
    if codec is not None:
        pipeline.load_codec(codec)
    pipeline.set_progress_bar_config(disable=True)
    same = None
    if features and (same_person is None or not consistent):
        raise UserError(
            "--features goes with --consistent and --same-person: how alike one person's faces are "
            "depends on the network"
        )
    if consistent:
        least = SAME_PERSON if same_person is None else same_person
        same = SameFaces(_features(features, place), least)
    reports = anonymize_files(
        pipeline,
        files,
        output,
        find,
        alignment=_alignment(aligned_like, detector),
        seed=seed,
        same=same,
        mask=mask_values,
        silent=as_json,
        strength=strength,
        masked_content=content,
        steps=steps,
        solver=solver,
        latent_steps=latent_steps,
        latent_solver=latent_solver,
        class_labels=classes or None,
        dtype=DTYPES[number_format],
    )
    _tell(model, output, reports, as_json)


def photo_files(given: Sequence[Path], output: Path, *, overwrite: bool = False) -> list[PhotoFile]:
    """Return the photos that files and folders name, and claim a name in `output` for each.

    Folders are searched to any depth, and their subfolders kept. Where two photos would get the same name,
    `a.jpg` and `a.png`, the second becomes `a-2.png`.

    Raises:
        UserError: there is no such file, a folder has no pictures, `output` is where the originals lie, or
            what would be written is there already and `overwrite` is not set.
    """
    from lediflow.errors import UserError
    from lediflow.files import quoted, shown
    from lediflow.pipelines.anonymize_files import PhotoFile

    found: dict[Path, Path] = {}
    target = output.resolve()
    for one in given:
        for path in listed_pictures([one]):
            found.setdefault(path.resolve(), path.relative_to(one if one.is_dir() else one.parent))
        home = one.resolve() if one.is_dir() else one.resolve().parent
        if home.is_relative_to(target) or (one.is_dir() and target.is_relative_to(home)):
            raise UserError(
                f"the output {quoted(output)} and the originals in {quoted(one)} lie in one folder; give "
                "--output a folder of its own, so that no original is overwritten"
            )
    names: set[str] = set()
    files = []
    for path, name in found.items():
        free, count = name.with_suffix(".png"), 1
        while str(free).casefold() in names:
            count += 1
            free = name.with_name(f"{name.stem}-{count}.png")
        names.add(str(free).casefold())
        files.append(PhotoFile(path, free))
        target = (output / free).parent.resolve() / free.name  # a folder below may be a link
        if target in found:
            raise UserError(f"{quoted(output / free)} is an original; give another --output")
    there = [file.name for file in files if (output / file.name).exists()]
    if there and not overwrite:
        raise UserError(
            f"{shown(output / there[0])} is there already; give --overwrite to replace it, or another folder"
        )
    return files


def _finder(
    files: list[Any],
    boxes: list[str] | None,
    mask: Path | None,
    smallest: float | None,
    least_score: float | None,
    aligned_like: str | None,
) -> tuple[Any, Any, Any]:
    """Return the detector where one is needed, what finds the faces of a photo, and the mask's values."""
    from lediflow.errors import UserError
    from lediflow.faces import LEAST_SCORE, SMALLEST, FaceDetector
    from lediflow.pipelines.anonymize import faces_in_boxes, faces_in_mask, mask_values
    from lediflow.pipelines.upright import read_upright

    if boxes and mask:
        raise UserError("give --boxes or --mask, not both")
    if (boxes or mask) and len(files) != 1:
        raise UserError(f"--boxes and --mask belong to one photo, not to {len(files)}; give one at a time")
    if not (boxes or mask):
        detector = FaceDetector()
        options = {
            "smallest": SMALLEST if smallest is None else smallest,
            "least_score": LEAST_SCORE if least_score is None else least_score,
        }
        detector.check(**options)
        return detector, lambda photo: detector(photo, **options), None
    measures = FaceDetector() if aligned_like else None
    if mask:
        photo = read_upright(files[0].path)
        values = mask_values(read_upright(mask), photo.size)
        return measures, lambda photo: faces_in_mask(values), values
    faces = faces_in_boxes([_numbers(text) for text in boxes or ()], read_upright(files[0].path).size)
    return measures, lambda photo: faces, None


def _numbers(text: str) -> list[float]:
    from lediflow.errors import UserError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"a box is four numbers X,Y,W,H, as in --boxes 40,30,64,80, not {text!r}") from None


def _features(name: str | None, place: Any) -> Any:
    if name is None:
        return None
    from lediflow.metrics.features import open_features

    return open_features(name, place)


def _alignment(dataset: str | None, detector: Any) -> Any:
    from PIL import Image

    from lediflow.data.images import ImageData
    from lediflow.faces import UTKFACE, measure_alignment

    if dataset is None:
        return UTKFACE

    data = ImageData(dataset, image_size=192, cache_gb=0)
    chosen = range(0, len(data), max(1, len(data) // 100))
    squares = (data[i]["image"].movedim(0, -1).numpy() for i in chosen)
    return measure_alignment((Image.fromarray(square) for square in squares), detector)


def _tell(
    model: str, output: Path, reports: list[dict[str, Any]], as_json: bool, preview: bool = False
) -> None:
    """Print what became of the photos; leave with 1 if there is one to look after."""
    broken = [photo["file"] for photo in reports if "error" in photo]
    without = [photo["file"] for photo in reports if "error" not in photo and not photo["found"]]
    report = {
        "model": str(model),
        "output": str(output),
        "found": sum(photo["found"] for photo in reports),
        "treated": sum(photo["treated"] for photo in reports),
        "without_faces": without,
        "unreadable": broken,
        "photos": reports,
    }
    print(json.dumps(report) if as_json else _text(report, preview))
    if broken or without:
        raise typer.Exit(1)


def _text(report: dict[str, Any], preview: bool) -> str:
    from lediflow.files import shown

    photos = report["photos"]
    with_faces = sum(photo["found"] > 0 for photo in photos)
    done = "framed" if preview else "found and replaced"
    count = f"faces {done}: {report['found']}, in {with_faces} of {len(photos)} photos"
    lines = [f"{count}; see {shown(report['output'])}"]
    if report["without_faces"]:
        written = "" if preview else ", so nothing was written of"
        lines.append(f"no face was found in{written}:")
        lines += [f"  {shown(name)}" for name in report["without_faces"]]
        lines.append(
            "look at them; if there is one, try a smaller --smallest or --least-score, --boxes, or --mask"
        )
    lines += [f"cannot read {shown(photo['file'])}: {photo['error']}" for photo in photos if "error" in photo]
    if not preview and report["treated"]:
        lines.append("look at each photo before you hand it on: no detector finds every face")
    return "\n".join(lines)
