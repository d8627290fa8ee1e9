"""The annotation site's other pages in Chromium: accounts, review, the owner's numbers, texts."""

import json
import re
from pathlib import Path

import pytest
from annotation_site import (  # noqa: F401
    EVIL,
    PASSWORD,
    SETTINGS,
    live,
    new_task,
    place,
    submitted,
    task,
    visit,
    watched,
)
from playwright.sync_api import expect

from openqwen.http.static import SHARED
from openqwen.instruct import collaborate

PAGES = Path(collaborate.__file__).parent / "pages"
SMALL = """() => [...document.querySelectorAll("button, select, input, summary, nav a, textarea")]
  .filter((node) => node.checkVisibility() && !node.closest(".offscreen, label.check"))
  .map((node) => [node, node.getBoundingClientRect()])
  .filter(([, box]) => box.width && (box.height < 43.9 || box.width < 43.9))
  .map(([node, box]) => [node.outerHTML.slice(0, 120), box.width, box.height])"""
LONG = (
    "word " * 60 + "verylongword" * 30 + "\n\n```\n" + "x" * 300 + "\n```\n\n|" + "a|" * 30 + "\n|"
    + "-|" * 30 + "\n\n\\[ \\sum_{i=1}^n " + "a_i + " * 60 + "\\]\n"
)  # fmt: skip


def answer(site, name, ranks, role="annotator", **more):
    """A person who answers one task by the API; ranks: tiers of slots."""
    client = site.join(site.invite(role), name)
    found = site.post("next", client=client)["task"]
    given = {"ranks": ranks, "scores": {}, "flags": {}, "comment": "", "demonstration": None} | more
    body = {
        "lease": found["lease"]["id"],
        "key": f"{abs(hash(name)):016x}",
        "answer": given,
        "seconds": 3,
    }
    site.post(f"tasks/{found['id']}/answer", body, client=client)
    return client


def test_an_invitation_makes_an_account_once_and_a_password_logs_in(live, chromium):  # noqa: F811
    site = live([task("t1")])
    context = chromium.new_context()
    page = context.new_page()
    faults = watched(page, site)
    link = site.invite()
    page.goto(link)
    page.get_by_text("You are invited to the project “Capitals” as annotator").wait_for()
    page.get_by_label("Name").fill("Ada")
    page.get_by_label("Password").fill("short")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("h1")).to_have_text("Welcome")  # the browser refuses it
    page.get_by_label("Password").fill(PASSWORD)
    page.keyboard.press("Enter")
    assert new_task(page) == 3
    assert "invitation" not in page.url
    page.get_by_role("button", name="Ada").click()
    page.get_by_role("button", name="Change the password").click()
    page.get_by_label("Present password").fill(PASSWORD)
    page.get_by_label("New password").fill("another password")
    page.locator("dialog").get_by_role("button", name="Change the password").click()
    page.locator(".toast", has_text="is changed").wait_for()
    page.get_by_role("button", name="Ada").click()
    page.get_by_role("button", name="Log out").click()
    page.get_by_label("Name").fill("Ada")
    page.get_by_label("Password").fill(PASSWORD)
    page.keyboard.press("Enter")
    page.get_by_text("Name or password is wrong").wait_for()
    page.get_by_label("Password").fill("another password")
    page.keyboard.press("Enter")
    assert new_task(page) == 3
    page.context.clear_cookies()
    page.goto("about:blank")
    page.goto(link)
    page.get_by_role("heading", name="This invitation cannot be used").wait_for()
    assert faults == []
    context.close()


def test_roles_see_their_pages_alone(live, visit):  # noqa: F811
    site = live([task("t1")], overlap=3)
    links = lambda page: page.locator("#top nav a").all_inner_texts()
    assert links(visit(site, "Ada")) == ["Rank", "My answers"]
    assert links(visit(site, "Rita", "reviewer")) == ["Rank", "My answers", "Review", "Project"]
    page = visit(site, "Eve")
    page.goto(f"{site.url}/#/quality")
    assert new_task(page) == 3
    expect(page.get_by_text("Make an invitation link")).to_have_count(0)


