"""Images -> a folder of latents, shard by shard: any number of processes, stopped and started at will.

A shard is a fixed range of the dataset's rows, written beside and renamed. Process r of n makes the shards r,
r + n, ... that are not there yet, and whoever finds all of them there writes latents.json. So processes need
not talk to each other, and the result does not depend on their number.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lediflow.codecs import Codec, latent_digest
from lediflow.data.codec_latents import DTYPES, PATTERN, to_cells
from lediflow.data.images import ImageData
from lediflow.data.listing import LATENTS_FILE
from lediflow.errors import UserError, nearest
from lediflow.files import clear_files, explained, quoted, shown, write_text, written_whole
from lediflow.hub import split_revision
from lediflow.pictures import to_float
from lediflow.upsampling import enlarged, shrunk

_META = b"lediflow"


def encode(
    dataset: str,
    codec: Codec,
    output: Path,
    *,
    image_size: int = 256,
    low_size: int | None = None,
    enlarge: str = "latents",
    text: str | None = None,
    split: str = "train",
    dtype: str = "fp16",
    sample: str | None = None,
    batch_size: int = 16,
    shard_size: int = 2048,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any] | None:
    """Encode both flips of every readable image, and measure mean and standard deviation per channel.

    Args:
        dataset: as for `open_dataset`; images are cropped at the centre.
        codec: what encodes.
        output: folder of the shards; an unfinished one is gone on with.
        image_size: side of the images, pixels, a multiple of the codec's factor.
        low_size: also encode the images made this small, a divisor of `image_size`: for an upsampler.
        enlarge: "pixels" decodes those, enlarges them as images to `image_size` and encodes them again.
        text: column of the texts to keep beside the latents, as in `text.column`; None for none.
        split: of the dataset.
        dtype: "fp16" (11 significant bits) or "bf16" (8 bits, any range), of the stored latents.
        sample: "posterior" stores mean and variance, so that training draws from it; "mode" the mean only;
            None is what the codec has.
        batch_size: images at a time.
        shard_size: images in a shard.
        workers: processes that decode images.
        rank: of this process.
        world_size: number of processes.
        progress: called with the numbers of images done and to do in this process.

    Returns:
        What latents.json holds if all shards are there now, None if other processes have some left to make.

    Raises:
        UserError: an impossible setting, another encoding in `output`, too many broken images, a full disk.
    """
    sample = sample or ("posterior" if codec.has_variance else "mode")
    _check(codec, image_size, dtype, sample, batch_size, shard_size)
    if low_size is not None:
        _check_pairs(codec, low_size, image_size, enlarge)
    channels = codec.in_channels
    if channels not in (1, 3):
        raise UserError(f"the codec {codec.name!r} takes {channels} channels, not grey or RGB images")
    data = ImageData(
        dataset,
        image_size=image_size,
        channels=1 if channels == 1 else 3,
        split=split,
        cache_gb=0,
        texts=() if text is None else (text,),
    )
    job = {
        "dataset": _one_spelling(dataset) if not data.commit else split_revision(dataset)[0],
        "commit": data.commit,
        "split": split,
        "images": len(data),
        "codec": codec.name,
        "hash": codec.hash,
        "image_size": image_size,
        "dtype": dtype,
        "sample": sample,
        "shard_size": shard_size,
    }
    if low_size is not None:
        job |= {"low_size": low_size, "enlarge": enlarge}
    if text is not None:
        job["text"] = text
    count = math.ceil(len(data) / shard_size)
    shards = [output / f"latents-{i:05d}-of-{count:05d}.parquet" for i in range(count)]
    _refuse_another(output, job)
    if rank == 0:
        clear_files(output, of=output / LATENTS_FILE)
    parts = [range(i * shard_size, min((i + 1) * shard_size, len(data))) for i in range(count)]
    mine = [i for i in range(rank, count, world_size) if shard_report(shards[i]) is None]
    done, total = 0, sum(len(parts[i]) for i in mine)
    for path, rows in ((shards[i], parts[i]) for i in mine):
        with explained(path):
            for step in _encode_shard(data, codec, rows, path, job, batch_size, workers):
                progress(done + step, total)
        done += len(rows)
    reports = [shard_report(path) for path in shards]
    if not all(reports):
        return None
    meta = _summary(job, codec, data, [report for report in reports if report])
    write_text(output / LATENTS_FILE, json.dumps(meta, indent=1, ensure_ascii=False))
    return meta


def shard_report(path: Path) -> dict[str, Any] | None:
    """Return what a finished shard says of itself; None if it is not there or not whole."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        report: dict[str, Any] = json.loads(pq.read_schema(path).metadata[_META])
        return report
    except (OSError, pyarrow.ArrowException, KeyError, TypeError, json.JSONDecodeError):
        return None


