"""`anonymize`: what changes in a photo and what does not, who gets which face, and what is refused."""

import numpy as np
import pytest
import torch
from conftest import TINY, random_network
from PIL import Image

from lediflow import LeDiFlowPipeline, UserError
from lediflow.faces import Face
from lediflow.pipelines.anonymize import face_seeds, faces_in_boxes, faces_in_mask, same_persons
from lediflow.training.config import load_config

FAST = {"steps": 1, "latent_steps": 1, "seed": 7}
BOX = (20, 10, 14, 16)


@pytest.fixture(scope="module")
def pipe():
    config = load_config("digits", [*TINY, "data.channels=3"])
    parts = {name: random_network(config, name) for name in ("auxiliary", "flow", "sampler")}
    pipeline = LeDiFlowPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


class Detector:
    """Finds what it is told to, in each photo in turn."""

    def __init__(self, *found):
        self.found, self.asked = list(found), []

    def __call__(self, photo, **options):
        self.asked.append(options)
        return self.found.pop(0)


def pixels(picture):
    return np.asarray(picture).astype(int)


def test_only_the_ellipse_of_a_box_changes(pipe, photo):
    out = pipe.anonymize(photo, boxes=[BOX], **FAST)
    changed = (pixels(out.images[0]) != pixels(photo)).any(-1)
    x, y = np.meshgrid(np.arange(60) + 0.5, np.arange(40) + 0.5)
    inside = np.hypot((x - 27) / 7, (y - 18) / 8) < 1
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.9
    assert out.found == [[Face((20, 10, 34, 26))]]
    assert out.nfe["flow"] == 2
    assert out.images[0].size == photo.size


def test_the_new_face_does_not_depend_on_the_old_one(pipe, photo):
    # the square has as many pixels as the model's pictures, so nothing of the face is resampled into it
    box, other = [(10, 5, 24, 24)], pixels(photo)
    kept = pixels(pipe.anonymize(photo, boxes=box, **FAST).images[0])
    x, y = np.meshgrid(np.arange(60) + 0.5, np.arange(40) + 0.5)
    core = np.hypot(x - 22, y - 17) < 9
    other[core] = 255 - other[core]
    inverted = Image.fromarray(other.astype(np.uint8))

    def treated(**options):
        return pixels(pipe.anonymize(inverted, boxes=box, **{**FAST, **options}).images[0])

    hidden, forgotten = treated(strength=0.5), treated(masked_content="original")  # whose strength is 1
    seen = treated(strength=0.5, masked_content="original")
    before = pixels(pipe.anonymize(photo, boxes=box, **{**FAST, "strength": 0.5}).images[0])
    assert np.abs(before - hidden)[core].mean() < 1
    assert np.abs(kept - forgotten)[core].mean() < 1
    assert np.abs(before - seen)[core].mean() > 5


def test_seeds(pipe, photo):
    boxes = [BOX, (40, 12, 12, 12)]
    first = pipe.anonymize(photo, boxes=boxes, **FAST).images[0]
    assert first == pipe.anonymize(photo, boxes=boxes, **FAST).images[0]
    assert first != pipe.anonymize(photo, boxes=boxes, **{**FAST, "seed": 8}).images[0]
    secret = {**FAST, "seed": None}
    assert len({pipe.anonymize(photo, boxes=boxes, **secret).images[0].tobytes() for _ in range(3)}) == 3
    assert len({*face_seeds(1, 0, 3), *face_seeds(1, 1, 3), *face_seeds(2, 0, 3)}) == 9
    assert face_seeds(1, 0, 3, [4, 5, 4]) == face_seeds(1, 9, 3, [4, 5, 4])


def test_modes_stay_and_metadata_does_not(pipe, photo):
    photo.info["comment"] = "taken at home"
    alpha = photo.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(photo.size))
    for given, mode in ((photo.convert("L"), "L"), (alpha, "RGBA"), (photo.convert("P"), "RGB")):
        out = pipe.anonymize(given, boxes=[BOX], **FAST).images[0]
        assert (out.mode, out.info) == (mode, {})
        same = pixels(out) == pixels(given.convert(mode))
        assert same[:8].all()
        assert not same.all()
    out = pipe.anonymize(alpha, boxes=[BOX], **FAST).images[0]
    assert np.array_equal(pixels(out)[..., 3], pixels(alpha)[..., 3])


def test_each_part_of_a_mask_is_a_face_and_the_mask_is_kept_to(pipe, photo):
    mask = np.zeros((40, 60), np.uint8)
    mask[4:16, 5:20], mask[20:36, 30:42] = 255, 255
    out = pipe.anonymize(photo, mask_image=Image.fromarray(mask), **FAST)
    assert [face.box for face in out.found[0]] == [(5, 4, 20, 16), (30, 20, 42, 36)]
    changed = (pixels(out.images[0]) != pixels(photo)).any(-1)
    assert not changed[mask == 0].any()
    assert changed[mask > 0].mean() > 0.9


