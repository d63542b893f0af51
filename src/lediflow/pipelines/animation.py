"""Images one after the other: GIF, animated WebP and PNG by Pillow, MP4 by the extra `video`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lediflow.errors import UserError, nearest
from lediflow.files import explained, written_whole

ANIMATIONS = ("gif", "webp", "apng", "mp4")


def check_animation(kind: str, *, fps: float = 12, scale: int = 1) -> None:
    """Refuse an animation that cannot be written here, before anything is made.

    Raises:
        UserError: an unknown kind, "mp4" without PyAV, or fps or scale out of range.
    """
    if not 0.1 <= fps <= 100 or scale < 1:
        raise UserError(
            f"an animation has 0.1 to 100 images a second and a scale of at least 1, not {fps:g} and {scale}"
        )
    if kind not in ANIMATIONS:
        raise UserError(
            f"unknown animation {kind!r}{nearest(kind, ANIMATIONS)}; choose from {', '.join(ANIMATIONS)}"
        )
    if kind == "mp4":
        try:
            import av  # noqa: F401
        except ImportError:
            raise UserError("MP4 needs PyAV: pip install 'lediflow[video]', or take webp or gif") from None


def save_animation(path: Path, images: Sequence[Image.Image], *, fps: float = 12, scale: int = 1) -> None:
    """Write images as an animation that starts again at its end (an MP4 leaves that to the player).

    Args:
        path: ends in one of `ANIMATIONS`.
        images: of one size, one after the other.
        fps: images a second.
        scale: each pixel becomes scale x scale pixels, without smoothing.

    Raises:
        UserError: see `check_animation`, or there is no image, or the file cannot be written.
    """
    check_animation(path.suffix[1:], fps=fps, scale=scale)
    if not images:
        raise UserError("an animation needs at least one image")
    size = images[0].width * scale, images[0].height * scale
    frames = [image.convert("RGB").resize(size, Image.Resampling.NEAREST) for image in images]
    with explained(path), written_whole(path) as unfinished:
        if path.suffix == ".mp4":
            _write_mp4(unfinished, frames, fps)
            return
        kind = {".gif": "GIF", ".webp": "WEBP", ".apng": "PNG"}[path.suffix]
        how = {"lossless": True} if kind == "WEBP" else {}
        duration = round(1000 / fps)
        frames[0].save(
            unfinished, kind, save_all=True, append_images=frames[1:], duration=duration, loop=0, **how
        )


def _write_mp4(path: Path, frames: Sequence[Image.Image], fps: float) -> None:
    from fractions import Fraction

    import av

    width, height = frames[0].size
    even = width + width % 2, height + height % 2  # H.264 halves the colours' sides
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height = even
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "16"}
        for frame in frames:
            picture = av.VideoFrame.from_image(frame if frame.size == even else frame.resize(even))
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