def _check(codec: Codec, image_size: int, dtype: str, sample: str, batch_size: int, shard_size: int) -> None:
    if image_size < 1 or image_size % codec.factor:
        raise UserError(f"image size {image_size} is no multiple of the codec's factor {codec.factor}")
    for name, value, known in (("dtype", dtype, DTYPES), ("sample", sample, ("mode", "posterior"))):
        if value not in known:
            raise UserError(
                f"unknown {name} {value!r}{nearest(value, known)}; choose from {', '.join(known)}"
            )
    if sample == "posterior" and not codec.has_variance:
        raise UserError(f"the codec {codec.name!r} has no variance; leave --sample out or use mode")
    if batch_size < 1 or shard_size < 1:
        raise UserError(f"batch size {batch_size} and shard size {shard_size} must be 1 or more")


def _check_pairs(codec: Codec, low_size: int, image_size: int, enlarge: str) -> None:
    if enlarge not in ("latents", "pixels"):
        meant = nearest(enlarge, ("latents", "pixels"))
        raise UserError(f"unknown --enlarge {enlarge!r}{meant}; choose from latents, pixels")
    if low_size < 1 or image_size % low_size or image_size == low_size:
        raise UserError(f"pairs of {low_size} and {image_size} px: the second is no multiple of the first")
    if low_size % codec.factor:
        raise UserError(f"pairs of {low_size} px are no multiple of the codec's factor {codec.factor}")


