"""Ranking in Chromium: every way of input equals the export; drafts, undo, and lost connections."""

import random
import re

import pytest
from annotation_site import PASSWORD, live, new_task, place, submitted, task, visit  # noqa: F401
from playwright.sync_api import expect

CALLS = """async (calls) => {
  const order = await import(location.origin + "/order.js");
  return calls.map(([name, ...given]) => order[name](...given));
}"""


def drawn_order(draw, count):
    """A random weak order: tiers of response numbers."""
    left = draw.sample(range(count), count)
    tiers = []
    while left:
        size = draw.randint(1, len(left)) if draw.random() < 0.6 else 1
        tiers.append(sorted(left[:size]))
        left = left[size:]
    return tiers


def tiers_of(places):
    numbers = sorted(set(places.values()))
    return [sorted(slot for slot in places if places[slot] == n) for n in numbers]


def test_the_order_is_what_the_steps_say(live, visit):  # noqa: F811
    """The functions of order.js against their meaning, on random orders."""
    page = visit(live([task("t1")]))
    draw = random.Random(3)
    slots = ["A", "B", "C", "D", "E"]
    cases = []
    for _ in range(300):
        ranked = drawn_order(draw, 5)[: draw.randint(1, 5)]
        spread = sorted(draw.sample(range(1, 9), len(ranked)))
        places = {slots[n]: at for at, tier in zip(spread, ranked) for n in tier}
        cases.append((places, draw.choice(slots), draw.choice([-1, 1]), draw.randint(1, 9)))
    found = page.evaluate(
        CALLS,
        [
            call
            for places, slot, step, before in cases
            for call in (
                ["tiers", places, slots],
                ["stepped", places, slots, slot, step],
                ["inserted", places, slots, slot, before],
            )
        ],
    )
    for (places, slot, step, before), (tiers, stepped, inserted) in zip(
        cases, zip(found[::3], found[1::3], found[2::3])
    ):
        assert tiers == tiers_of(places)
        # Inserted: alone on its place, behind exactly those that were better than `before`.
        others = {other: at for other, at in places.items() if other != slot}
        assert tiers_of({o: inserted[o] for o in others}) == tiers_of(others)
        assert [o for o in others if inserted[o] == inserted[slot]] == []
        better = {o for o in others if inserted[o] < inserted[slot]}
        assert better == {o for o in others if others[o] < before}
        # Stepped: the others keep their order, and the slot moves by half a place.
        assert tiers_of({o: stepped[o] for o in others}) == tiers_of(others)
        assert sorted(set(stepped.values())) == list(range(1, max(stepped.values()) + 1))
        if slot in places:
            tied = [o for o in others if others[o] == places[slot]]
            again = [o for o in others if stepped[o] == stepped[slot]]
            ordered = tiers_of(others)
            beyond = [tier for tier in ordered if (others[tier[0]] - places[slot]) * step > 0]
            if tied:
                assert again == []
                assert all((stepped[o] - stepped[slot]) * step < 0 for o in tied)
            elif beyond:
                assert sorted(again) == (beyond[0] if step > 0 else beyond[-1])
        else:
            assert stepped[slot] == max(stepped.values())


def shown_numbers(page):
    """Letters of the responses shown, and the response number in each one's text."""
    texts = page.locator(".card .markdown").all_inner_texts()
    return {chr(65 + n): int(re.search(r"response (\d+)", text)[1]) for n, text in enumerate(texts)}


def rank_by(way, page, tiers, draw):
    """Enter tiers of response numbers in one of the ways that the page offers."""
    letters = {number: letter for letter, number in shown_numbers(page).items()}
    count = len(letters)
    rows = sorted(draw.sample(range(1, count + 1), len(tiers)))
    wanted = {letters[n]: row for row, tier in zip(rows, tiers) for n in tier}
    if way == "click":
        for letter in draw.sample(sorted(wanted), count):
            place(page, letter, wanted[letter])
    elif way == "keys":
        for letter in sorted(wanted):
            page.keyboard.press(str(wanted[letter]))
    elif way == "drag":
        for letter in draw.sample(sorted(wanted), count):
            target = page.locator(f".ladder [data-place='{wanted[letter]}']")
            page.locator(f"#chip-{letter}").drag_to(target, target_position={"x": 8, "y": 8})
    else:  # arrow keys in the list
        for tier in tiers:
            for n, letter in enumerate(letters[number] for number in tier):
                page.locator(f"#chip-{letter}").press("ArrowUp")
                if n:  # it stands behind its tier now: one more step joins it
                    page.locator(f"#chip-{letter}").press("ArrowUp")


