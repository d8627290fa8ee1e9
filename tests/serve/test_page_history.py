"""What the browser keeps: reload at any moment, two tabs, rename, delete, export, import."""

import json

from browser import context, load, page, say, settings, settled, stub, texts  # noqa: F401
from playwright.sync_api import expect


def test_a_reload_loses_nothing(page, stub):  # noqa: F811
    settings(page).get_by_label("System prompt").fill("Be kind.")
    say(page, "First question")
    page.click("[aria-label=Regenerate]")
    page.locator(".versions").wait_for()
    settled(page)
    page.fill("#composer-text", "not sent yet")
    load(page, stub)
    assert texts(page, ".turn.user .plain") == ["First question"]
    assert texts(page, ".versions") == ["2/2"]
    expect(page.locator("#composer-text")).to_have_value("not sent yet")
    expect(settings(page).get_by_label("System prompt")).to_have_value("Be kind.")
    assert page.locator("#sidebar .current").inner_text().startswith("First question")


def test_a_reload_while_an_answer_comes(page, stub):  # noqa: F811
    stub.answers, stub.pause = ["word " * 300], 0.01
    say(page, "Tell me", wait=False)
    page.locator(".markdown", has_text="word word word word").wait_for()
    page.wait_for_timeout(900)  # past the first write, so that both ways of keeping are used
    said = page.locator(".markdown").inner_text()
    load(page, stub)
    kept = page.locator(".markdown").inner_text()
    assert kept.startswith(said)
    expect(page.get_by_text("Interrupted; what had come is kept.")).to_be_visible()
    stub.answers, stub.pause = ["Done."], 0
    page.click("[aria-label=Regenerate]")
    page.get_by_text("Done.").wait_for()
    page.click("[aria-label='Earlier version']")
    page.locator(".markdown", has_text=said[:200]).wait_for()


def test_a_reload_right_after_sending(page, stub):  # noqa: F811
    stub.pause, stub.answers = 0.5, ["slow answer"]
    page.fill("#composer-text", "Just sent")
    page.wait_for_selector("#send:not([disabled])")
    page.evaluate("document.querySelector('#send').click(); location.reload()")
    page.locator(".turn.user").wait_for()
    assert texts(page, ".turn.user .plain") == ["Just sent"]


def test_conversations_can_be_named_searched_and_deleted(page, stub):  # noqa: F811
    for n in range(7):
        page.click(".button.new")
        say(page, f"Question number {n}")
    expect(page.locator("#sidebar .list li")).to_have_count(7)
    page.get_by_label("Search conversations").fill("number 3")
    assert texts(page, "#sidebar .list .name") == ["Question number 3"]
    page.locator("#sidebar .list .open").click()
    page.locator(".turn.user", has_text="Question number 3").wait_for()
    page.locator("#sidebar .menu summary").click()
    page.click("#sidebar .choices >> text=Rename")
    page.get_by_label("Title").fill("The third")
    page.get_by_label("Title").press("Enter")
    page.locator("#title", has_text="The third").wait_for()
    page.get_by_label("Search conversations").fill("")
    page.locator("#sidebar .current .menu summary").click()
    page.click("#sidebar .current .choices >> text=Delete")
    expect(page.locator("#sidebar .list li")).to_have_count(6)
    page.click("text=Undo")
    page.locator("#title", has_text="The third").wait_for()
    page.locator("#sidebar .current .menu summary").click()
    page.click("#sidebar .current .choices >> text=Delete")
    load(page, stub)
    expect(page.locator("#sidebar .list li")).to_have_count(6)
    assert "The third" not in texts(page, "#sidebar .list .name")


def test_export_and_import(page, stub, chromium, tmp_path):  # noqa: F811
    stub.answers = ["One", "Two"]
    say(page, "Ask")
    page.click("[aria-label=Regenerate]")
    page.get_by_text("Two").wait_for()
    settled(page)
    with page.expect_download() as waiting:
        page.click("#sidebar-foot >> text=Export")
    file = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(file)
    saved = json.loads(file.read_text())
    assert saved["format"] == "openqwen.conversations"
    assert len(saved["conversations"]) == 1
    page.set_input_files(
        "input[type=file]", file
    )  # again into the same browser: the same conversation
    page.get_by_text("One conversation is imported.").wait_for()
    expect(page.locator("#sidebar .list li")).to_have_count(1)
    other = chromium.new_context().new_page()
    load(other, stub)
    other.set_input_files("input[type=file]", file)
    other.locator(".markdown", has_text="Two").wait_for()
    assert texts(other, ".versions") == ["2/2"]
    other.context.close()


