"""The page in a real browser: Chromium, driven by Playwright; what it fetches is all from this machine."""

import shutil
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import giant_png
from PIL import Image, ImageChops

pytest.importorskip("gradio", reason="the extra app is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]
PATIENCE = 60_000  # ms, for a machine that has other work


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, served_page):
    """Open the page as one more visitor; at the end all that was asked for is looked at."""
    visitors = []

    def visit(**options):
        context = browser.new_context(viewport={"width": 1280, "height": 1000}, **options)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        addresses = []
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(served_page.url)
        page.wait_for_selector("#create-start")
        visitors.append((context, addresses))
        return page

    yield visit
    here = urlsplit(served_page.url).netloc
    for context, addresses in visitors:
        context.close()
        assert addresses
        outside = [one for one in addresses if not one.startswith(("data:", "blob:"))]
        assert {urlsplit(one).netloc for one in outside} == {here}  # no request leaves the machine


def create(page, count=16, seed=0):
    page.fill("#create-seed input", str(seed))
    page.fill("#create-count input[type=number]", str(count))
    page.press("#create-count input[type=number]", "Tab")
    page.click("#create-start")


def done(page, pattern):
    """Wait until the status begins so; "10 pictures" is another beginning than "8 of 10 pictures"."""
    page.wait_for_function(
        "([id, pattern]) => new RegExp('^\\\\s*' + pattern).test(document.querySelector(id).innerText)",
        arg=["#create-status", pattern],
    )


SHOWN = "[...new Set([...document.querySelectorAll('#create-gallery img')].map(one => one.src))]"


def pictures(page, count=None):
    """Return the addresses of the pictures in the gallery, each once; wait until it has so many."""
    if count is not None:
        page.wait_for_function(f"count => {SHOWN}.length === count", arg=count)
    return page.evaluate(SHOWN)


def file_of(page, selector, served_page):
    """The file on this machine that a picture in the page shows."""
    address = page.locator(selector).first.get_attribute("src")
    path = Path(urlsplit(address).path.split("file=", 1)[1])
    assert path.is_relative_to(served_page.folder)
    return path


def toast(page, sentence):
    """Wait for the message of an error; it is a sentence, and no stack trace."""
    page.wait_for_function(
        "text => [...document.querySelectorAll('.toast-body')].some(one => one.innerText.includes(text))",
        arg=sentence,
    )
    assert "Traceback" not in page.inner_text("body")


def tab(page, *names):
    for name in names:
        page.get_by_role("tab", name=name, exact=True).click()


def same(a, b):
    return ImageChops.difference(Image.open(a).convert("RGB"), Image.open(b).convert("RGB")).getbbox() is None


def test_create_and_restore_by_dropping_a_png(opened, served_page, tmp_path):
    page = opened()
    create(page, 10, seed=42)
    done(page, "10 pictures")
    assert "Network evaluations for one picture" in page.inner_text("#create-status")
    page.locator("#create-gallery button.thumbnail-lg").nth(9).click()
    page.wait_for_function("document.querySelector('#create-settings textarea').value.includes('seed: 42')")
    with page.expect_download() as download:
        page.click("#create-download")
    png = tmp_path / "mine.png"
    download.value.save_as(png)

    other = opened()  # another visitor, who knows nothing of it
    other.click("#create-restore-box button")
    other.set_input_files("#create-restore input[type=file]", str(png))
    done(other, "Restored seed 42")
    assert other.input_value("#create-seed input") == "42"
    assert other.input_value("#create-count input[type=number]") == "10"
    assert same(file_of(other, "#create-gallery img", served_page), png)
    other.click("#create-start")
    done(other, "10 pictures")
    made = [Path(urlsplit(name).path.split("file=", 1)[1]) for name in pictures(other, 10)]
    assert any(same(path, png) for path in made)


def test_the_slider_answers_while_it_moves(opened):
    page = opened()
    tab(page, "Explore")
    page.wait_for_selector("#explore-picture img")
    slider = page.locator("#explore-slider input[type=range]")
    seen = {page.get_attribute("#explore-picture img", "src")}
    for _ in range(3):
        before = page.get_attribute("#explore-picture img", "src")
        slider.press("ArrowRight")  # by keyboard
        page.wait_for_function(
            "src => document.querySelector('#explore-picture img').src !== src", arg=before
        )
        seen.add(page.get_attribute("#explore-picture img", "src"))
    assert len(seen) == 4
    assert "ms." in page.inner_text("#explore-status")
    tab(page, "Variations")
    page.click("#vary-start")
    page.wait_for_function("document.querySelectorAll('#vary-grid img').length === 9")
    chosen = page.locator("#vary-grid img").nth(0).get_attribute("src")
    page.locator("#vary-grid button.thumbnail-lg").nth(0).click()
    page.wait_for_function(
        "src => document.querySelectorAll('#vary-grid img')[4]?.src.endsWith(src)", arg=urlsplit(chosen).path
    )


