"""The page at `/` in a real browser: what a person does there, and what is then to be seen."""

from __future__ import annotations

import base64
import io
import math
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image

from omni_ray.api.page import FILES
from omni_ray.demo import scenes
from omni_ray.demo.check import reasons
from tests.conftest import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

DONE_MS = 60_000
WISH = "could you draw something round, the colour of a tomato, on the sea"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright; run `make setup`")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium; run `sudo apt install chromium`")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Server, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Page]:
    """The page with its models read. It may fetch from its own server alone, and its console stays empty; what it shows
    in the end is in ``tmp_path``."""
    width, height = getattr(request, "param", (1280, 900))
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda each: asked.append(each.url))
    page.on("console", lambda each: said.append(each.text))
    page.on("pageerror", lambda each: said.append(str(each)))
    page.goto(server.url)
    page.locator("select[name=model] option").first.wait_for(state="attached")
    yield page
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    context.close()
    assert {url for url in asked if not url.startswith((f"{server.url}/", "data:", f"blob:{server.url}/"))} == set()
    assert [line for line in said if "400 (Bad Request)" not in line] == []


def send(page: Page, model: str, prompt: str, **fields: str) -> None:
    page.select_option("select[name=model]", model)
    for name, value in fields.items():
        page.fill(f"[name={name}]", value)
    page.fill("[name=prompt]", prompt)
    page.click("#send")


def wait_done(page: Page, num: int = 1) -> None:
    panel = page.locator(".panel[data-state=done], .panel[data-state=failed]")
    panel.nth(num - 1).wait_for(timeout=DONE_MS)
    assert page.locator(".panel .problem:visible").all_inner_texts() == []


def facts(page: Page, panel: int = 0) -> dict[str, str]:
    """What a panel tells of the cost, by name."""
    rows = page.locator(".panel").nth(panel).locator(".facts > div")
    return {row.locator("dt").inner_text(): row.locator("dd").inner_text() for row in rows.all()}


def image_of(source: str | None) -> Image.Image:
    """The image in a `data:` URL."""
    assert source
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB")


def psnr(image: Image.Image, other: Image.Image) -> float:
    difference = np.asarray(image, np.float64) - np.asarray(other, np.float64)
    return 10 * math.log10(255**2 / max(float((difference**2).mean()), 1e-9))


def limits(server: Server) -> dict[str, dict[str, Any]]:
    models = httpx.get(f"{server.url}/v1/models", timeout=10).json()["data"]
    return {model["id"]: model["limits"] for model in models}


def num_running(server: Server, group: str) -> int:
    groups = httpx.get(f"{server.url}/ready", timeout=10).json()["groups"]
    return sum(each["num_running"] + each["num_queued"] for each in groups if each["group"] == group)


def test_tokens_come_one_by_one(page: Page) -> None:
    page.evaluate(
        """new MutationObserver(() => {
             const text = document.querySelector('.text')?.innerText;
             if (text && text !== window.seen?.at(-1)) (window.seen ??= []).push(text);
           }).observe(document.body, {subtree: true, childList: true, characterData: true})"""
    )
    send(page, "demo-chat", WISH, temperature="0")
    wait_done(page)
    assert page.inner_text(".text").strip() == "a red circle on a blue background"
    assert page.evaluate("window.seen.length") > 2
    told = facts(page)
    assert told["First token"].endswith(" s")
    assert float(told["Speed"].removesuffix(" tokens/s")) > 1
    assert int(told["Answer"].removesuffix(" tokens")) > 5


def test_previews_sharpen(page: Page) -> None:
    send(page, "demo-image", "a red circle", num_inference_steps="12", seed="1")
    page.locator(".panel .now", has_text="of 12").wait_for(timeout=DONE_MS)
    wait_done(page)
    final = image_of(page.get_attribute("figure img", "src"))
    assert not reasons(final, scenes.parse("a red circle"))
    previews = [image_of(each.get_attribute("src")) for each in page.locator(".previews img").all()]
    nearness = [psnr(each, final) for each in previews]
    assert len(nearness) == 3
    assert nearness == sorted(nearness)
    assert page.locator(".previews li").all_inner_texts() == ["after step 3", "after step 6", "after step 9"]
    assert page.locator(".strip .computed").count() == 12
    told = facts(page)
    assert (told["Steps computed"], told["Steps skipped"], told["Seed"]) == ("12", "0", "1")
    assert told.keys() >= {"Device time", "In the queue", "Run", "Peak memory"}


def test_cancelling_ends_the_work(page: Page, server: Server) -> None:
    send(page, "demo-image", "a red circle", num_inference_steps="200")
    page.locator(".panel[data-state=running]").wait_for(timeout=DONE_MS)
    page.keyboard.press("Escape")
    page.locator(".panel[data-state=cancelled]").wait_for(timeout=1000)
    assert re.fullmatch(r"Cancelled after step \d+ of 200", page.inner_text(".panel .state"))
    assert page.is_disabled("#cancel")
    deadline = time.monotonic() + 10
    while num_running(server, "demo-image"):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_two_side_by_side(page: Page) -> None:
    page.select_option("select[name=model]", "demo-image")
    page.check("[name=compare]")
    page.select_option("select[name=other_model]", "demo-omni")
    send(page, "demo-image", "a red circle on a blue background")
    wait_done(page, 2)
    assert page.locator(".panel h2").all_inner_texts() == ["demo-image", "demo-omni"]
    assert facts(page, 0)["Seed"] == facts(page, 1)["Seed"]
    assert page.locator(".caption:visible").inner_text() == "a red circle on a blue background"
    first, second = (image_of(each.get_attribute("src")) for each in page.locator("figure img").all())
    assert psnr(first, second) > 40
    left, right = (panel.bounding_box() for panel in page.locator(".panel").all())
    assert left is not None
    assert right is not None
    assert (left["y"], left["x"] + left["width"] <= right["x"]) == (right["y"], True)


