#!/usr/bin/env python
"""Does the page work in a browser? Drives a running `app.py` with both models in headless Chromium, checks what can be seen, takes screenshots.

    python -m pip install playwright            # and Chromium, e.g. apt-get install chromium
    python examples/space/app.py --language runs/language --image runs/image
    python examples/space/check_in_browser.py --url http://127.0.0.1:7860 --screenshots /tmp

The image model must be one of digits, as `examples/train_image.py` makes by default.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from app import digit_files
from PIL import Image
from playwright.sync_api import expect, sync_playwright

SECONDS = 1000


def check_text(page: Any) -> None:
    page.get_by_label("Text", exact=True).fill("import os\n\ndef list_files(folder):\n    return os")
    page.get_by_role("button", name="Solve").click()
    steps_per_token = page.locator(".rq-text")
    expect(steps_per_token).to_contain_text("list_files")
    expect(page.locator(".rq-predictions tr")).to_have_count(1 + 8)
    set_slider(page, "Steps of the solve", 12)
    expect(page.locator(".rq-predictions tr")).to_have_count(1 + 12)
    expect(page.get_by_text("12 steps", exact=False).first).to_be_visible()
    legend = page.get_by_text("steps until the residual is 0.01 or less")
    expect(legend).to_be_visible()
    page.get_by_role("radio", name="0.001").check()
    expect(page.get_by_text("steps until the residual is 0.001 or less")).to_be_visible()
    expect(legend).to_have_count(0)
    measure(page)
    for text, complaint in (
        ("   ", "The text is empty"),
        ("word " * 700, "tokens, and this page shows up to"),
        ("word " * 1000, "characters"),
    ):
        page.get_by_label("Text", exact=True).fill(text)
        page.get_by_role("button", name="Solve").click()
        expect(page.get_by_role("alert").filter(has_text=complaint)).to_be_visible()
        expect(steps_per_token).to_be_hidden()
    page.get_by_label("Text", exact=True).fill("class <b>Reader</b>:\n    def read")  # markup is text, too
    page.get_by_role("button", name="Solve").click()
    expect(steps_per_token).to_contain_text("<b>Reader</b>")


def check_image(page: Any, folder: Path) -> None:
    page.get_by_role("tab", name="Image").click()
    expect(page.get_by_role("alert").filter(has_text="There is no image yet")).to_be_visible()
    page.locator(".gallery-item").nth(4).click()
    expect(page.get_by_text("It is taken for '4'")).to_be_visible()
    page.get_by_label("Remove image").click()
    expect(page.get_by_role("alert").filter(has_text="There is no image yet")).to_be_visible()
    page.locator("input[type=file]").set_input_files(digit_files()[7])
    expect(page.get_by_text("It is taken for '7'")).to_be_visible()
    best = page.locator(".rq-predictions td.rq-best")
    expect(best).to_have_count(8)
    expect(best.last).to_contain_text("%")
    set_slider(page, "Steps of the solve, in each stage", 5)
    expect(best).to_have_count(5)
    measure(page)
    photograph = Image.open(digit_files()[3]).convert("RGB").resize((1200, 900))
    broken, large = folder / "broken.png", folder / "large.png"
    photograph.point(lambda value: 255 - value).save(folder / "photograph.jpg")
    broken.write_bytes(b"no image")
    Image.new("1", (6000, 6000)).save(large)
    for file, complaint in ((broken, "The file is no image"), (large, "Scale it down")):
        page.get_by_label("Remove image").click()
        expect(page.get_by_role("alert").filter(has_text="There is no image yet")).to_be_visible()
        page.locator("input[type=file]").set_input_files(file)
        expect(page.get_by_role("alert").filter(has_text=complaint)).to_be_visible()
        expect(best).to_have_count(0)
    page.get_by_label("Remove image").click()
    page.locator("input[type=file]").set_input_files(folder / "photograph.jpg")
    expect(best).to_have_count(5)
    page.get_by_label("Invert").check()
    expect(page.get_by_text("It is taken for '3'")).to_be_visible()


def set_slider(page: Any, label: str, value: int) -> None:
    """With the keys: a pointer would hit the value by chance only."""
    slider = page.get_by_role("slider", name=f"range slider for {label}", exact=True)
    slider.focus()
    while int(slider.input_value()) != value:
        slider.press("ArrowRight" if int(slider.input_value()) < value else "ArrowLeft")


def measure(page: Any) -> None:
    page.get_by_role("button", name="Measure").click()
    rows = page.locator(".rq-costs tr").filter(visible=True)  # not those of the other tab
    expect(rows).to_have_count(4)
    expect(rows.nth(1)).to_contain_text("reversible")
    assert rows.nth(1).locator("td").last.inner_text() == "0", "a drift that is not 0"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser")
    parser.add_argument("--screenshots", type=Path, help="folder for pictures of both tabs, wide, narrow and dark")
    options = parser.parse_args()
    expect.set_options(timeout=180 * SECONDS)  # of a busy machine
    elsewhere: list[str] = []
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        for name, width, scheme in (("wide", 1200, "light"), ("narrow", 400, "light"), ("dark", 1200, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.on("request", lambda request: elsewhere.append(request.url))
            page.goto(options.url)
            expect(page.locator(".rq-text")).to_contain_text("read_lines")  # the page begins with an example
            for tab, check in (("text", check_text), ("image", lambda page: check_image(page, Path(folder)))):
                check(page)
                overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                assert overflow <= 0, f"the {tab} tab is {overflow} pixels wider than a window of {width}"
                if options.screenshots:
                    page.wait_for_timeout(2 * SECONDS)  # figures appear smoothly
                    page.screenshot(path=options.screenshots / f"space_{tab}_{name}.png", full_page=True)
            page.close()
        browser.close()
    elsewhere = sorted({url for url in elsewhere if not url.startswith((options.url, "data:", "blob:"))})
    assert not elsewhere, f"the page asked for {elsewhere}"
    print("The page works.")


if __name__ == "__main__":
    main()
