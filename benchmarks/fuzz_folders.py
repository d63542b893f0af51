"""For fuzz.py: datasets, and folders of models with files damaged."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_pictures import picture_bytes
from fuzz_texts import VALUES
from hypothesis import strategies as st

TINY = [  # the smallest run with a stage of each kind; --run names another
    "auxiliary.widths=[16,16]",
    "auxiliary.d_head=8",
    "flow.widths=[16,16]",
    "flow.depths=[1,1]",
    "flow.d_head=8",
    "sampler.widths=[16]",
    "sampler.depths=[1]",
    "sampler.d_head=8",
    "training.precision=fp32",
    "clusters.count=4",
    "training.stages=[auxiliary, clusters, flow, sampler]",
    *(f"training.{s}.{k}" for s in ("auxiliary", "flow", "sampler") for k in ("steps=1", "batch_size=8")),
]

# Datasets

NAMES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["train", "val", "test", "a/b", "0", ".x", "\x1b[31m", "\u202e", "{0..3}", "[a]", "*", "%20"]
    ),
    st.binary(max_size=8).map(os.fsdecode),
)
ENDINGS = st.sampled_from(
    [".png", ".jpg", ".JPG", ".gif", ".tif", ".webp", ".eps", ".txt", "", ".cls", ".json"]
)
FILES = st.lists(st.tuples(NAMES, NAMES, ENDINGS, picture_bytes()), min_size=1, max_size=6)


@st.composite
def dataset_case(draw: Any) -> dict[str, Any]:
    kind = draw(st.sampled_from(["folder", "folder", "parquet", "tar", "latents"]))
    case: dict[str, Any] = {
        "kind": kind,
        "files": draw(FILES),
        "split": draw(st.sampled_from(["train", "val"])),
    }
    case["columns"] = draw(st.lists(st.tuples(st.sampled_from(COLUMNS), CELLS), max_size=3))
    case["damage"] = draw(damage()) if kind in ("latents",) or draw(st.integers(0, 3)) == 0 else None
    return case


COLUMNS = ("image", "img", "label", "class", "text", "")
CELLS = st.one_of(
    st.just("pictures"),
    st.sampled_from([1, -1, 2**40, 0.5, "x", None, b"x", [1]]),
    st.sampled_from([{"bytes": 1}, {"bytes": None, "path": "/etc/hosts"}, {"bytes": b"x", "path": "\x1b"}]),
    st.just({"bytes": "x", "path": 3}),
)


def check_dataset(case: dict[str, Any], folder: Path) -> None:
    from lediflow.data.batches import batches
    from lediflow.data.codec_latents import CodecLatents
    from lediflow.data.images import ImageData
    from lediflow.data.inspect import contact_sheet, inspect_dataset
    from lediflow.data.streams import StreamData
    from lediflow.errors import UserError

    place = folder / "set"
    place.mkdir()
    {"folder": _folder, "parquet": _parquet, "tar": _tar, "latents": _latents}[case["kind"]](place, case)
    if case["damage"] is not None:
        spoil(place, case["damage"])

    def first(data: Any) -> None:
        next(batches(data, batch_size=2, seed=0, stop=1))

    name, split = str(place), case["split"]
    looks: list[Callable[[], Any]] = [
        lambda: first(ImageData(name, image_size=8, split=split, max_broken=1.0)),
        lambda: first(ImageData(name, image_size=8, split=split, max_broken=1.0, cache_gb=0)),
        lambda: first(StreamData(name, image_size=8, split=split, max_broken=1.0)),
        lambda: inspect_dataset(name, split).to_text().encode(),
        lambda: contact_sheet(name, split),
    ]
    if case["kind"] == "latents":
        looks = [lambda: first(CodecLatents(name)), lambda: first(CodecLatents(name, flip=True, cache_gb=0))]
    for look in looks:
        try:
            look()
        except UserError as error:
            str(error).encode()


def _folder(place: Path, case: dict[str, Any]) -> None:
    for above, stem, ending, data in case["files"]:
        try:
            path = place / above.strip("/") / (stem.replace("/", "") + ending)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except (OSError, ValueError):  # no file system takes all names
            continue


def _parquet(place: Path, case: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": data, "path": None} for _, _, _, data in case["files"]]
    columns = {name: cells if cell == "pictures" else [cell] * len(cells) for name, cell in case["columns"]}
    pq.write_table(pa.table(columns or {"image": cells}), place / "a.parquet")


def _tar(place: Path, case: dict[str, Any]) -> None:
    with tarfile.open(place / "a.tar", "w") as tar:
        for n, (_, stem, ending, data) in enumerate(case["files"]):
            entry = tarfile.TarInfo(stem + ending if n % 3 == 2 else f"{n}.jpg")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def _latents(place: Path, case: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = len(case["files"])
    cells = {name: [bytes(2 * 4 * 2 * 2)] * count for name in ("mean", "mean_flipped")}
    pq.write_table(pa.table({**cells, "label": [0] * count, "row": list(range(count))}),
                   place / "latents-00000-of-00001.parquet")  # fmt: skip
    meta = {"codec": "x", "hash": "y", "factor": 2, "channels": 4, "mean": [0.0] * 4, "std": [1.0] * 4,
            "image_size": 4, "dtype": "fp16", "sample": "mode", "dataset": "d", "split": "train",
            "class_names": [], "count": count, "broken": [], "shards": 1}  # fmt: skip
    (place / "latents.json").write_text(json.dumps(meta))


# Folders of models

KINDS = ("delete", "cut", "empty", "flip", "swap", "folder", "text", "value", "link")


@st.composite
def damage(draw: Any) -> list[tuple[str, int, int, Any]]:
    """Some changes of a folder: what, of which file, where, and to what."""
    one = st.tuples(st.sampled_from(KINDS), st.integers(0, 10**6), st.integers(0, 10**6), VALUES)
    return draw(st.lists(one, min_size=1, max_size=2))


def spoil(folder: Path, changes: list[tuple[str, int, int, Any]]) -> None:
    """Apply what `damage` drew."""
    for kind, which, where, value in changes:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if not files:
            return
        path = files[which % len(files)]
        data = path.read_bytes()
        at = where % max(1, len(data))
        path.unlink()
        if kind == "cut":
            path.write_bytes(data[:at])
        elif kind == "empty":
            path.write_bytes(b"")
        elif kind == "flip":
            path.write_bytes(data[:at] + bytes([255 - b for b in data[at : at + 3]]) + data[at + 3 :])
        elif kind == "swap":
            alike = [p for p in files if p != path and p.suffix == path.suffix] or files
            path.write_bytes(
                alike[where % len(alike)].read_bytes() if alike[where % len(alike)].exists() else data
            )
        elif kind == "folder":
            path.mkdir()
        elif kind == "text":
            path.write_text(json.dumps(value, default=str))
        elif kind == "link":
            path.symlink_to(path.name)  # to itself
        elif kind == "value":
            path.write_bytes(_another_value(data, where, value))


def _another_value(data: bytes, where: int, value: Any) -> bytes:
    try:
        tree = json.loads(data)
    except ValueError:
        return data
    node = tree
    while isinstance(node, dict) and node:
        key = sorted(node)[where % len(node)]
        if not isinstance(node[key], dict) or not node[key] or where % 3 == 0:
            node[key] = value
            break
        node = node[key]
    return json.dumps(tree, default=str).encode()


def check_pipeline(case: list, folder: Path) -> None:
    from lediflow.pipelines.load import load_pipeline
    from lediflow.training.config import load_config

    run = folder / "run"
    run.mkdir()
    shutil.copytree(RUN[0] / "pipeline", run / "pipeline")
    shutil.copy(RUN[0] / "config.yaml", run / "config.yaml")
    spoil(run, case)
    for load in (lambda: load_pipeline(run), lambda: load_config(run / "config.yaml")):
        _refused_or_done(load)


def check_resumed(case: list, folder: Path) -> None:
    from lediflow.training.config import load_config
    from lediflow.training.run import train

    run = folder / "run"
    shutil.copytree(RUN[0], run)
    spoil(run, case)
    _refused_or_done(lambda: train(load_config(RUN[0] / "config.yaml"), run, device="cpu"))


def _refused_or_done(work: Callable[[], Any]) -> None:
    from lediflow.errors import UserError

    try:
        work()
    except UserError as error:
        assert str(error).strip(), "an error without words"


RUN: list[Path] = []  # the run folder that is damaged


def make_run(folder: Path) -> Path:
    """Train the run whose folder is damaged, one step a stage."""
    from lediflow.training.config import load_config
    from lediflow.training.run import train

    train(load_config("digits", TINY), folder, device="cpu")
    return folder