def test_a_reviewer_returns_an_answer_and_its_author_sees_why(live, visit):  # noqa: F811
    site = live([task("t1", 3)], overlap=3)
    answer(site, "Grace", [["A", "B"], ["C"]], comment="B and A are alike.")
    author = visit(site, "Ada")
    for letter, number in (("A", 2), ("B", 1), ("C", 2)):
        place(author, letter, number)
    submitted(author)
    page = visit(site, "Rita", "reviewer")
    page.get_by_role("link", name="Question t1").click()
    page.get_by_role("heading", name="2 answers").wait_for()
    section = page.get_by_label("Ada", exact=True)
    assert re.fullmatch(r"[ABC]  >  [ABC] = [ABC]", section.locator(".ranks").inner_text())
    expect(page.get_by_label("Grace", exact=True)).to_contain_text("B and A are alike.")
    expect(page.get_by_text("model-1")).to_have_count(1)
    section.get_by_role("button", name="Return to its author").click()
    page.get_by_label("What should be changed?").fill("Read C again.")
    page.locator("dialog").get_by_role("button", name="Return to its author").click()
    page.locator(".toast", has_text="went back to its author").wait_for()
    page.get_by_role("heading", name="1 answer").wait_for()
    author.goto(f"{site.url}/#/mine")
    author.get_by_text("Read C again.").wait_for()
    author.get_by_role("link", name="Rank", exact=True).click()
    author.get_by_text("A reviewer returned this answer to you: Read C again.").wait_for()
    rows = author.locator(".ladder .place .chips").all_inner_texts()
    assert [row.strip().split() for row in rows] == [["B"], ["A", "C"], []]


def test_the_owner_invites_imports_exports_and_sees_the_numbers(live, visit):  # noqa: F811
    site = live([task("t1", 2)], overlap=4)
    answer(site, "Ada", [["A"], ["B"]])
    page = visit(site, "Boss", "owner")
    tile = page.locator(".tile", has_text="Answers").first
    tile.get_by_text("of 4 wanted; tasks: 1").wait_for()
    assert tile.locator("dd").first.inner_text() == "1"
    expect(page.locator(".tiles")).to_contain_text("One annotator only")
    page.get_by_label("Role", exact=True).select_option("reviewer")
    page.get_by_role("button", name="Make an invitation link").click()
    link = page.locator("#invitation-link").inner_text()
    site.join(link, "Rita")
    page.get_by_label("A file of tasks").set_input_files(
        {
            "name": "more.jsonl",
            "mimeType": "application/json",
            "buffer": (json.dumps(task("t3", 2)) + '\n{"id": "t4"}\n').encode(),
        }
    )
    page.get_by_text("Tasks added: 1; changed: 0; known already: 0; refused: 1").wait_for()
    with page.expect_download() as caught:
        page.get_by_role("link", name="Events").click()
    kinds = [json.loads(line)["kind"] for line in caught.value.path().read_text().splitlines()]
    assert kinds.count("answered") == 1
    answer(site, "Grace", [["A"], ["B"]])
    tile.locator("dd", has_text="2").first.wait_for(timeout=20_000)  # by itself
    square = page.get_by_role("region", name="Pairwise κ")
    expect(square.locator(".shade")).to_have_count(2)
    page.get_by_role("row", name=re.compile("Grace.*Deactivate")).get_by_role(
        "button", name="Deactivate"
    ).click()
    page.get_by_role("button", name="Activate", exact=True).wait_for()


def test_text_of_people_and_files_is_shown_as_text(live, visit):  # noqa: F811
    evil = [task(f"t{n}", 2, f"{EVIL} {n}", EVIL) for n in range(3)]
    for one in evil:
        one["responses"][0]["origin"]["model"] = EVIL
    criteria = [{"id": "c", "name": EVIL, "description": EVIL, "low": 1, "high": 3}]
    flags = [{"id": "f", "name": EVIL}]
    site = live(
        evil, title=EVIL, guidelines=EVIL, criteria=criteria, flags=flags, overlap=3, reveal=True
    )
    page = visit(site, EVIL[:60], "owner")
    page.get_by_role("link", name="Rank", exact=True).click()
    new_task(page)
    for letter in "AB":
        place(page, letter, 1)
    page.locator(".card").first.get_by_role("radio", name=re.compile(": 2$")).click()
    page.locator(".card").first.get_by_role("checkbox").check()
    page.get_by_label("Comment (optional)").fill(EVIL)
    page.locator(".card").first.get_by_role("button", name="Edit into").click()
    page.get_by_label("Demonstration, made from").fill(EVIL)
    submitted(page)
    page.locator(".toast", has_text="<script>").wait_for()
    for view in ("mine", "review", "quality"):
        page.goto(f"{site.url}/#/{view}")
        page.locator("#main .page").wait_for()
        page.wait_for_timeout(200)
        assert EVIL[:40] in page.locator("body").inner_text()
    page.goto(f"{site.url}/#/review")
    page.locator("#main .entries a").last.wait_for()
    for link in page.locator("#main .entries a").all():
        page.goto(f"{site.url}/{link.get_attribute('href')}")
        page.locator("h1", has_text="Task").wait_for()
        if page.locator(".answer").count():
            assert page.locator(".answer").inner_text().count("<script>") >= 4
        page.go_back()
        page.locator("#main .entries a").last.wait_for()
    expect(page.locator("#main img, #main script, #toasts img")).to_have_count(0)