def test_an_image_is_edited(page: Page, tmp_path: Path) -> None:
    page.select_option("select[name=model]", "demo-image")
    Image.new("RGB", (256, 256), (30, 60, 200)).save(tmp_path / "blue.png")
    page.set_input_files("[name=image]", tmp_path / "blue.png")
    send(page, "demo-image", "a red circle on a blue background", strength="0.9", num_inference_steps="10")
    wait_done(page)
    assert int(facts(page)["Steps computed"]) == 9


def test_a_video_is_played(page: Page, server: Server) -> None:
    name = next((name for name, each in limits(server).items() if each.get("output") == "video"), None)
    if name is None:
        pytest.skip("the deployment has no model that makes videos")
    send(page, name, "a red circle moving right")
    wait_done(page)
    page.wait_for_function("document.querySelector('video').currentTime > 0")
    assert page.evaluate("document.querySelector('video').videoWidth") > 0
    send(page, name, "a red circle moving right", num_inference_steps="200")
    page.locator(".panel[data-state=running]").wait_for(timeout=DONE_MS)
    page.click("#cancel")
    page.locator(".panel[data-state=cancelled]").wait_for()
    assert page.evaluate("document.activeElement.name") == "prompt"
    deadline = time.monotonic() + 10
    while num_running(server, name):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_errors_are_told_in_words(page: Page) -> None:
    send(page, "demo-image", "a red circle", size="250x256")
    page.locator(".panel[data-state=failed]").wait_for()
    assert "250 is no multiple of 16; 256 is" in page.inner_text(".panel .problem")
    send(page, "demo-image", " ")
    assert page.inner_text("#problem") == "Type a prompt first."


def test_only_fields_that_the_model_takes_are_shown(page: Page, server: Server) -> None:
    for name, each in limits(server).items():
        taken = each.get("fields", limits(server)[each["generate"]]["fields"] if "generate" in each else [])
        page.select_option("select[name=model]", name)
        for field in ("negative_prompt", "num_inference_steps", "guidance_scale", "guidance_scale_2", "num_frames"):
            assert page.is_visible(f"[name={field}]") == (field in taken), (name, field)
        assert page.is_visible("[name=max_tokens]") == (not taken)


@pytest.mark.parametrize("page", [(360, 740)], indirect=True)
def test_a_phone_shows_one_column(page: Page) -> None:
    def right() -> float:
        edges = "[...document.querySelectorAll('body *')].map((each) => each.getBoundingClientRect().right)"
        return float(page.evaluate(f"Math.max(document.documentElement.scrollWidth, ...{edges})"))

    page.check("[name=compare]")
    for name in page.locator("select[name=model] option").all_inner_texts():
        page.select_option("select[name=model]", name)
        assert right() <= 360, name
    send(page, "demo-image", "a red circle", num_inference_steps="150", seed="1")
    page.locator(".panel[data-state=running]").nth(1).wait_for(timeout=DONE_MS)
    assert right() <= 360
    page.click("#cancel")
    send(page, "demo-image", "a red circle", num_inference_steps="6")
    wait_done(page, 2)
    assert right() <= 360
    assert page.locator(".panel").first.is_visible()


def test_a_keyboard_is_enough(page: Page) -> None:
    assert page.evaluate("document.activeElement.name") == "prompt"
    for _ in range(2):  # past the box that compares
        page.keyboard.press("Shift+Tab")
    page.keyboard.type("demo-im")
    assert page.input_value("select[name=model]") == "demo-image"
    shown = "[...form.elements].filter((each) => each.checkVisibility() && !each.disabled).map((each) => each.name)"
    order = page.evaluate(shown)[1:]
    reached = []
    for _ in order:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.name"))
    assert reached == order
    assert {"compare", "prompt", "num_inference_steps", "seed", "partial_images"} < {*order}
    assert page.evaluate("document.activeElement.id") == "send"
    unnamed = "[...document.querySelectorAll('input, select, textarea')].filter((each) => !each.labels.length).length"
    assert page.evaluate(unnamed) == 0
    while page.evaluate("document.activeElement.name") != "prompt":
        page.keyboard.press("Shift+Tab")
    page.keyboard.type("a red circle")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("on a blue background")
    page.keyboard.press("Enter")
    wait_done(page)
    assert page.input_value("[name=prompt]") == "a red circle\non a blue background"
    assert page.locator("[role=status]").inner_text().startswith("Done in ")


def test_nothing_foreign_can_run(server: Server) -> None:
    for path, (_, kind) in FILES.items():
        reply = httpx.get(server.url + path, timeout=10)
        assert reply.headers["content-type"].startswith(kind)
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert "://" not in policy
    assert "/playground/page.js" not in httpx.get(f"{server.url}/openapi.json", timeout=10).text
