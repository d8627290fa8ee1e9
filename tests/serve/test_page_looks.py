"""Width, themes, contrast, names of controls, and that nothing is asked of any other server."""

import pytest
from browser import context, load, page, say, settings, settled, stub, texts  # noqa: F401
from playwright.sync_api import expect
from stub_api import PAGE

LONG = (
    "A "
    + "verylongword" * 30
    + " `"
    + "code" * 60
    + "`\n\n```\n"
    + "x" * 300
    + "\n```\n\n|"
    + "a|" * 30
    + "\n|"
    + "-|" * 30
)

# Text whose contrast with what is behind it is under WCAG's AA, 4.5 to 1 (3 to 1 for large text).
FAINT = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((c, n) => c * a / 255 + below[n] * (1 - a / 255));
  const behind = (node) => node
    ? over(rgba(getComputedStyle(node).backgroundColor), behind(node.parentElement)) : [255, 255, 255];
  const linear = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, w, n) => sum + w * linear(c[n] / 255), 0);
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const words = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!words || !node.checkVisibility({opacityProperty: true})) continue;
    if (node.closest(".offscreen, :disabled, noscript")) continue;
    const style = getComputedStyle(node);
    const ground = behind(node);
    const [a, b] = [light(over(rgba(style.color), ground)), light(ground)].sort((x, y) => y - x);
    const large = parseFloat(style.fontSize) >= 24;
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < (large ? 3 : 4.5)) found.push([node.textContent.slice(0, 40), contrast]);
  }
  return found;
}"""

# Controls without a name that a screen reader could say.
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, select, a, summary")]
  .filter((node) => !(node.getAttribute("aria-label") || node.labels?.length || node.textContent.trim()))
  .map((node) => node.outerHTML)"""


def busy_page(page, stub):  # noqa: F811
    """A conversation with all kinds of things in it."""
    stub.answers = [
        (
            "# T\n\ntext [l](https://a.b) `c`\n\n```py\n# remark\nx = 'a' + 1\n```\n\n> "
            "q\n\n|a|\n|-|\n|b|"
        ),
        LONG,
    ]
    say(page, "Question")
    stub.refusals = [(400, "No.", {})]
    say(page, "Again")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_names(page, stub, scheme):  # noqa: F811
    page.emulate_media(color_scheme=scheme)
    busy_page(page, stub)
    settings(page)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(251, 250, 247)", "dark": "rgb(19, 19, 23)"}[scheme]
    page.mouse.move(700, 300)
    page.wait_for_timeout(300)
    assert page.evaluate(FAINT) == []
    assert page.evaluate(NAMELESS) == []


def test_the_theme_can_be_chosen_and_stays(page, stub):  # noqa: F811
    page.emulate_media(color_scheme="light")
    for theme, color in [("light", "rgb(251, 250, 247)"), ("dark", "rgb(19, 19, 23)")]:
        page.locator("#sidebar-foot button").first.click()
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == color
    load(page, stub)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.parametrize("width", [320, 390, 820, 1280])
def test_no_scrolling_sideways(page, stub, width):  # noqa: F811
    page.set_viewport_size({"width": width, "height": 780})
    page.evaluate("document.querySelector('#open-panel').click()")
    panel = page.locator("#panel")
    panel.get_by_text("Two answers to each message").click()
    page.click("[aria-label='Close the settings']")
    stub.answers = [LONG]
    say(page, LONG)
    for selector in ("html", "#scroller", "#composer", "#top"):
        sizes = page.evaluate(
            f"(({{scrollWidth: a, clientWidth: b}}) => [a, "
            f"b])(document.querySelector('{selector}'))"
        )
        assert sizes[0] <= sizes[1], selector
    edge = page.evaluate(
        "Math.max(...[...document.querySelectorAll('.turn')].map((n) => "
        "n.getBoundingClientRect().right))"
    )
    assert edge <= width
    assert page.locator("#composer .box").bounding_box()["x"] >= 0


def test_on_a_phone_the_side_panels_slide_in(page, stub):  # noqa: F811
    page.set_viewport_size({"width": 390, "height": 780})
    say(page, "Hello")
    page.locator("#sidebar").wait_for(state="hidden")
    page.click("#open-sidebar")
    page.locator("#sidebar .open").wait_for()
    page.keyboard.press("Escape")
    page.locator("#sidebar").wait_for(state="hidden")
    page.click("#new")
    page.locator(".welcome").wait_for()


# What a finger can press and is under 44 px high or wide; a box to tick counts with its label.
SMALL = """() => [...document.querySelectorAll("button, summary, select, input, textarea, label.check")]
  .filter((node) => node.checkVisibility() && !node.closest(".offscreen") && node.type !== "checkbox")
  .map((node) => [node, node.getBoundingClientRect()])
  .filter(([, box]) => box.width && (box.height < 43.9 || box.width < 43.9))
  .map(([node, box]) => [node.outerHTML.slice(0, 120), box.width, box.height])"""


def test_on_a_phone_a_finger_finds_what_it_presses(page, stub):  # noqa: F811
    page.set_viewport_size({"width": 390, "height": 780})
    busy_page(page, stub)
    page.click("[aria-label=Regenerate] >> nth=0")
    settled(page)
    expect(page.locator(".versions")).to_have_count(1)
    assert page.evaluate(SMALL) == []
    page.click("#open-sidebar")
    page.locator("#sidebar .menu summary").click()
    assert page.evaluate(SMALL) == []
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.click("#open-panel")
    page.get_by_text("Two answers to each message").click()
    assert page.evaluate(SMALL) == []
    page.click("[aria-label='Close the settings']")
    say(page, "Which?")
    page.locator(".pair .button").wait_for()
    assert page.evaluate(SMALL) == []


def test_the_view_follows_the_answer_unless_the_reader_scrolls(page, stub):  # noqa: F811
    distance = (
        "(({scrollHeight: a, scrollTop: b, clientHeight: c}) => a - b - "
        "c)(document.querySelector('#scroller'))"
    )
    stub.answers, stub.pause = ["line\n\n" * 150], 0.008
    say(page, "Long", wait=False)
    page.locator(".markdown p").nth(60).wait_for()
    page.wait_for_timeout(100)
    assert page.evaluate(distance) < 60
    page.mouse.move(700, 400)
    page.mouse.wheel(0, -900)
    page.locator("#to-end").wait_for()
    top = page.evaluate("document.querySelector('#scroller').scrollTop")
    settled(page)
    assert page.evaluate("document.querySelector('#scroller').scrollTop") == top
    page.click("#to-end")
    page.locator("#to-end").wait_for(state="hidden")


def test_everything_comes_from_the_package(page, stub, context):  # noqa: F811
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    load(page, stub)
    stub.answers = ["![pixel](https://evil.example/p.png) https://evil.example"]
    say(page, "Hi")
    assert asked
    assert all(url.startswith(stub.url) for url in asked)
    assert {url.rpartition("/")[2] for url in asked} >= {
        p.name for p in PAGE.iterdir() if p.suffix in (".js", ".css")
    }
    assert not [p for p in PAGE.iterdir() if len(p.read_text().splitlines()) >= 500]


def test_less_motion_where_it_is_asked_for(page, stub):  # noqa: F811
    page.emulate_media(reduced_motion="reduce")
    stub.pause, stub.answers = 0.2, ["slow answer here"]
    say(page, "Hi", wait=False)
    page.locator(".busy").wait_for()
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.busy')).animationName") == "none"
    )