def axe_faults(page):
    """Violations of WCAG 2.2 AA that axe-core finds."""
    axe = pytest.importorskip("axe_playwright_python", reason="axe is not installed")
    page.evaluate(f"{(Path(axe.__file__).parent / 'axe.min.js').read_text()};0")
    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
    found = page.evaluate("(runOnly) => axe.run(document, {runOnly})", rules)
    assert found["passes"]
    return [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]]


def states(page, site):
    """Every view of the site, one after the other."""
    page.get_by_role("link", name="Rank", exact=True).click()
    new_task(page)
    # A task that one holds open cannot be reviewed.
    other = "t1" if "Short" in page.locator(".prompt").inner_text() else "t2"
    yield "rank"
    place(page, "A", 1)
    page.locator(".card").first.get_by_role("button", name="Edit into").click()
    page.keyboard.press("Control+Enter")
    page.locator(".toast").wait_for()
    yield "rank with an editor and a toast"
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.locator("dialog").wait_for()
    yield "keys"
    page.keyboard.press("Escape")
    page.locator("#skip").click()
    page.get_by_label("Reason (optional)").wait_for()
    yield "skip"
    page.keyboard.press("Escape")
    for view in ("mine", "review", "quality", f"review/{other}"):
        page.goto(f"{site.url}/#/{view}")
        page.locator("#main .page").wait_for()
        page.wait_for_timeout(300)
        yield view
    page.context.clear_cookies()
    page.goto(f"{site.url}/?again#/")
    page.get_by_role("heading", name="Log in").wait_for()
    yield "log in"
    page.goto(site.invite())
    page.get_by_role("heading", name="Welcome").wait_for()
    yield "invitation"


def busy(live):  # noqa: F811
    """A site with something of everything, and a task that nobody holds."""
    tasks = [task("t1", 4, LONG, LONG), task("t2", 8, "Short", LONG)]
    site = live(tasks, overlap=4)
    for name in ("Ada", "Grace"):
        answer(site, name, [["A"], ["B", "C"], ["D"]], comment=LONG)
    return site


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault(live, visit, scheme):  # noqa: F811
    site = busy(live)
    page = visit(site, "Boss", "owner", color_scheme=scheme, reduced_motion="reduce")
    found = {name: axe_faults(page) for name in states(page, site)}
    assert len(found) == 10
    assert {name: faults for name, faults in found.items() if faults} == {}


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_scrolling_sideways_and_room_for_fingers(live, visit, width):  # noqa: F811
    site = busy(live)
    page = visit(site, "Boss", "owner", viewport={"width": width, "height": 780})
    for name in states(page, site):
        sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert sizes[0] <= sizes[1], name
        if width < 900:
            assert page.evaluate(SMALL) == [], name


