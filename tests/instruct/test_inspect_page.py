"""The data page in Chromium: links, keys, filters, the difference, hostile records, both widths."""

import asyncio
import itertools
import json
import re
import threading

import pytest
from playwright.sync_api import expect

from openqwen.http.server import gated, listen, url_of, uvicorn_server
from openqwen.instruct.inspect.app import DataPage, application, page_files
from openqwen.instruct.inspect.settings import InspectConfig

EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
NAMELESS = """() => [...document.querySelectorAll("button, input, select, a")]
  .filter((node) => !(node.getAttribute("aria-label") || node.labels?.length || node.textContent.trim()))
  .map((node) => node.outerHTML)"""
SMALL = """() => [...document.querySelectorAll("button, select, input, .entry")]
  .filter((node) => node.checkVisibility() && !node.closest(".offscreen"))
  .map((node) => [node, node.getBoundingClientRect()])
  .filter(([, box]) => box.width && (box.height < 43.9 || box.width < 43.9))
  .map(([node, box]) => [node.outerHTML.slice(0, 120), box.width, box.height])"""
RECORDS = [
    {
        "messages": [
            {"role": "user", "content": f"Question {n} {EVIL}"},
            {"role": "assistant", "content": f"# Answer\n\n{EVIL}\n\n```py\nprint({n})\n```"},
        ],
        "origin": {"method": f"m{n % 3}", "model": EVIL, "score": n / 100, "tags": [f"t{n % 2}"]},
    }
    for n in range(1, 101)
]
RECORDS.append(
    {
        "prompt": [{"role": "user", "content": "Pair"}],
        "chosen": [{"role": "assistant", "content": f"one two three {EVIL}"}],
        "rejected": [{"role": "assistant", "content": f"one 2 three four {EVIL}"}],
        EVIL: [EVIL],
    }
)
CALL = {"type": "function", "function": {"name": EVIL, "arguments": {"a": EVIL}}}
RECORDS.append(
    {
        "messages": [
            {"role": "user", "content": "w" * 3000},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": EVIL},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    lines = [json.dumps(record) for record in RECORDS] + [f'{{"broken": {EVIL}']
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def served(source):
    keys = {"": [], "key": ["secret"]}
    servers, urls = [], {}
    for name, given in keys.items():
        config = InspectConfig(cache=source.parent / "cache", port=0)
        listener = listen("127.0.0.1", 0)
        urls[name] = url_of(listener)
        page = DataPage(str(source), config)
        app = gated(application(page), config, given, page_files().paths)
        server = uvicorn_server(app, 5.0, 1.0)
        run = lambda server=server, listener=listener: asyncio.run(server.serve([listener]))
        servers.append((server, threading.Thread(target=run, daemon=True)))
        servers[-1][1].start()
    yield urls
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def page(chromium, served):
    """The page; it may not throw, break its policy, run a record, or ask another server."""
    context = chromium.new_context(viewport={"width": 1280, "height": 860})
    context.set_default_timeout(15_000)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None,
    )
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    yield page
    assert faults == []
    assert not page.evaluate("window.hacked")
    assert all(url.startswith((*served.values(), "blob:")) for url in asked)
    context.close()


def load(page, served, query=""):
    page.goto(f"{served['']}/{query}")
    page.wait_for_selector("#filters h2", state="attached")


def shown(page):
    page.wait_for_selector(".record")
    return page.locator("#main h1").inner_text()


def test_the_list_its_pages_and_its_order(page, served):
    load(page, served)
    expect(page.locator(".found")).to_have_text("1 to 50 of 103")
    page.get_by_role("button", name="Next", exact=True).click()
    page.get_by_text("51 to 100 of 103").wait_for()
    page.locator("#sort").select_option("best")
    page.get_by_text("1 to 50 of 103").wait_for()
    expect(page.locator(".entry .number").first).to_have_text("100")
    page.go_back()
    page.get_by_text("51 to 100 of 103").wait_for()
    assert page.locator(".entry").last.get_attribute("href").endswith("record=100")


def test_a_link_to_a_record_keys_and_the_way_back(page, served):
    load(page, served, "?method=m1&record=4")
    assert shown(page) == "Record 4"
    page.keyboard.press("j")
    page.get_by_role("heading", name="Record 7", exact=True).wait_for()
    page.keyboard.press("ArrowLeft")
    page.get_by_role("heading", name="Record 4", exact=True).wait_for()
    page.keyboard.press("k")
    page.get_by_role("heading", name="Record 1", exact=True).wait_for()
    expect(page.get_by_label("Previous record (K)")).to_be_disabled()
    assert re.search(r"method=m1.*record=1$", page.url)
    page.go_back()
    page.get_by_role("heading", name="Record 4", exact=True).wait_for()
    page.keyboard.press("Escape")
    page.locator(".entry").first.wait_for()
    expect(page.locator(".found")).to_have_text("1 to 34 of 34")
    page.keyboard.press("/")
    page.keyboard.type('Question "7"')
    page.keyboard.press("Enter")
    page.get_by_text("1 to 1 of 1").wait_for()
    page.locator(".entry").click()
    assert shown(page) == "Record 7"


DRAWN = """(wanted) => {
  const bars = document.querySelector(".histogram").querySelectorAll(".bar title");
  const counts = [...bars].map((bar) => Number(bar.textContent.split(" ").pop()));
  return counts.reduce((a, b) => a + b, 0) === wanted;
}"""


def test_filters_by_the_bars_and_the_histogram(page, served):
    load(page, served)
    page.locator(".value", has_text="m2").click()
    page.get_by_text("1 to 33 of 33").wait_for()
    page.locator(".value", has_text="t1").click()
    page.get_by_text("1 to 16 of 16").wait_for()
    page.locator(".value", has_text="m2").click()
    page.get_by_text("1 to 50 of 50").wait_for()
    page.get_by_role("button", name="Clear filters").click()
    page.get_by_text("1 to 50 of 103").wait_for()
    page.get_by_label("Grade, at least").fill("0.95")
    page.get_by_label("Grade, at least").press("Enter")
    page.get_by_text("1 to 6 of 6").wait_for()
    page.get_by_role("button", name="Clear filters").click()
    page.get_by_text("1 to 50 of 103").wait_for()
    page.wait_for_function(DRAWN, arg=103)  # the statistics come after the list
    before = page.locator(".histogram").first.locator(".bar").last
    count = before.locator("title").text_content().rpartition(" ")[2]
    before.click()
    page.get_by_text(f"1 to {count} of {count}").wait_for()


def test_chosen_and_rejected_side_by_side_and_their_difference(page, served):
    load(page, served, "?record=101")
    assert shown(page) == "Record 101"
    expect(page.locator(".pair .turn")).to_have_count(2)
    page.get_by_role("button", name="Difference").click()
    assert page.locator(".turn .plain del").all_inner_texts() == ["2", " four"]
    assert page.locator(".turn .plain ins").all_inner_texts() == ["two"]
    page.keyboard.press("k")
    page.get_by_role("heading", name="Record 100", exact=True).wait_for()
    expect(page.locator(".markdown h3")).to_have_text("Answer")
    expect(page.locator("figure.code pre").first).to_have_text("print(100)")
    page.get_by_role("button", name="Plain text").click()
    expect(page.locator(".markdown")).to_have_count(0)
    expect(page.locator(".plain").first).to_contain_text(EVIL)


DIFFERENCE = """async ([before, after]) => {
  const {difference} = await import(location.origin + "/difference.js");
  return difference(before, after).map(({kind, text}) => [kind, text]);
}"""


def test_the_difference_leads_from_one_text_to_the_other(page, served):
    load(page, served)
    words = ["a", "b", "c ", "床", " ", "\n"]
    state = 7
    for _ in range(150):
        texts = []
        for _ in range(2):
            text = ""
            for _ in range(state % 23):
                state = (state * 1103515245 + 12345) % 2**31
                text += words[(state >> 16) % len(words)]
            state = (state * 1103515245 + 12345) % 2**31
            texts.append(text)
        pieces = page.evaluate(DIFFERENCE, texts)
        for side, without in ((0, "added"), (1, "removed")):
            assert "".join(text for kind, text in pieces if kind != without) == texts[side]
        assert not any(text == "" for _, text in pieces)
        assert all(a[0] != b[0] for a, b in itertools.pairwise(pieces))
    assert page.evaluate(DIFFERENCE, ["x y z", "x z"]) == [
        ["same", "x "], ["removed", "y "], ["same", "z"],
    ]  # fmt: skip
    long = page.evaluate(DIFFERENCE, ["a " * 50_000, "b " * 50_000])
    assert [kind for kind, _ in long] == ["removed", "added", "same"]


def test_hostile_broken_and_odd_records(page, served):
    load(page, served, "?record=102")
    shown(page)
    assert page.locator(".call strong").inner_text() == EVIL
    expect(page.locator("#main img, #main script, #filters img")).to_have_count(0)
    page.keyboard.press("j")
    page.get_by_role("heading", name="Record 103", exact=True).wait_for()
    expect(page.get_by_role("alert")).to_contain_text("not JSON")
    expect(page.locator(".plain")).to_contain_text(EVIL)
    for query, said in (
        ("?record=104", "There is no record 104"),
        ("?record=../x", "Not Found"),
        ("?bogus=1", "bogus"),
        ("?text=%3D", "letters or digits"),
    ):
        page.goto(f"{served['']}/{query}")
        assert said in page.get_by_role("alert").inner_text()
    load(page, served, "?text=nothingofthiskind")
    expect(page.locator(".found")).to_have_text("No record passes the filters.")


def test_the_raw_record_can_be_saved(page, served):
    load(page, served, "?record=101")
    shown(page)
    with page.expect_download() as caught:
        page.get_by_label("Save the raw record").click()
    assert json.loads(caught.value.path().read_text()) == RECORDS[100]


def test_a_key_is_asked_for(page, served):
    page.goto(served["key"])
    page.get_by_label("Key").fill("secret")
    page.get_by_role("button", name="Use this key").click()
    page.locator(".entry").first.wait_for()


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("query", ["", "?record=1", "?record=101", "?record=102"])
def test_no_scrolling_sideways_and_every_control_has_a_name(page, served, width, query):
    page.set_viewport_size({"width": width, "height": 780})
    load(page, served, query)
    for selector in ("html", "#main", "#top", "#filters"):
        sizes = page.evaluate(
            f"(({{scrollWidth: a, clientWidth: b}}) => [a, b])(document.querySelector('{selector}'))"
        )
        assert sizes[0] <= sizes[1], selector
    assert page.evaluate(NAMELESS) == []
    if width < 900:
        page.click("#open-filters")
        page.wait_for_timeout(300)
        assert page.evaluate(SMALL) == []
        page.keyboard.press("Escape")
        page.locator("#filters").wait_for(state="hidden")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes(page, served, scheme):
    page.emulate_media(color_scheme=scheme)
    load(page, served)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(251, 250, 247)", "dark": "rgb(19, 19, 23)"}[scheme]
    page.get_by_label("Light or dark").click()
    page.get_by_label("Light or dark").click()
    load(page, served)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_source_that_has_grown_can_be_read_again(page, served, source):
    load(page, served)
    with open(source, "a") as file:
        file.write(json.dumps({"text": "a new record"}) + "\n")
    page.reload()
    page.get_by_role("button", name="Read it again").click()
    page.get_by_text("of 104").wait_for()
    assert page.locator("#stale").is_hidden()
