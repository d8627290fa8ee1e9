"""The page of a tree of tags in Chromium: what people do, two at once, no connection, all widths."""

import asyncio
import json
import re
import threading

import httpx
import pytest
from playwright.sync_api import expect
from tag_trees import artifact
from test_annotation_views import axe_faults

from openqwen.http.server import gated, listen, open_url, uvicorn_server
from openqwen.instruct.collaborate.tree import TagNode, TagTree, read_edits
from openqwen.instruct.collaborate.tree_editor import TreeEditor
from openqwen.instruct.collaborate.tree_site import TreeConfig, application, page_files

EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
SMALL = """() => [...document.querySelectorAll("button, select, input, [role=treeitem], summary")]
  .filter((node) => node.checkVisibility({checkVisibilityCSS: true}))
  .map((node) => [node, node.getBoundingClientRect()])
  .filter(([, box]) => box.width && (box.height < 43.9 || box.width < 43.9))
  .map(([node, box]) => [node.outerHTML.slice(0, 120), box.width, box.height])"""


class LiveTree:
    """A tree that is served; `stop` and `start` break the connection and restore it."""

    def __init__(self, folder, keys=(), person="ann"):
        self.folder, self.keys, self.person = folder, list(keys), person
        self.port = 0
        self.start()

    def start(self):
        self.editor = TreeEditor(self.folder)
        listener = listen("127.0.0.1", self.port)
        self.url = open_url(listener)
        self.port = listener.getsockname()[1]
        app = application(self.editor, self.folder.name, self.person)
        app = gated(app, TreeConfig(), self.keys, page_files().paths)
        self.server = uvicorn_server(app, 5.0, 1.0)
        run = lambda: asyncio.run(self.server.serve([listener]))
        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def stop(self):
        self.server.should_exit = True
        self.thread.join(10)
        self.editor.close()

    def edits(self):
        """What the file of edits has, in short."""
        edits = read_edits(self.folder / "edits.jsonl")
        return [(e.edit, e.tag, e.into or e.name or e.parent or e.undoes) for e in edits]


@pytest.fixture
def live(tmp_path):
    trees = []

    def start(*given, **values):
        folder = artifact(tmp_path / f"tagged{len(trees)}", *given)
        trees.append(LiveTree(folder, **values))
        return trees[-1]

    yield start
    for tree in trees:
        tree.stop()


@pytest.fixture
def visit(chromium):
    """A function that opens a page; it may not throw, break its policy, or run a text."""
    pages, faults = [], []

    def start(tree, ready="[role=treeitem]", **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 860}} | options)
        context.set_default_timeout(15_000)
        page = context.new_page()
        pages.append(page)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if "Policy" in said.text else None)
        page.on(
            "request", lambda one: None if one.url.startswith(tree.url) else faults.append(one.url)
        )
        page.goto(tree.url)
        page.locator(ready).first.wait_for()
        return page

    yield start
    for page in pages:
        assert page.is_closed() or not page.evaluate("window.hacked")
        page.context.close()
    assert faults == []


def shown(page):
    """The rows: name, level, count."""
    rows = page.get_by_role("treeitem").all()
    return [(row.locator(".name").inner_text(), int(row.get_attribute("aria-level")),
             int(row.locator(".count").inner_text())) for row in rows]  # fmt: skip


def names(page):
    return [name for name, _, _ in shown(page)]


def saved(page, act):
    """Do something, and wait until the server has it and the page shows it."""
    with page.expect_response(lambda one: one.url.endswith("/api/edits")) as caught:
        act()
    page.locator(".toast").wait_for()
    return caught.value


def options(page):
    """The choices of the window that is open."""
    return page.get_by_role("dialog").get_by_role("option")


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