def encoded_low(images: Tensor, codec: Codec, low_size: int, enlarge: str) -> Tensor:
    """Return the latents of images (B, C, S, S) in [-1, 1] made small: the means, (B, channels, h, w).

    Args:
        images: at their full size.
        codec: what encodes.
        low_size: side of the small images, pixels.
        enlarge: "latents" leaves them as they are; "pixels" decodes them, enlarges the images (bilinear) and
            encodes those, so that they have the size of the large images' latents.
    """
    low = codec.encode(shrunk(images, images.shape[-1] // low_size)).mean
    if enlarge == "latents":
        return low
    size = (images.shape[-2], images.shape[-1])
    return codec.encode(enlarged(codec.decode(low), size, "bilinear")).mean


def _one_spelling(dataset: str) -> str:
    """Return DATASET as it is written down: `photos` for `photos/` and `./photos`, others as they are."""
    if "://" in dataset or not Path(dataset).expanduser().exists():
        return dataset
    name = os.path.normpath(dataset)
    return dataset if name == "digits" else name  # ./digits is a folder, digits is not


def _same(key: str, there: Any, now: Any) -> bool:
    # photos, and the same folder by its whole path
    return there == now or (key == "dataset" and os.path.abspath(str(there)) == os.path.abspath(str(now)))


def _refuse_another(output: Path, job: dict[str, Any]) -> None:
    """Raise UserError where the folder holds shards of another encoding."""
    for path in sorted(output.glob(PATTERN)):
        report = shard_report(path)
        there = report["job"] if report else job
        changed = [key for key in {**job, **there} if not _same(key, there.get(key, ""), job.get(key, ""))]
        if changed:
            listed = "; ".join(
                f"{key}: {shown(there.get(key))} there, {shown(job.get(key))} now" for key in changed
            )
            raise UserError(
                f"{shown(output)} holds latents of another encoding ({listed}); choose another --output"
            )


def _encode_shard(
    data: ImageData, codec: Codec, rows: range, path: Path, job: dict[str, Any], batch_size: int, workers: int
):
    """Write one shard whole; yields the number of images done now and then."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ends = ("", "_flipped")
    parts = ("mean", "log_var") if job["sample"] == "posterior" else ("mean",)
    low_size, enlarge = job.get("low_size"), job.get("enlarge", "latents")
    stored_parts = parts if low_size is None else (*parts, "low")
    columns: dict[str, list] = {part + end: [] for end in ends for part in stored_parts}
    kept: list[int] = []
    total = torch.zeros(codec.channels, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for images, index in data.readable(rows, batch_size, workers):
        for end, pictures in zip(ends, (images, images.flip(-1)), strict=True):
            encoded = codec.encode(to_float(pictures))
            for part in parts:
                columns[part + end] += to_cells(getattr(encoded, part), job["dtype"])
            if low_size is not None:
                low = encoded_low(to_float(pictures), codec, low_size, enlarge)
                columns["low" + end] += to_cells(low, job["dtype"])
            stored = _as_stored(encoded.mean, job["dtype"])
            variance = _as_stored(encoded.log_var, job["dtype"]).exp() if len(parts) == 2 else 0.0
            total += stored.sum((0, 2, 3))
            squares += (stored.square() + variance).sum((0, 2, 3))
        kept += index.tolist()
        yield int(index[-1]) + 1 - rows.start
    if not bool(squares.isfinite().all()):
        raise UserError("some latents are beyond the range of fp16, or not numbers; use --dtype bf16")
    lost = [image for row, image in data.broken_rows().items() if row in rows]
    report = {
        "job": job,
        "count": len(kept),
        "sum": total.tolist(),
        "squares": squares.tolist(),
        "broken": [[image.name, image.reason] for image in lost],
    }
    fields = [(name, pa.binary()) for name in columns] + [("label", pa.int64()), ("row", pa.int64())]
    columns |= {"label": data.labels[kept].tolist(), "row": kept}
    if "text" in job:
        fields.append(("text", pa.string()))
        columns["text"] = [data.texts[row] for row in kept]
    table = pa.table(
        columns,
        schema=pa.schema(fields, metadata={_META: json.dumps(report)}),
    )
    clear_files(path.parent, of=path)  # a shard has one maker
    with written_whole(path) as unfinished:
        # sixteen random bits do not compress
        pq.write_table(table, unfinished, compression="none", use_dictionary=False, row_group_size=256)


def _as_stored(latents: Tensor, dtype: str) -> Tensor:
    return latents.to(DTYPES[dtype]).to("cpu", torch.float64)


def _summary(
    job: dict[str, Any], codec: Codec, data: ImageData, reports: list[dict[str, Any]]
) -> dict[str, Any]:
    count = sum(report["count"] for report in reports)
    if not count:
        raise UserError(f"none of the {job['images']:,} images in {quoted(job['dataset'])} can be read")
    elements = count * 2 * (job["image_size"] // codec.factor) ** 2
    mean = torch.tensor([report["sum"] for report in reports], dtype=torch.float64).sum(0) / elements
    square = torch.tensor([report["squares"] for report in reports], dtype=torch.float64).sum(0) / elements
    std = (square - mean.square()).clamp(min=1e-12).sqrt()
    return {
        "codec": job["codec"],
        "hash": job["hash"],
        "latent_hash": latent_digest(codec.model),
        "factor": codec.factor,
        "channels": codec.channels,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "image_size": job["image_size"],
        **{key: job[key] for key in ("low_size", "enlarge", "text") if key in job},
        "dtype": job["dtype"],
        "sample": job["sample"],
        "dataset": shown(job["dataset"]),
        "commit": job["commit"],
        "split": job["split"],
        "class_names": data.class_names,
        "count": count,
        "broken": [name for report in reports for name in report["broken"]],
        "shards": len(reports),
    }
