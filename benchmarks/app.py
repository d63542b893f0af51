"""The app in a real browser: pictures of its tabs, and how it bears visitors.

python benchmarks/app.py screenshots MODEL OUT          # OUT/create.png ..., one of a phone in the dark
python benchmarks/app.py load MODEL --users 8 --minutes 10

It needs Chromium (`apt-get install chromium`) and `pip install 'lediflow[app]' playwright`. `load` starts the
app as a process of its own, lets visitors create and move the slider, and prints as JSON: requests, failures,
milliseconds from a move of the slider to the new picture in the browser, and the app's memory over time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from playwright.sync_api import Page, sync_playwright

PATIENCE = 120_000  # ms


@contextmanager
def app_of(model: str, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run the app; its address and its process."""
    command = [sys.executable, "-m", "lediflow", "app", model, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("http"):
            raise SystemExit("the app did not start")
        try:
            yield line.split()[0], psutil.Process(process.pid)
        finally:
            process.terminate()


@contextmanager
def chromium() -> Iterator:
    """A browser."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, address: str, **options) -> Page:
    """One more visitor's page."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.wait_for_selector("#create-start")
    return page


def create(page: Page, count: int, seed: int) -> None:
    """Make pictures and wait for all of them."""
    page.get_by_role("tab", name="Create", exact=True).click()
    page.fill("#create-seed input", str(seed))
    page.fill("#create-count input[type=number]", str(count))
    page.press("#create-count input[type=number]", "Tab")
    page.evaluate("document.querySelector('#create-status').dataset.old = '1'")
    page.click("#create-start")
    page.wait_for_function(
        "count => { const text = document.querySelector('#create-status').innerText;"
        " return text.startsWith(count + ' pictures'); }",
        arg=count,
    )


def move(page: Page) -> float:
    """Move the slider by one; milliseconds until another picture is on the screen."""
    return page.evaluate(
        """patience => new Promise((done, failed) => {
          const slider = document.querySelector('#explore-slider input[type=range]');
          const picture = document.querySelector('#explore-picture img');
          const old = picture.src, began = performance.now();
          const look = () => {
            const now = document.querySelector('#explore-picture img');
            const ms = performance.now() - began;
            if (now && now.src !== old && now.naturalWidth) done(ms);
            else if (ms > patience) failed(new Error('no new picture'));
            else requestAnimationFrame(look);
          };
          slider.value = (Number(slider.value) + 7) % 101;
          slider.dispatchEvent(new Event('input', {bubbles: true}));
          look();
        })""",
        PATIENCE,
    )


def latencies(page: Page, moves: int) -> list[float]:
    """Milliseconds of each move of the slider, after one that is not counted."""
    page.get_by_role("tab", name="Explore", exact=True).click()
    page.wait_for_selector("#explore-picture img")
    move(page)
    found = []
    for _ in range(moves):
        found.append(move(page))
        time.sleep(0.1)
    return found


def screenshots(model: str, out: Path, seed: int) -> None:
    """Write a picture of each tab, and of the first on a phone and in the dark."""
    out.mkdir(parents=True, exist_ok=True)
    with app_of(model) as (address, _), chromium() as browser:
        page = opened(browser, address, viewport={"width": 1280, "height": 860})
        show(page, out, seed)
        dark = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "has_touch": True}
        phone = opened(browser, address, **dark)
        create(phone, 12, seed)
        time.sleep(1)
        phone.screenshot(path=out / "phone.png", full_page=True)