WAYS = ("click", "keys", "drag", "arrows")


def rankings_equal_the_export(site, pages, rounds, seed):
    draw = random.Random(seed)
    given = {}
    for n in range(rounds):
        for m, page in enumerate(pages):
            count = new_task(page)
            name = re.search(r"Question (t\d+)", page.locator(".prompt").inner_text())[1]
            tiers = drawn_order(draw, count)
            rank_by(WAYS[(n + m) % len(WAYS)], page, tiers, draw)
            given[page.person, name] = tiers
            submitted(page)
            page.wait_for_function(
                "name => !document.querySelector('.prompt')?.innerText.includes(name + ' ')",
                arg=f"Question {name}",
            )
    found = {place: answers[-1]["ranks"] for place, answers in site.answers().items()}
    assert {
        place: [sorted(map(int, tier)) for tier in ranks] for place, ranks in found.items()
    } == given
    return given


def tasks_of(draw, count):
    # A space behind the name, so that no name begins another.
    return [task(f"t{n}", draw.randint(2, 8), f"Question t{n} ?") for n in range(count)]


def test_rankings_through_the_browser_equal_the_export(live, visit):  # noqa: F811
    draw = random.Random(11)
    site = live(tasks_of(draw, 6), overlap=3, gold_share=0)
    pages = [visit(site, name) for name in ("Ada", "Grace", "Emmy")]
    given = rankings_equal_the_export(site, pages, 4, 11)
    assert len(given) == 12


@pytest.mark.slow
def test_rankings_of_ten_people_equal_the_export(live, visit):  # noqa: F811
    draw = random.Random(12)
    site = live(tasks_of(draw, 40), overlap=5, gold_share=0)
    pages = [visit(site, f"Person {n}") for n in range(10)]
    given = rankings_equal_the_export(site, pages, 15, 12)
    assert len(given) == 150
    assert sum(any(len(tier) > 1 for tier in tiers) for tiers in given.values()) > 50


def test_only_the_best_need_a_place_where_the_project_says_so(live, visit):  # noqa: F811
    site = live([task("t1", 5)], best=2)
    page = visit(site)
    expect(
        page.locator(".card").first.get_by_role("radio", name=re.compile("Place"))
    ).to_have_count(2)
    place(page, "C", 1)
    page.get_by_text("1 response has no place yet").wait_for()
    place(page, "E", 2)
    numbers = shown_numbers(page)
    submitted(page)
    [[answer]] = site.answers().values()
    assert [[int(n) for n in tier] for tier in answer["ranks"][:2]] == [
        [numbers["C"]],
        [numbers["E"]],
    ]


def test_a_project_without_ties_refuses_them_and_says_why(live, visit):  # noqa: F811
    site = live([task("t1", 2)], ties=False)
    page = visit(site)
    place(page, "A", 1)
    place(page, "B", 1)
    page.locator("#state", has_text="wants an order without ties").wait_for()
    page.keyboard.press("Control+Enter")
    page.locator(".toast", has_text="without ties").wait_for()
    page.locator("#chip-B").press("ArrowDown")
    submitted(page)
    assert len(site.answers()) == 1


def test_scores_flags_comment_and_demonstration_reach_the_log(live, visit):  # noqa: F811
    site = live([task("t1", 2)])
    page = visit(site)
    numbers = shown_numbers(page)
    place(page, "A", 2)
    place(page, "B", 1)
    best = page.get_by_label("Response B", exact=True)
    best.get_by_role("radio", name="Helpful: 4").click()
    best.get_by_role("radio", name="Helpful: 2").click()
    best.get_by_role("radio", name="Helpful: 2").click()  # takes it back
    best.get_by_role("radio", name="Helpful: 5").click()
    page.get_by_label("Response A", exact=True).get_by_label("Unsafe").check()
    page.get_by_label("Comment (optional)").fill("Both are short.")
    best.get_by_role("button", name="Edit into a demonstration").click()
    page.get_by_label("Demonstration, made from response B").fill("A better answer.")
    submitted(page)
    [[answer]] = site.answers().values()
    a, b = (str(numbers[letter]) for letter in "AB")
    assert answer["scores"] == {b: {"helpful": 5}}
    assert {slot: flags for slot, flags in answer["flags"].items() if flags} == {a: ["unsafe"]}
    assert answer["comment"] == "Both are short."
    assert answer["demonstration"]["text"] == "A better answer."
    assert str(answer["demonstration"]["from"]) == b
    [record] = site.export("demonstrations")
    assert record["messages"][-1]["content"] == "A better answer."