def test_painting_and_inpainting_leaves_all_else(opened, served_page, photo):
    page = opened()
    tab(page, "Edit")
    page.click("#inpaint-start")
    toast(page, "Choose a picture first")
    page.set_input_files("#inpaint-picture input[type=file]", str(photo))
    page.wait_for_selector("#inpaint-painter canvas")
    page.wait_for_selector("#inpaint-picture img")
    page.wait_for_timeout(1500)  # the editor draws the picture when it likes
    page.click("#inpaint-start")
    toast(page, "Nothing is painted")
    box = page.locator("#inpaint-painter canvas").first.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(middle[0] - 30, middle[1])
    page.mouse.down()
    page.mouse.move(middle[0] + 30, middle[1], steps=6)
    page.mouse.up()
    page.wait_for_timeout(500)
    page.click("#inpaint-start")
    page.wait_for_selector("#inpaint-made img")
    before = np.asarray(Image.open(photo).convert("L"), int)
    after = np.asarray(Image.open(file_of(page, "#inpaint-made img", served_page)), int)
    rows, columns = np.nonzero(before != after)
    assert after.shape == before.shape and 0 < len(rows) < before.size / 3
    assert rows.min() > 8 and rows.max() < 22 and columns.min() > 8 and columns.max() < 32


def test_bad_pictures_have_their_sentence_in_the_page(opened, tmp_path):
    words, giant = tmp_path / "words.png", tmp_path / "giant.png"
    words.write_text("no picture")
    giant_png(giant, 20_000)
    page = opened()
    page.click("#create-restore-box button")
    page.set_input_files("#create-restore input[type=file]", str(words))
    toast(page, "'words.png' cannot be used: not a picture")
    tab(page, "Edit")
    page.set_input_files("#inpaint-picture input[type=file]", str(giant))
    toast(page, "is far too large, and at most 16 million pixels are allowed")
    tab(page, "Create")
    create(page, 4)
    done(page, "4 pictures")  # the page works on


def test_faces_are_found_shown_and_switched_off(opened, photo, monkeypatch):
    pytest.importorskip("onnxruntime", reason="the extra faces is not installed")
    from lediflow.app import edit
    from lediflow.faces import Face

    faces = [Face((2, 2, 14, 14)), Face((22, 12, 36, 26))]
    monkeypatch.setattr(edit, "FaceDetector", lambda *_, **__: lambda _photo: faces)
    page = opened()
    tab(page, "Edit", "Anonymize")
    if page.locator("#anonymize-missing").count():
        pytest.skip("no face detector here")
    page.set_input_files("#anonymize-picture input[type=file]", str(photo))
    page.wait_for_function("document.querySelectorAll('#anonymize-faces input').length === 2")
    page.locator("#anonymize-faces input").nth(0).uncheck()
    page.click("#anonymize-start")
    page.wait_for_selector("#anonymize-made img")
    address = page.locator("#anonymize-made img").first.get_attribute("src")
    after = np.asarray(Image.open(Path(urlsplit(address).path.split("file=", 1)[1])))
    before = np.asarray(Image.open(photo))
    assert np.array_equal(after[:, :18], before[:, :18])
    assert (after[12:26, 22:36] != before[12:26, 22:36]).any()


def test_two_visitors_at_once_and_one_who_stops(opened, app_models, monkeypatch):
    import time

    make = app_models.pipeline._make

    def slow(*arguments, **options):
        time.sleep(0.4)
        return make(*arguments, **options)

    monkeypatch.setattr(app_models.pipeline, "_make", slow)
    first, second = opened(), opened()
    create(first, 64, seed=1)
    done(first, "[0-9]+ of 64")
    create(second, 8, seed=2)
    second.wait_for_function("/queue: ?[0-9]+/.test(document.querySelector('#create-status').innerText)")
    first.click("#create-stop")
    done(second, "8 pictures")
    others = pictures(second, 8)
    kept = pictures(first)
    assert 0 < len(kept) < 64 and len(kept) % 8 == 0  # what was done stays
    assert not set(others) & set(kept)


def test_a_phones_width_and_dark_mode(opened):
    page = opened(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 844})
    create(page, 4)
    done(page, "4 pictures")
    for name in ("Create", "Explore", "Edit", "Inside"):
        tab(page, name)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out
    assert page.evaluate("document.body.classList.contains('dark')")
    page.click("#inside-start")
    page.wait_for_selector("#inside-baseline img")
    assert "From noise" in page.inner_text("#inside-status")