def show(page: Page, out: Path, seed: int) -> None:
    """Use each tab, and write what it looks like."""

    def shot(name: str) -> None:
        time.sleep(1.5)  # what fades in
        page.screenshot(path=out / f"{name}.png", full_page=True)

    create(page, 16, seed)
    shot("create")
    latencies(page, 1)
    shot("explore")
    page.get_by_role("tab", name="Variations", exact=True).click()
    page.click("#vary-start")
    page.wait_for_function("document.querySelectorAll('#vary-grid img').length === 9")
    shot("variations")
    page.get_by_role("tab", name="Create", exact=True).click()
    page.locator("#create-gallery button.thumbnail-lg").first.click()
    page.wait_for_selector("#create-download:not([disabled])")
    with page.expect_download() as download:
        page.click("#create-download")
    picture = out / "picture.png"
    download.value.save_as(picture)
    page.get_by_role("tab", name="Edit", exact=True).click()
    page.set_input_files("#inpaint-picture input[type=file]", str(picture))
    page.wait_for_selector("#inpaint-painter canvas")
    time.sleep(2)
    box = page.locator("#inpaint-painter canvas").first.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y)
    page.mouse.down()
    for step in range(1, 7):
        page.mouse.move(x - 60 + 20 * step, y + 20 * (step % 2))
    page.mouse.up()
    time.sleep(0.5)
    page.click("#inpaint-start")
    page.wait_for_selector("#inpaint-made img")
    shot("edit")
    tab = page.get_by_role("tab", name="Upsample", exact=True)
    if tab.count():
        tab.click()
        page.set_input_files("#upsample-picture input[type=file]", str(picture))
        page.wait_for_selector("#upsample-picture img, #upsample-picture .file-preview")
        page.click("#upsample-start")
        page.wait_for_selector("#upsample-made img")
        shot("upsample")
    picture.unlink()
    page.get_by_role("tab", name="Inside", exact=True).click()
    page.click("#inside-start")
    page.wait_for_selector("#inside-path img")
    shot("inside")


def load(model: str, users: int, minutes: float) -> dict:
    """Let visitors create pictures and move the slider at the same time; what happened."""
    with app_of(model) as (address, process):
        with chromium() as browser:
            page = opened(browser, address)
            create(page, 8, 0)
            alone = latencies(page, 20)
        end = time.monotonic() + 60 * minutes
        counts = {"requests": 0, "pictures": 0}
        failures: list[str] = []
        crowded: list[float] = []
        memory: list[float] = []
        visitors = [
            threading.Thread(target=_visitor, args=(address, number, end, counts, failures, crowded))
            for number in range(users)
        ]
        for visitor in visitors:
            visitor.start()
        while time.monotonic() < end:
            memory.append(round(process.memory_info().rss / 2**20))
            time.sleep(min(15, max(0.1, end - time.monotonic())))
        for visitor in visitors:
            visitor.join()
        memory.append(round(process.memory_info().rss / 2**20))
    return {
        "users": users,
        "minutes": minutes,
        **counts,
        "failures": failures,
        "slider_ms_alone": quantiles(alone),
        "slider_ms_crowded": quantiles(crowded),
        "memory_mb": memory,
    }


def _visitor(
    address: str, number: int, end: float, counts: dict, failures: list[str], crowded: list[float]
) -> None:
    with chromium() as browser:
        page = opened(browser, address)
        turn = 0
        while time.monotonic() < end:
            turn += 1
            try:
                create(page, 8 + (turn % 2), 1000 * number + turn)  # another count, another text to wait for
                crowded += latencies(page, 3)
                counts["requests"] += 5
                counts["pictures"] += 8 + (turn % 2)
            except Exception as error:  # whatever it is, it is a failure of the page
                failures.append(f"visitor {number}: {str(error).splitlines()[0]}")
                page.reload()
            errors = page.locator(".toast-body.error").all_inner_texts()
            failures += [f"visitor {number}: {text}" for text in errors]


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, 95th percentile and largest."""
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered)),
        "p95": round(ordered[int(0.95 * (len(ordered) - 1))]),
        "max": round(ordered[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    shots = commands.add_parser("screenshots")
    shots.add_argument("model")
    shots.add_argument("out", type=Path)
    shots.add_argument("--seed", type=int, default=7)
    crowd = commands.add_parser("load")
    crowd.add_argument("model")
    crowd.add_argument("--users", type=int, default=8)
    crowd.add_argument("--minutes", type=float, default=10)
    given = parser.parse_args()
    if given.command == "screenshots":
        screenshots(given.model, given.out, given.seed)
    else:
        print(json.dumps(load(given.model, given.users, given.minutes), indent=2))


if __name__ == "__main__":
    main()