def test_undo_and_redo_walk_through_the_changes(live, visit):  # noqa: F811
    page = visit(live([task("t1", 3)]))
    rows = lambda: page.locator(".ladder .place .chips").all_inner_texts()
    page.keyboard.press("2")
    page.keyboard.press("1")
    assert [row.strip() for row in rows()] == ["B", "A", ""]
    page.get_by_label("Comment (optional)").press_sequentially("many letters")
    page.keyboard.press("Escape")
    page.keyboard.press("u")
    expect(page.get_by_label("Comment (optional)")).to_have_value("")
    page.keyboard.press("u")
    assert [row.strip() for row in rows()] == ["", "A", ""]
    page.keyboard.press("y")
    page.keyboard.press("y")
    assert [row.strip() for row in rows()] == ["B", "A", ""]
    expect(page.get_by_label("Comment (optional)")).to_have_value("many letters")
    for _ in range(3):
        page.keyboard.press("u")
    expect(page.locator("#undo")).to_be_disabled()


def opened_again(page):
    """Undo the answer that was sent, and wait until the server has its task."""
    with page.expect_response(lambda response: response.url.endswith("/reopen")):
        page.locator(".toast").get_by_role("button", name="Undo").click()
    page.evaluate("() => null")  # the page has run what waited for the response


def test_an_answer_can_be_opened_again_and_changed(live, visit):  # noqa: F811
    site = live([task("t1", 2), task("t2", 2)])
    page = visit(site)
    place(page, "A", 1)
    place(page, "B", 2)
    numbers = shown_numbers(page)
    first = page.locator(".prompt").inner_text()
    submitted(page)
    opened_again(page)
    page.locator(".prompt", has_text=first).wait_for()
    assert [row.strip() for row in page.locator(".ladder .place .chips").all_inner_texts()] == [
        "A",
        "B",
    ]
    place(page, "A", 2)
    submitted(page)
    latest = [answers[-1] for answers in site.answers().values()]
    assert [[sorted(map(int, tier)) for tier in one["ranks"]] for one in latest] == [
        [sorted(numbers.values())]
    ]
    page.get_by_role("link", name="My answers").click()
    page.locator(".entries .button").click()
    page.locator(".prompt", has_text=first).wait_for()


def test_a_task_opened_again_stays_though_the_next_one_arrives_later(live, visit):  # noqa: F811
    page = visit(live([task("t1", 2), task("t2", 2)]))
    place(page, "A", 1)
    place(page, "B", 2)
    first = page.locator(".prompt").inner_text()
    held = []
    page.route("**/api/next", lambda route: held.append(route))
    submitted(page)
    opened_again(page)
    with page.expect_response("**/api/next"):
        for route in held:
            route.continue_()
    page.wait_for_timeout(300)  # the page has had time to show the wrong task
    expect(page.locator(".prompt")).to_have_text(first)


def test_a_skipped_task_goes_to_others(live, visit):  # noqa: F811
    site = live([task("t1", 2)], overlap=1)
    page = visit(site)
    new_task(page)
    page.keyboard.press("x")
    page.get_by_label("Reason (optional)").fill("not my field")
    page.locator("dialog").get_by_role("button", name="Skip").click()
    page.get_by_role("heading", name="No task for you now").wait_for()
    other = visit(site, "Grace")
    assert new_task(other) == 2
    [skipped] = [event for event in site.export("events") if event["kind"] == "skipped"]
    assert skipped["new"]["reason"] == "not my field"


