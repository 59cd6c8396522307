"""The page in a real browser: no console error, tokens where they belong, filters that work, no sideways scrolling."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from reroute_jax.figure.tokens import DEFERRED, DELETED, RETURNED, RUN
from tests.evals.known_page import COLS, ROWS, SIDE, colours, known_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="needs a browser and its driver: apt-get install chromium chromium-driver",
)
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, tmp_path):
    file = tmp_path / "index.html"
    file.write_text(known_page(), encoding="utf-8")
    resize(browser, 1280)
    browser.get(file.as_uri())
    return browser


def resize(browser, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 2, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def find(browser, css: str):
    return browser.find_elements("css selector", css)


def map_cells(element) -> np.ndarray:
    """The middle of every cell as it is on the screen, `[rows, cols, y, x, 3]`."""
    pixels = np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB").resize((COLS * 28, ROWS * 28)))
    return pixels.reshape(ROWS, SIDE, COLS, SIDE, 3).swapaxes(1, 2)


def states(element) -> np.ndarray:
    return np.array(list(element.get_attribute("data-states")), int).reshape(ROWS, COLS)


def kept_colour(cells: np.ndarray) -> np.ndarray:
    """Which cells show the image as it is in their middle, `[rows, cols]`."""
    middle = cells[:, :, 11:17, 11:17].astype(int)
    return np.abs(middle - colours().reshape(ROWS, COLS, 1, 1, 3)).max(axis=(2, 3, 4)) <= 6


def test_there_is_no_console_error(page):
    assert page.get_log("browser") == []


def test_nothing_comes_from_elsewhere(page):
    assert (
        page.execute_script("return performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:'))")
        == []
    )


def test_tokens_are_drawn_where_they_belong(page):
    maps = find(page, "#q0-0 .rj-map")
    assert [int((states(one) == RUN).sum()) for one in maps] == [24, 8, 4, 24, 8, 2]
    for one in maps:
        cells, expected = map_cells(one), states(one)
        shown = kept_colour(cells)
        assert shown[expected == RUN].all()
        assert not shown[(expected == DEFERRED) | (expected == DELETED)].any()
        tint = cells[:, :, 3:-3, 3:-3].astype(int).mean(axis=(2, 3))
        deferred, deleted = expected == DEFERRED, expected == DELETED
        assert (tint[deferred][:, 2] > tint[deferred][:, 0] + 20).all()
        assert (tint[deleted].max(axis=1, initial=0) < 90).all()


def test_a_returned_token_has_a_frame(page):
    last = find(page, "#q0-0 .rj-map")[-1]
    assert (states(last) == RETURNED).sum() == 2
    cells = map_cells(last)[states(last) == RETURNED].astype(int)
    edge = cells[:, 2:26, 2:5].reshape(2, -1, 3)
    assert (np.abs(edge - [0, 158, 115]).max(axis=2).min(axis=1) < 40).all()


def test_boxes_stand_on_the_image(page):
    plain = find(page, "#q0-0 .rj-plain")[0]
    outer = page.execute_script("return arguments[0].getBoundingClientRect().toJSON()", plain)
    box = page.execute_script(
        "return arguments[0].querySelectorAll('.rj-box')[1].getBoundingClientRect().toJSON()", plain
    )
    found = [
        (box["left"] - outer["left"]) / outer["width"],
        (box["top"] - outer["top"]) / outer["height"],
        (box["right"] - outer["left"]) / outer["width"],
        (box["bottom"] - outer["top"]) / outer["height"],
    ]
    np.testing.assert_allclose(found, [0.5, 0.25, 1.0, 0.75], atol=0.02)


def test_scores_replace_the_shades(page):
    one = find(page, "#q0-0 .rj-map")[1]
    assert not (kept_colour(map_cells(one)) & (states(one) != RUN)).any()
    find(page, "[name=view][value=scores]")[0].click()
    # The score grows with the number of the token: dark blue first, yellow last.
    # The true box lies over the rows between.
    cells = map_cells(one)[[0, 3], :, 11:17, 4:7].reshape(2 * COLS, -1, 3).mean(axis=1)
    assert np.all(np.diff(cells.sum(axis=1)) > -12)
    assert cells[0].sum() + 200 < cells[-1].sum()


def test_filters_show_what_they_name(page):
    def shown() -> list[str]:
        return [one.get_attribute("id") for one in find(page, "article") if one.is_displayed()]

    buttons = find(page, ".pg-filters button")
    names = ["reroute right and deletion wrong", "reroute wrong and deletion right", "both wrong", "both right", "all"]
    counts = [2, 1, 1, 1, 5]
    assert [one.text for one in buttons] == [f"{name} {count}" for name, count in zip(names, counts, strict=True)]
    assert shown() == ["q0-0", "q0-2", "q0-1"]
    for button, expected in zip(buttons, (["q0-0"], ["q0-2"], [], ["q0-1"], ["q0-0", "q0-2", "q0-1"]), strict=True):
        button.click()
        assert shown() == expected
        assert [one.get_attribute("aria-pressed") for one in buttons].count("true") == 1


def test_another_pair_changes_filters_and_columns(page):
    find(page, ".pg-filters select option")[1].click()
    buttons = find(page, ".pg-filters button")
    assert buttons[1].text == "reroute wrong and all tokens right 2"
    find(page, ".pg-all summary")[0].click()
    heads = [one.text for one in find(page, ".pg-all th[data-run]") if one.is_displayed()]
    assert heads == ["full", "pdrop-reroute-64"]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", buttons[1])
    buttons[1].click()
    rows = [one.get_attribute("data-number") for one in find(page, ".pg-all tbody tr") if one.is_displayed()]
    assert rows == ["2", "3"]


def test_a_token_tells_its_score_and_rank(page):
    from selenium.webdriver import ActionChains

    one = find(page, "#q0-0 .rj-map")[1]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", one)
    width, height = one.size["width"], one.size["height"]
    right, down = int(width * (1.5 / COLS - 0.5)), int(height * (1.5 / ROWS - 0.5))
    ActionChains(page).move_to_element_with_offset(one, right, down).perform()
    tip = find(page, "#pg-tip")[0].text
    assert tip == "token 7 (row 1, column 1): run, score 3.04e-1, rank 17 of 24".replace("e-1", "e-01")


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_runs_out_of_the_window(page, width):
    resize(page, width)
    assert page.execute_script("return document.documentElement.scrollWidth") == width


def test_every_map_can_be_reached_by_keyboard(page):
    one = find(page, "#q0-0 .rj-map")[1]
    page.execute_script("arguments[0].focus()", one)
    style = "return getComputedStyle(arguments[0].querySelector('.rj-heat')).opacity"
    assert page.switch_to.active_element == one
    assert page.execute_script(style, one) == "1"