def test_everything_by_keys_alone(live, chromium):  # noqa: F811
    """From the log-in to the second task without a mouse; focus can always be seen."""
    site = live([task("t1", 3), task("t2", 3)])
    site.join(site.invite(), "Ada")
    context = chromium.new_context(viewport={"width": 1280, "height": 860})
    page = context.new_page()
    page.goto(site.url)
    page.get_by_role("heading", name="Log in").wait_for()
    for text in ("Ada", PASSWORD):
        page.keyboard.type(text)
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    new_task(page)
    page.keyboard.press("?")
    assert page.locator("dialog dt").count() > 10
    page.keyboard.press("Escape")
    page.keyboard.press("2")
    page.keyboard.press("1")
    page.keyboard.press("k")
    page.keyboard.press("Shift+ArrowDown")  # into a tie with the other
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("3")
    page.keyboard.press("v")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("f")
    page.keyboard.press("Space")
    page.keyboard.press("n")
    page.keyboard.press("m")
    page.keyboard.type("by keys, 1 2 3")
    page.keyboard.press("Escape")
    page.keyboard.press("w")
    page.keyboard.type("better: ")
    page.keyboard.press("Control+Enter")
    page.locator(".hint", has_text="1 done").wait_for()
    [[found]] = site.answers().values()
    assert [len(tier) for tier in found["ranks"]] == [2, 1]
    assert found["none_good"] is True
    assert found["comment"] == "by keys, 1 2 3"
    assert "better: " in found["demonstration"]["text"]
    assert [list(scores) for scores in found["scores"].values()] == [["helpful"]]
    assert [flags for flags in found["flags"].values() if flags] == [["unsafe"]]
    context.close()


def test_keys_can_be_changed_and_switched_off(live, visit):  # noqa: F811
    page = visit(live([task("t1", 2)]))
    page.keyboard.press("?")
    page.locator("#key-undo").click()
    page.keyboard.press("z")
    page.locator("#key-none").click()
    page.keyboard.press("Backspace")
    expect(page.locator("#key-none")).to_have_text("off")
    page.keyboard.press("Escape")
    page.reload()
    new_task(page)
    page.keyboard.press("n")
    expect(page.get_by_label("No response is good enough")).not_to_be_checked()
    page.keyboard.press("1")
    page.keyboard.press("u")
    expect(page.locator(".ladder [data-place='1'] .chip")).to_have_count(1)
    page.keyboard.press("z")
    expect(page.locator(".ladder [data-place='1'] .chip")).to_have_count(0)


def test_a_screen_reader_hears_what_happens(live, visit):  # noqa: F811
    page = visit(live([task("t1", 3)]))
    said = lambda: page.locator("#status").inner_text()
    assert said() == "A new task with 3 responses."
    page.keyboard.press("2")
    assert said() == "A: place 2."
    page.keyboard.press("2")
    assert said() == "B: place 2, tie with A."
    card = page.get_by_label("Response A", exact=True).aria_snapshot()
    assert '- group "Place of response A"' in card
    assert '- radio "Place 2" [checked]' in card


def test_the_language_is_remembered_and_nothing_is_left_in_english(live, visit):  # noqa: F811
    site = live([task("t1", 2)])
    page = visit(site, "李明")
    page.get_by_label("Comment (optional)").fill("a word")
    page.get_by_label("Language").select_option("zh")
    page.get_by_role("heading", name="为回答排序").wait_for()
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    expect(page.get_by_label("备注")).to_have_value("a word")
    page.reload()
    page.get_by_role("heading", name="为回答排序").wait_for()
    words = set(re.findall(r"[A-Za-z]{3,}", page.locator("body").inner_text()))
    project = "Answer response Question English CTRL Enter Helpful Unsafe Capitals"
    assert words - set(project.split()) - set(re.findall(r"\w+", SETTINGS["guidelines"])) == set()


def test_both_languages_have_every_text():
    texts = {name: json.loads((PAGES / f"{name}.json").read_text()) for name in ("en", "zh")}
    plain = {key for key in texts["en"] if not key.endswith(".one")}
    assert set(texts["zh"]) == plain
    for key in plain:
        holes = [set(re.findall(r"\{(\w+)\}", texts[name][key])) for name in texts]
        assert holes[0] == holes[1], key
    known = {re.sub(r"\.(one|other)$", "", key) for key in texts["en"]}
    for path in PAGES.glob("*.js"):
        used = re.findall(r"\bt\(\s*\"([\w.]+)\"", path.read_text())
        assert set(used) <= known, path.name


def test_the_pages_come_from_the_package_and_share_its_files():
    names = {path.name for path in PAGES.iterdir()}
    assert names.isdisjoint(path.name for path in SHARED.iterdir())
    html = (PAGES / "index.html").read_text()
    assert not re.search(r"https?://|<script>|<style|style=|\son\w+=", html)