def test_the_tree_its_counts_and_a_tag(live, visit):
    page = visit(live({0: f"{EVIL} first", 3: "longs" * 500}))
    assert shown(page) == [
        ("math", 1, 4), ("algebra", 2, 3), ("maths", 1, 2), ("poem", 1, 2), ("style", 2, 2),
    ]  # fmt: skip
    detail = page.locator("#detail")
    detail.get_by_text("About numbers.").wait_for()
    expect(detail.locator("h2")).to_have_text("math")
    assert f"{EVIL} first" in detail.inner_text()
    detail.locator("summary").click()
    expect(detail.locator("details .note")).to_contain_text("500 more characters")
    page.get_by_role("treeitem", name="algebra, 3 instructions").click()
    detail.get_by_text("About equations.").wait_for()
    detail.get_by_role("button", name="math").click()
    detail.get_by_text("About numbers.").wait_for()


def test_merge_rename_move_drop_undo_redo_by_the_mouse(live, visit):
    tree = live()
    page = visit(tree)
    for name in ("math", "maths"):
        page.get_by_role("treeitem", name=f"{name},").locator(".box").click()
    page.locator("#actions").get_by_text("2 tags selected").wait_for()
    page.locator("#merge").click()
    assert options(page).first.inner_text().split() == ["math", "4"]
    saved(page, options(page).first.click)
    page.get_by_role("treeitem", name="math, 5 instructions").wait_for()
    page.get_by_role("treeitem", name="style,").click()
    page.locator("#rename").click()
    page.get_by_label("New name").fill(f"  writing   {EVIL}")
    saved(page, lambda: press(page, "Enter"))
    page.get_by_role("treeitem", name="writing").wait_for()
    page.locator("#move").click()
    page.get_by_role("dialog").get_by_role("combobox").fill("top")
    saved(page, lambda: press(page, "Enter"))
    page.locator(".toast", has_text="stands at the top").wait_for()
    assert page.get_by_role("treeitem", name="writing").get_attribute("aria-level") == "1"
    page.get_by_role("treeitem", name="poem,").click()
    saved(page, page.locator("#drop").click)
    page.get_by_role("treeitem", name="poem,").wait_for(state="detached")
    assert tree.edits() == [
        ("merge", "maths", "math"), ("rename", "style", f"writing {EVIL}"),
        ("move", f"writing {EVIL}", None), ("drop", "poem", None),
    ]  # fmt: skip
    saved(page, page.locator(".toast button").click)
    page.get_by_role("treeitem", name="poem,").wait_for()
    for _ in range(3):
        page.wait_for_timeout(100)
        saved(page, page.locator("#undo").click)
    page.get_by_role("treeitem", name="maths, 2").wait_for()
    expect(page.locator("#undo")).to_be_disabled()
    assert len(shown(page)) == 5
    saved(page, page.locator("#redo").click)
    page.get_by_role("treeitem", name="math, 5 instructions").wait_for()
    assert {edit.by for edit in read_edits(tree.folder / "edits.jsonl")} == {"ann"}


def test_everything_by_keys_alone(live, visit):
    tree = live()
    page = visit(tree)
    assert page.evaluate("document.activeElement.id") == "tree"
    press(page, "ArrowDown", "ArrowLeft")  # algebra → its parent
    press(page, "ArrowLeft")  # fold
    assert names(page) == ["math", "maths", "poem", "style"]
    press(page, "ArrowRight", "ArrowRight", "F2")
    page.keyboard.type("equations")
    saved(page, lambda: press(page, "Enter"))
    page.get_by_role("treeitem", name="equations").wait_for()
    assert page.evaluate("document.activeElement.id") == "tree"
    press(page, "ArrowDown", "Space", "v")  # maths
    page.keyboard.type("math")
    assert [one.split()[0] for one in options(page).all_inner_texts()] == ["math"]
    saved(page, lambda: press(page, "Enter"))
    page.locator("[aria-level='2']").nth(2).wait_for()
    press(page, "End", "Delete")
    page.get_by_role("treeitem", name="style").wait_for(state="detached")
    press(page, "Control+z")
    page.get_by_role("treeitem", name="style").wait_for()
    press(page, "Control+y")
    page.get_by_role("treeitem", name="style").wait_for(state="detached")
    press(page, "/")
    page.keyboard.type("math")
    press(page, "ArrowDown", "Control+a", "m")
    page.get_by_role("dialog").wait_for()
    press(page, "ArrowDown")
    saved(page, lambda: press(page, "Enter"))
    assert tree.edits()[-1] == ("merge", "math", "maths")
    page.get_by_role("treeitem", name="maths, 5").wait_for()
    press(page, "/", "Escape", "h")
    page.get_by_role("dialog", name="History").wait_for()
    press(page, "Tab", "Enter")
    page.locator(".history .undone").wait_for()
    press(page, "Escape", "?")
    assert page.locator("dialog dt").count() > 10
    press(page, "Escape")


