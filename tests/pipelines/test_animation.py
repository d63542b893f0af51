"""Animations: frames, their time, their size; and what cannot be written."""

import builtins

import numpy as np
import pytest
from PIL import Image

from lediflow import UserError
from lediflow.pipelines.animation import check_animation, save_animation


def frames(count=3):
    return [Image.fromarray(np.full((5, 7), 80 * i, np.uint8)) for i in range(count)]


@pytest.mark.parametrize("kind", ["gif", "webp", "apng"])
def test_frames_come_in_order_and_for_ever(kind, tmp_path):
    path = tmp_path / f"film.{kind}"
    save_animation(path, frames(), fps=20, scale=2)
    with Image.open(path) as film:
        assert (film.n_frames, film.size) == (3, (14, 10))
        for i in range(3):
            film.seek(i)
            assert abs(int(np.array(film.convert("L")).mean()) - 80 * i) <= 1
            assert film.info["duration"] == 50
        assert film.info["loop"] == 0


def test_mp4_is_h264_of_even_sides(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'lediflow[video]'")
    save_animation(tmp_path / "film.mp4", frames(), fps=10)
    with av.open(str(tmp_path / "film.mp4")) as film:
        (stream,) = film.streams.video
        shown = [frame.to_ndarray(format="gray") for frame in film.decode(stream)]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 10)
    assert len(shown) == 3 and shown[0].shape == (6, 8)
    assert shown[0].mean() < shown[1].mean() < shown[2].mean()


def test_mp4_without_pyav_names_the_extra(monkeypatch, tmp_path):
    def without(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'lediflow\[video\]'"):
        save_animation(tmp_path / "film.mp4", frames())


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean 'gif'"):
        check_animation("giff")
    for options in ({"fps": 0}, {"fps": 1000}, {"fps": float("nan")}, {"scale": 0}):
        with pytest.raises(UserError, match="0.1 to 100 images a second and a scale of at least 1"):
            save_animation(tmp_path / "film.gif", frames(), **options)
    with pytest.raises(UserError, match="at least one image"):
        save_animation(tmp_path / "film.gif", [])
    assert not list(tmp_path.iterdir())