def test_import_of_messages_and_of_nonsense(page, stub, tmp_path):  # noqa: F811
    demonstrations = tmp_path / "d.jsonl"
    records = [
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": f"U{n}"},
                {"role": "assistant", "content": "A"},
            ]
        }
        for n in range(2)
    ]
    demonstrations.write_text("\n".join(map(json.dumps, records)))
    page.set_input_files("input[type=file]", demonstrations)
    page.get_by_text("2 conversations are imported.").wait_for()
    assert texts(page, ".turn.user .plain") == ["U0"]
    expect(settings(page).get_by_label("System prompt")).to_have_value("S")
    ring = {
        "a": {"role": "user", "content": "x", "parent": "b"},
        "b": {"role": "user", "content": "x", "parent": "a"},
    }
    for wrong, said in [
        ("not json", "neither JSON nor JSON lines"),
        ("[]", "holds no conversations"),
        ('[{"x": 1}]', 'Record 1 has neither "nodes" nor "messages"'),
        (
            json.dumps({"nodes": {"a": {"role": "root", "content": "x", "parent": "root"}}}),
            "turn a has no role",
        ),
        (
            json.dumps({"nodes": {"a": {"role": "user", "content": "x", "parent": "z"}}}),
            "turn a hangs on none",
        ),
        (json.dumps({"nodes": ring}), "go round in a ring"),
    ]:
        file = tmp_path / "wrong.json"
        file.write_text(wrong)
        page.set_input_files("input[type=file]", file)
        page.get_by_text(said).wait_for()
    expect(page.locator("#sidebar .list li")).to_have_count(2)


def test_two_tabs_do_not_overwrite_each_other(page, stub, context):  # noqa: F811
    say(page, "Shared question")
    other = context.new_page()
    load(other, stub)
    other.locator("#sidebar .open").click()
    stub.answers = ["From the other tab"]
    other.click("[aria-label=Regenerate]")
    other.get_by_text("From the other tab").wait_for()
    settled(other)
    page.locator(".versions", has_text="/2").wait_for()
    stub.answers = ["From this tab"]
    say(page, "Follow-up here")
    load(other, stub)
    other.locator("#sidebar .open").click()
    other.locator(".versions", has_text="/2").wait_for()
    nodes = other.evaluate("""() => new Promise((resolve) => {
      const opening = indexedDB.open("openqwen", 1);
      opening.onsuccess = () => {
        const all = opening.result.transaction("conversations").objectStore("conversations").getAll();
        all.onsuccess = () => resolve(Object.values(all.result[0].nodes).map((node) => node.content));
      };
    })""")
    wanted = [
        "Follow-up here",
        "From the other tab",
        "From this tab",
        "Hello there.",
        "Shared question",
    ]
    assert sorted(nodes) == wanted


def test_an_answer_that_another_tab_writes_goes_on_in_this_one(page, stub, context):  # noqa: F811
    stub.answers, stub.pause = ["word " * 3_000], 0.02
    say(page, "Tell me", wait=False)
    page.locator(".markdown").wait_for()
    other = context.new_page()
    load(other, stub)
    other.locator("#sidebar .open").click()
    other.locator(".turn.running .markdown").wait_for()
    other.wait_for_timeout(2000)  # longer than a tab that is gone is waited for
    expect(other.locator(".turn.running")).to_have_count(1)
    expect(other.locator(".note")).to_have_count(0)
    assert other.locator("#send").is_hidden()
    other.click("#stop")
    settled(page)
    settled(other)
    assert texts(page, ".note") == texts(other, ".note") == ["Stopped."]
    assert stub.aborted == 1
    assert texts(other, ".markdown") == texts(page, ".markdown")


def test_an_answer_whose_tab_is_gone_is_interrupted(page, stub, context):  # noqa: F811
    stub.answers, stub.pause = ["word " * 3_000], 0.02
    writer = context.new_page()
    load(writer, stub)
    say(writer, "Tell me", wait=False)
    page.locator("#sidebar .open").click()
    page.locator(".turn.running .markdown").wait_for()
    writer.close()
    page.get_by_text("Interrupted; what had come is kept.").wait_for()
    expect(page.locator("#send")).to_be_visible()


def test_a_conversation_deleted_while_it_is_answered_stays_deleted(page, stub):  # noqa: F811
    stub.answers, stub.pause = ["word " * 300], 0.02
    say(page, "Tell me", wait=False)
    page.locator(".markdown").wait_for()
    page.locator("#sidebar .menu summary").click()
    page.click("#sidebar .choices >> text=Delete")
    page.locator(".welcome").wait_for()
    page.wait_for_timeout(1000)
    assert stub.aborted == 1
    load(page, stub)
    expect(page.locator("#sidebar .open")).to_have_count(0)


def test_what_is_being_written_stays_when_another_tab_changes_something(page, stub, context):  # noqa: F811
    page.fill("#composer-text", "half a thou")
    other = context.new_page()
    load(other, stub)
    say(other, "From elsewhere")
    page.locator("#sidebar .open", has_text="From elsewhere").wait_for()
    expect(page.locator("#composer-text")).to_have_value("half a thou")
    expect(page.locator(".welcome")).to_be_visible()