def test_a_draft_is_there_after_a_reload_and_in_another_browser(live, visit, chromium):  # noqa: F811
    site = live([task("t1", 3)])
    page = visit(site)
    place(page, "B", 3)
    with page.expect_response(lambda r: r.url.endswith("/draft") and r.status == 200):
        page.get_by_label("Comment (optional)").fill("half a thought")
    page.reload()
    assert new_task(page) == 3
    expect(page.get_by_label("Comment (optional)")).to_have_value("half a thought")
    assert page.locator(".ladder [data-place='3'] .chips").inner_text().strip() == "B"
    context = chromium.new_context()
    context.add_cookies(page.context.cookies())
    second = context.new_page()
    second.goto(site.url)
    assert new_task(second) == 3
    expect(second.get_by_label("Comment (optional)")).to_have_value("half a thought")
    with second.expect_response(lambda r: r.url.endswith("/draft") and r.status == 200):
        second.get_by_label("Comment (optional)").fill("a whole thought")
    context.close()
    page.reload()
    new_task(page)
    expect(page.get_by_label("Comment (optional)")).to_have_value("a whole thought")


def test_a_lost_connection_keeps_the_answer_and_sends_it_once(live, visit):  # noqa: F811
    site = live([task("t1", 2), task("t2", 2)])
    page = visit(site)
    place(page, "A", 1)
    page.context.set_offline(True)
    place(page, "B", 2)  # only this browser has this
    page.get_by_text("Kept in this browser").wait_for()
    page.locator("#submit").click()
    page.get_by_role("heading", name="No connection to the server").wait_for()
    assert site.answers() == {}
    page.context.set_offline(False)
    new_task(page)
    [answers] = site.answers().values()
    assert len(answers) == 1
    assert [len(tier) for tier in answers[0]["ranks"]] == [1, 1]
    assert page.evaluate("Object.keys(localStorage).filter((k) => k.includes('.out.'))") == []


def test_a_reply_that_is_lost_does_not_count_twice(live, visit):  # noqa: F811
    """The server has the answer, the browser does not know: it sends again, after a reload too."""
    site = live([task("t1", 2), task("t2", 2)])
    page = visit(site)
    lost = []

    def lose(route):
        lost.append(route.fetch().status)
        route.abort("connectionreset")

    page.route("**/answer", lose)
    for letter, number in (("A", 1), ("B", 1)):
        place(page, letter, number)
    page.locator("#submit").click()
    page.get_by_role("heading", name="No connection to the server").wait_for()
    assert lost[0] == 200
    page.unroute("**/answer")
    page.reload()
    new_task(page)
    [answers] = site.answers().values()
    assert len(answers) == 1
    assert page.evaluate("Object.keys(localStorage).filter((k) => k.includes('.out.'))") == []


def test_a_session_that_ends_loses_nothing(live, visit):  # noqa: F811
    site = live([task("t1", 2)])
    page = visit(site)
    place(page, "A", 1)
    place(page, "B", 2)
    page.get_by_label("Comment (optional)").fill("kept")
    page.context.clear_cookies()
    page.locator("#submit").click()
    page.get_by_role("heading", name="Log in").wait_for()
    page.locator(".toast", has_text="is sent when you log in").wait_for()
    assert site.answers() == {}
    page.get_by_label("Name").fill("Ada")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("heading", name="No task for you now").wait_for()
    [[answer]] = site.answers().values()
    assert answer["comment"] == "kept"


def test_a_browser_without_room_sends_the_answer_all_the_same(live, visit):  # noqa: F811
    site = live([task("t1", 2)])
    page = visit(site)
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full') } }")
    place(page, "A", 1)
    place(page, "B", 1)
    submitted(page)
    assert len(site.answers()) == 1


def test_a_late_page_does_not_replace_the_one_that_was_asked_for_next(live, visit):  # noqa: F811
    page = visit(live([task("t1", 2)]))
    held = []
    page.route("**/mine?*", lambda route: held.append(route))
    page.get_by_role("link", name="My answers").click()
    page.get_by_role("link", name="Rank", exact=True).click()
    page.locator("a[aria-current]", has_text="Rank").wait_for()
    new_task(page)
    for route in held:
        route.continue_()
    page.wait_for_timeout(300)
    assert held
    assert new_task(page) == 2


def test_two_browsers_of_one_person_give_one_answer(live, visit, chromium):  # noqa: F811
    site = live([task("t1", 2)])
    page = visit(site)
    new_task(page)
    context = chromium.new_context()
    context.add_cookies(page.context.cookies())
    second = context.new_page()
    second.goto(site.url)
    for one in (page, second):
        new_task(one)
        place(one, "A", 1)
        place(one, "B", 2)
    submitted(page)
    place(second, "A", 2)
    second.locator("#submit").click()
    second.locator(".toast", has_text="in another browser").wait_for()
    context.close()
    [answers] = site.answers().values()
    assert len(answers) == 1