def test_any_edit_of_the_history_can_be_undone_and_faults_are_said(live, visit):
    tree = live()
    page = visit(tree)
    post = lambda edits, n: httpx.post(
        f"{tree.url}/api/edits",
        json={"key": f"by-bob-{n:04}", "after": n, "by": "bob", "edits": edits},
    )
    assert post([{"edit": "rename", "tag": "math", "name": "mathematics"}], 0).status_code == 200
    merge = {"edit": "merge", "tag": "maths", "into": "mathematics"}
    assert post([merge], 1).status_code == 200
    page.get_by_role("treeitem", name="mathematics, 5").wait_for()  # the page looks by itself
    page.locator(".toast", has_text="bob: “maths” is merged").wait_for()
    page.locator("#history").click()
    page.locator("#edit-0").click()
    page.locator(".history .undone", has_text="Undone by ann").wait_for()
    expect(page.locator(".history")).to_contain_text(
        "Without effect: There is no tag 'mathematics'."
    )
    expect(page.locator(".history li").first).to_contain_text("bob, ")
    page.locator("#edit-0", has_text="Redo").click()
    page.locator(".history .undone").wait_for(state="detached")
    assert "Without effect" not in page.locator(".history").inner_text()
    assert page.locator("#edit-0").evaluate("(node) => node === document.activeElement")


def test_two_people_change_the_same_tag(live, visit):
    tree = live()
    ann, bob = visit(tree), visit(tree)
    bob.evaluate("localStorage.setItem('openqwen.person', 'bob')")
    bob.reload()
    bob.get_by_role("treeitem").first.wait_for()
    for page in (ann, bob):  # neither looks for the other's edits
        page.evaluate("Object.defineProperty(document, 'visibilityState', {value: 'hidden'})")
    ann.get_by_role("treeitem", name="poem,").click()
    saved(ann, ann.locator("#drop").click)
    bob.get_by_role("treeitem", name="poem,").click()
    bob.locator("#rename").click()
    bob.get_by_label("New name").fill("verse")
    assert saved(bob, lambda: press(bob, "Enter")).status == 409
    said = bob.locator(".toast").inner_text()
    assert "somebody changed this at the same time" in said
    assert "“poem” is renamed “verse”" in said
    bob.get_by_role("treeitem", name="poem,").wait_for(state="detached")
    assert tree.edits() == [("drop", "poem", None)]
    saved(bob, lambda: (bob.locator("#rename").click(), bob.get_by_label("New name").fill("writing"),
                        press(bob, "Enter")))  # fmt: skip
    assert [edit.by for edit in read_edits(tree.folder / "edits.jsonl")] == ["ann", "bob"]


def test_an_edit_without_a_connection_is_kept_and_made_once(live, visit):
    tree = live()
    page = visit(tree)
    page.get_by_role("treeitem", name="poem,").click()
    page.locator("#detail h2", has_text="poem").wait_for()
    tree.stop()
    page.locator("#drop").click()
    page.locator("#saved", has_text="waits for the server").wait_for()
    expect(page.locator("#drop")).to_be_disabled()
    expect(page.locator("#undo")).to_be_disabled()
    context = page.context
    page.close()
    tree.start()
    page = context.new_page()
    page.goto(tree.url)
    page.get_by_role("treeitem", name="poem,").wait_for(state="detached")
    page.locator("#undo:not([disabled])").wait_for()
    assert tree.edits() == [("drop", "poem", None)]