def test_faces_that_are_found_are_replaced_and_none_found_is_told(pipe, photo):
    detector = Detector([Face((20, 10, 34, 26), 0.8)], [])
    out = pipe.anonymize([photo, photo], detector=detector, smallest=30, **FAST)
    assert [len(found) for found in out.found] == [1, 0]
    assert out.images[0] != photo
    assert np.array_equal(pixels(out.images[1]), pixels(photo))
    assert detector.asked == [{"smallest": 30, "least_score": 0.2}] * 2


def test_faces_at_the_border_are_replaced(pipe, photo):
    corner = Face((-8, -6, 8, 10), 0.9)
    out = pipe.anonymize(photo, detector=Detector([corner]), **FAST).images[0]
    changed = (pixels(out) != pixels(photo)).any(-1)
    assert changed[0, 0]
    assert not changed[12:].any()


def test_one_person_gets_the_same_new_face_in_all_photos(pipe, photo):
    """Two photos of two persons on the same plain ground, who change places."""
    face, other = (Face((x, 10, x + 16, 26)) for x in (6, 36))
    first = Image.new("RGB", (60, 40), "grey")
    person, second_person = (photo.crop((x, 0, x + 16, 16)) for x in (0, 30))
    second = first.copy()
    for ground, places in ((first, (6, 36)), (second, (36, 6))):
        ground.paste(person, (places[0], 10))
        ground.paste(second_person, (places[1], 10))
    given = {"detector": Detector([face, other], [face, other]), "consistent": True}
    out = pipe.anonymize([first, second], same_person=0.98, **given, **FAST)
    assert out.persons == [[0, 1], [1, 0]]
    a, b = (pixels(image) for image in out.images)
    new = np.s_[14:22, 10:18], np.s_[14:22, 40:48]
    assert np.abs(a[new[0]] - b[new[1]]).mean() < 1
    assert np.abs(a[new[0]] - b[new[0]]).mean() > 5
    apart = pipe.anonymize([first, second], detector=Detector([face, other], [face, other]), **FAST)
    assert apart.persons == [[], []]
    assert np.abs(pixels(apart.images[0])[new[0]] - pixels(apart.images[1])[new[1]]).mean() > 5


def test_persons_are_told_apart_by_their_features():
    a, b, c = torch.eye(3)
    photos = [torch.stack([a, b]), torch.stack([c, a + 0.1 * b]), b[None]]
    assert same_persons(photos) == [[0, 1], [2, 0], [1]]
    # as alike as can be, but nobody is in a photo twice
    assert same_persons([torch.stack([a, a]), a[None]], 0.5) in ([[0, 1], [0]], [[0, 1], [1]])
    # a chain: a and b are alike, b and c too, a and c are not
    turned = [torch.tensor([[np.cos(t), np.sin(t)]]) for t in (0.0, 0.5, 1.0)]
    assert len({n for [n] in same_persons(turned, np.cos(0.6))}) == 2
    assert same_persons([torch.zeros(0, 1), a[None]]) == [[], [0]]
    assert same_persons([]) == []
    with pytest.raises(UserError, match="between -1 and 1"):
        same_persons([a[None]], 1.0)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([], "boxes is empty"),
        ([(0, 0, 3, 20)], "under 4 pixels"),
        ([(50, 0, 11, 20)], "leaves the photo, which is 60x40"),
        ([(-1, 0, 11, 20)], "leaves the photo"),
        ([(0, 0, 11)], "four|x, y, width and height"),
        ([(0, 0, float("nan"), 9)], "x, y, width and height"),
    ],
)
def test_boxes_that_cannot_be_meant_are_refused(boxes, message):
    with pytest.raises(UserError, match=message):
        faces_in_boxes(boxes, (60, 40))


def test_what_cannot_work_is_refused(pipe, photo):
    mask = Image.new("L", photo.size, 255)
    for options, message in (
        ({"boxes": [BOX], "mask_image": mask}, "not both"),
        ({"mask_image": Image.new("L", (60, 41), 255)}, "60x41"),
        ({"mask_image": Image.new("L", (60, 40))}, "black everywhere"),
        ({"boxes": [BOX], "strength": 1.5}, "strength must be from 0 to 1"),
        ({"boxes": [BOX], "masked_content": "noise"}, "masked_content"),
    ):
        with pytest.raises(UserError, match=message):
            pipe.anonymize(photo, **options)
    with pytest.raises(UserError, match="belong to one photo, not to 2"):
        pipe.anonymize([photo, photo], boxes=[BOX])
    dots = np.zeros((60, 60), bool)
    dots[::2, ::2] = True
    with pytest.raises(UserError, match="900 separate parts"):
        faces_in_mask(dots)