def test_a_response_that_is_lost_makes_no_second_edit(live, visit):
    tree = live()
    page = visit(tree)

    lost = []

    def lose(route):
        lost.append(route.fetch().status)
        if len(lost) == 1:
            route.abort()
        else:
            route.continue_()

    page.route("**/api/edits", lose)
    page.get_by_role("treeitem", name="poem,").click()
    page.locator("#drop").click()
    page.get_by_role("treeitem", name="poem,").wait_for(state="detached")
    page.locator("#undo:not([disabled])").wait_for()
    assert tree.edits() == [("drop", "poem", None)]
    assert lost == [200, 200]


def test_search_finds_names_and_forms(live, visit):
    page = visit(live())
    page.get_by_label("Search tags").fill("STYLE!")
    page.locator("#found", has_text="1 of 5 tags found").wait_for()
    assert names(page) == ["poem", "style"]  # with what it stands below
    expect(page.locator("#detail h2", has_text="style")).to_have_count(1)
    page.get_by_role("button", name="Select all found").click()
    page.locator("#actions", has_text="1 tag selected").wait_for()
    page.get_by_label("Search tags").fill("nothing of this kind")
    expect(page.get_by_role("treeitem")).to_have_count(0)
    page.keyboard.press("Escape")
    expect(page.get_by_role("treeitem")).to_have_count(5)


def test_a_name_and_a_key_are_asked_for(live, visit):
    tree = live(keys=["secret"], person="")
    page = visit(tree, "[role=alert] input")
    page.get_by_label("Key").fill("secret")
    page.get_by_role("button", name="Use this key").click()
    page.get_by_role("treeitem", name="poem,").click()
    page.locator("#drop").click()
    page.get_by_label("Name", exact=True).fill("Cy")
    saved(page, lambda: press(page, "Enter"))
    assert [edit.by for edit in read_edits(tree.folder / "edits.jsonl")] == ["Cy"]


def test_other_sites_and_bad_requests_are_refused(live):
    tree = live()
    body = {"key": "a" * 8, "after": 0, "by": "x", "edits": [{"edit": "drop", "tag": "poem"}]}
    path = f"{tree.url}/api/edits"
    text = json.dumps(body)
    evil = {"Origin": "http://evil.example"}
    assert httpx.post(path, content=text, headers={"Content-Type": "text/plain"}).status_code == 400
    assert httpx.post(path, content=text, headers=evil).status_code == 400  # no type
    assert httpx.get(path, headers={"Host": "evil.example"}).status_code == 403
    for wrong in (
        {"key": "short"}, {"after": -1}, {"edits": []}, {"by": "x" * 201}, {"more": 1},
        {"edits": [{"edit": "drop", "tag": "x" * 201}]}, {"edits": [{"edit": "explode"}]},
        {"edits": [{"edit": "undo", "undoes": 0}] * 501},
    ):  # fmt: skip
        assert httpx.post(path, json=body | wrong).status_code == 400, wrong
    assert httpx.post(path, content=b" " * (2 << 20)).status_code == 413
    assert tree.edits() == []
    policy = httpx.get(tree.url).headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy


def states(page):
    """Every view of the page."""
    yield "tree"
    page.get_by_role("treeitem", name="algebra").locator(".box").click()
    page.get_by_role("treeitem", name="maths").locator(".box").click()
    yield "selection"
    page.locator("#merge").click()
    page.get_by_role("dialog").wait_for()
    yield "merge"
    saved(page, lambda: press(page, "Enter"))
    page.wait_for_timeout(200)
    yield "toast"
    page.locator("#rename").click()
    yield "rename"
    press(page, "Escape")
    page.locator("#history").click()
    page.get_by_role("dialog").wait_for()
    yield "history"
    page.locator("#edit-0").click()
    page.locator(".history .undone").wait_for()
    yield "undone"
    press(page, "Escape")
    page.locator("#tree").focus()
    press(page, "?")
    page.get_by_role("dialog").wait_for()
    yield "keys"
    press(page, "Escape")
    page.locator("#person").click()
    page.get_by_role("dialog").wait_for()
    yield "person"
    press(page, "Escape")
    if page.locator("#open-detail").is_visible():
        page.locator("#open-detail").click()
        page.wait_for_timeout(300)
        yield "detail"
        press(page, "Escape")
    page.get_by_label("Search tags").fill("none of them")
    yield "nothing found"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault(live, visit, scheme):
    page = visit(live(), color_scheme=scheme, reduced_motion="reduce")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(251, 250, 247)", "dark": "rgb(19, 19, 23)"}[scheme]
    found = {name: axe_faults(page) for name in states(page)}
    assert len(found) == 10
    assert {name: faults for name, faults in found.items() if faults} == {}


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_scrolling_sideways_and_room_for_fingers(live, visit, width):
    long = "a very long name of a tag that goes on and on " * 4
    page = visit(live({0: "w" * 3000}), viewport={"width": width, "height": 780})
    page.get_by_role("treeitem", name="style").click()
    page.locator("#rename").click()
    page.get_by_label("New name").fill(long[:200])
    saved(page, lambda: press(page, "Enter"))
    page.get_by_role("treeitem", name="algebra").click()
    for name in states(page):
        for selector in ("html", "#main", "#tree", "#top", "#actions", "#detail"):
            sizes = page.locator(selector).evaluate(
                "(node) => [node.scrollWidth, node.clientWidth]"
            )
            assert sizes[0] <= sizes[1], (name, selector)
        if width < 900:
            assert page.evaluate(SMALL) == [], name


def test_chinese(live, visit):
    page = visit(live(), locale="zh-CN")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    expect(page.get_by_role("button", name="合并")).to_be_visible()
    page.locator("#language").select_option("en")
    page.get_by_role("button", name="Merge").wait_for()


def test_both_languages_have_the_same_texts():
    one, two = (
        {key.removesuffix(".one").removesuffix(".other") for key in json.loads(body)}
        for body in (page_files()._files[f"/{name}.json"][0] for name in ("en", "zh"))
    )
    assert one == two
    used = set()
    for path in ("app", "rows", "pick", "detail", "history"):
        text = page_files()._files[f"/{path}.js"][0].decode()
        used |= set(re.findall(r"""[^\w]t\("([\w.]+)\"""", text))
    assert used
    assert used <= one


@pytest.fixture
def thousands(live):
    """5,000 tags in three levels."""

    def start():
        tree = live(None, [[f"tag {n}"] for n in range(5_000)])
        tree.stop()
        nodes = {}
        for n in range(5_000):
            parent = None if n < 50 else f"tag {n % 50 if n < 500 else 50 + n % 450}"
            nodes[f"tag {n}"] = TagNode(f"tag {n}", 1, parent, {f"tag {n}": 1})
        TagTree(nodes).write(tree.folder)
        tree.start()
        return tree

    return start


def test_thousands_of_tags_are_few_elements(thousands, visit):
    """Only rows in sight are in the page, so that a step costs the same with any number of tags."""
    page = visit(thousands())
    page.locator("#found", has_text="5,000 tags").wait_for()
    assert page.get_by_role("treeitem").count() < 60
    assert page.get_by_role("treeitem").first.get_attribute("aria-setsize") == "50"
    press(page, "End")
    last = page.locator(".tag.active")
    expect(last).to_be_visible()
    assert page.locator("#tree").get_attribute("aria-activedescendant") == last.get_attribute("id")
    press(page, "Home", "Delete")
    page.locator("#found", has_text="4,999 tags").wait_for()
    press(page, "/")
    page.keyboard.type("tag 4321")
    page.locator("#found", has_text="1 of 4,999").wait_for()
    press(page, "ArrowDown")
    expect(page.locator(".tag.active .name")).to_have_text("tag 4321")
