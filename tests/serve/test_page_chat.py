"""The chat page in Chromium: asking, answers, versions, tools, errors, side by side, keys."""

import json

from browser import context, load, page, say, settings, settled, stub, texts  # noqa: F401
from playwright.sync_api import expect

WEATHER = [
    {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    }
]


def call(name, arguments, index=0, number=1):
    return {
        "tool_calls": [
            {
                "index": index,
                "id": f"call-{number}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
        ]
    }


def test_an_answer_comes_in_pieces(page, stub):  # noqa: F811
    stub.answers, stub.pause = ["Some **bold** words, " * 12], 0.03
    say(page, "Hello", wait=False)
    page.locator(".turn.assistant strong").first.wait_for()
    early = page.locator(".turn.assistant .markdown").inner_text()
    assert page.locator("#turns").get_attribute("aria-busy") == "true"
    settled(page)
    assert len(early) < len(page.locator(".turn.assistant .markdown").inner_text())
    expect(page.locator(".turn.assistant strong")).to_have_count(12)
    body = stub.seen[0]
    assert body["messages"] == [{"role": "user", "content": "Hello"}]
    assert body["stream"]
    assert body["model"] == "tiny"
    assert body["max_tokens"] == 2048
    assert "temperature" not in body  # the checkpoint's own
    stats = page.locator(".turn.assistant .stats").inner_text()
    assert "51 tokens" in stats
    assert "tokens/s" in stats
    assert "first after" in stats
    expect(page.locator("#usage")).to_have_text("62 of 4,096 tokens")


def test_stop_ends_the_request_and_keeps_what_came(page, stub):  # noqa: F811
    stub.answers, stub.pause = ["word " * 400], 0.02
    say(page, "Go on", wait=False)
    page.locator(".turn.assistant .markdown").wait_for()
    page.keyboard.press("Escape")
    settled(page)
    expect(page.locator(".turn.assistant .note")).to_have_text("Stopped.")
    said = page.locator(".turn.assistant .markdown").inner_text()
    page.wait_for_timeout(300)
    expect(page.locator(".turn.assistant .markdown")).to_have_text(said)
    assert stub.aborted == 1
    stub.answers, stub.pause = ["Good."], 0
    say(page, "And now?")
    assert [m["role"] for m in stub.seen[1]["messages"]] == ["user", "assistant", "user"]


def test_regenerate_and_go_between_versions(page, stub):  # noqa: F811
    stub.answers = ["First answer", "Second answer", "Third answer"]
    say(page, "Question")
    page.click("[aria-label=Regenerate]")
    page.get_by_text("Second answer").wait_for()
    settled(page)
    assert texts(page, ".versions") == ["2/2"]
    page.click("[aria-label='Earlier version']")
    page.get_by_text("First answer").wait_for()
    say(page, "Follow-up to the first")
    assert texts(page, ".markdown") == ["First answer", "Third answer"]
    page.locator("[aria-label='Later version']").first.click()
    page.get_by_text("Second answer").wait_for()
    assert texts(page, ".markdown") == ["Second answer"]
    page.click("[aria-label='Earlier version']")
    page.get_by_text("Third answer").wait_for()


def test_edit_makes_a_branch(page, stub):  # noqa: F811
    stub.answers = ["To the old", "To the new"]
    say(page, "Old question")
    page.press("#composer-text", "ArrowUp")
    editor = page.locator(".editor textarea")
    expect(editor).to_have_value("Old question")
    editor.fill("New question")
    editor.press("Enter")
    page.get_by_text("To the new").wait_for()
    settled(page)
    assert stub.seen[1]["messages"] == [{"role": "user", "content": "New question"}]
    page.click("[aria-label='Earlier version']")
    page.get_by_text("To the old").wait_for()
    page.hover(".turn.assistant")
    page.locator(".turn.assistant [aria-label=Edit]").click()
    page.fill(".editor textarea", "What it should have said")
    page.click("text=Save as a new version")
    page.get_by_text("Edited by you.").wait_for()
    say(page, "Go on")
    assert stub.seen[2]["messages"][1] == {
        "role": "assistant",
        "content": "What it should have said",
    }


def test_parameters_and_system_prompt(page, stub):  # noqa: F811
    panel = settings(page)
    panel.get_by_label("System prompt").fill("Be brief.")
    panel.get_by_label("Temperature").fill("0.7")
    panel.get_by_label("Top k").fill("20")
    panel.get_by_label("Seed").fill("5")
    panel.get_by_label("Stop texts").fill("END\n###")
    panel.get_by_label("Top p").fill("7")
    assert panel.get_by_label("Top p").get_attribute("aria-invalid") == "true"
    panel.get_by_label("Min p").fill("0.05")
    say(page, "Hi")
    body = stub.seen[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    wanted = {"temperature": 0.7, "top_k": 20, "seed": 5, "min_p": 0.05, "stop": ["END", "###"]}
    assert {name: body[name] for name in wanted} == wanted
    assert "top_p" not in body
    panel.get_by_text("Reset sampling").click()
    say(page, "Hi again")
    assert not {"temperature", "top_k", "seed", "min_p", "stop"} & set(stub.seen[1])
    assert stub.seen[1]["messages"][0]["content"] == "Be brief."


def test_tool_calls_and_their_results(page, stub):  # noqa: F811
    panel = settings(page)
    tools = panel.get_by_label("Functions, as JSON")
    tools.fill("[{")
    expect(panel.locator(".wrong:not(:empty)")).to_contain_text("Not JSON")
    tools.fill('[{"description": "x"}]')
    expect(panel.locator(".wrong:not(:empty)")).to_have_text("Tool 1 has no name.")
    tools.fill(json.dumps(WEATHER))
    expect(panel.get_by_text("1 function: get_weather")).to_be_visible()
    both = [
        {"content": "I shall look."},
        call("get_weather", '{"place": "Par'),
        {"tool_calls": [{"index": 0, "function": {"arguments": 'is"}'}}]},
        call("get_weather", '{"place": "Rome"}', index=1, number=2),
    ]
    stub.answers = [both, "Paris is warmer."]
    say(page, "Which is warmer?")
    assert stub.seen[0]["tools"] == [{"type": "function", "function": WEATHER[0]}]
    assert texts(page, ".call strong") == ["get_weather", "get_weather"]
    assert json.loads(page.locator(".call pre").first.inner_text()) == {"place": "Paris"}
    page.locator(".results textarea").first.fill('{"celsius": 21}')
    page.locator(".results textarea").last.fill('{"celsius": 19}')
    page.click("text=Give the results")
    page.get_by_text("Paris is warmer.").wait_for()
    said = stub.seen[1]["messages"]
    assert [m["role"] for m in said] == ["user", "assistant", "tool", "tool"]
    assert [c["function"]["arguments"] for c in said[1]["tool_calls"]] == [
        '{"place": "Paris"}',
        '{"place": "Rome"}',
    ]
    assert [(m["tool_call_id"], m["content"]) for m in said[2:]] == [
        ("call-1", '{"celsius": 21}'),
        ("call-2", '{"celsius": 19}'),
    ]


def test_a_busy_server_is_asked_again(page, stub):  # noqa: F811
    stub.refusals = [(429, "Too many answers are being made.", {"Retry-After": "2"})]
    say(page, "Hi", wait=False)
    trouble = page.locator(".trouble")
    trouble.wait_for()
    expect(trouble).to_contain_text("Too many answers are being made.")
    expect(trouble).to_contain_text("Asking again in")
    page.get_by_text("Hello there.").wait_for()
    settled(page)
    assert len(stub.seen) == 2
    expect(trouble).to_have_count(0)
    stub.refusals = [(429, "Busy.", {"Retry-After": "60"})]
    say(page, "Hi", wait=False)
    page.click("text=Leave it")
    settled(page)
    page.get_by_role("button", name="Try again").click()
    settled(page)
    assert texts(page, ".markdown") == ["Hello there."] * 2


def test_the_key_is_asked_for(page, stub):  # noqa: F811
    stub.key = "secret-1"
    load_without_model(page, stub)
    page.get_by_label("API key").wait_for()  # before anything is asked
    assert page.locator(".eyebrow").inner_text().lower() == "a key is needed"
    say(page, "Hi", wait=False)
    page.locator(".trouble", has_text="The key is missing or wrong.").wait_for()
    page.get_by_label("API key").fill("wrong")
    page.click("text=Use this key")
    page.get_by_text("The server does not accept this key.").wait_for()
    page.get_by_label("API key").fill("secret-1")
    page.get_by_label("API key").press("Enter")
    page.get_by_text("Hello there.").wait_for()  # what was refused is asked again
    settled(page)
    expect(page.get_by_label("API key")).to_have_count(0)
    expect(page.locator("#model")).to_have_text("tiny")
    assert page.evaluate("localStorage.getItem('openqwen.key')") is None  # until the tab closes


def test_the_key_is_asked_for_when_it_is_no_longer_taken(page, stub):  # noqa: F811
    stub.key = "first"
    load_without_model(page, stub)
    page.get_by_label("API key").fill("first")
    page.get_by_text("Remember it").click()
    page.click("text=Use this key")
    page.locator(".eyebrow", has_text="tiny").wait_for()
    stub.key = "second"
    say(page, "Hi", wait=False)
    page.get_by_text("The server does not accept this key.").wait_for()
    load_without_model(page, stub, begun=True)
    page.get_by_text("The server does not accept this key.").wait_for()
    page.get_by_label("API key").fill("second")
    page.click("text=Use this key")
    page.get_by_text("Hello there.").wait_for()
    assert page.evaluate("localStorage.getItem('openqwen.key')") == "second"


LONG = {
    "message": (
        "This model's maximum context length is 100 tokens. However, your messages resulted in 120 "
        "tokens."
    ),
    "code": "context_length_exceeded",
}


def test_a_message_that_is_too_long_can_be_shortened_or_taken_elsewhere(page, stub):  # noqa: F811
    say(page, "First")
    stub.refusals = [(400, LONG, {}), (413, "The body is larger than 9 bytes.", {})]
    say(page, "A long story")
    trouble = page.locator(".turn.assistant .trouble")
    expect(trouble).to_contain_text("your messages resulted in 120 tokens")
    expect(trouble.get_by_role("button", name="Try again")).to_have_count(0)
    trouble.get_by_role("button", name="Shorten the message").click()
    field = page.get_by_label("Edit the message")
    expect(field).to_have_value("A long story")
    field.fill("A story")
    page.click("text=Send as a new version")
    settled(page)
    assert [m["content"] for m in stub.seen[-1]["messages"]] == ["First", "Hello there.", "A story"]
    trouble.get_by_role("button", name="New conversation with it").click()
    expect(page.locator("#composer-text")).to_have_value("A story")
    page.press("#composer-text", "Enter")
    settled(page)
    assert [m["content"] for m in stub.seen[-1]["messages"]] == ["A story"]
    assert texts(page, ".markdown") == ["Hello there."]
    expect(page.locator("#sidebar .open")).to_have_count(2)


def load_without_model(page, stub, begun=False):  # noqa: F811
    page.goto(stub.url)
    page.wait_for_selector(".turn" if begun else ".welcome")


def test_errors_stand_where_they_happen(page, stub, context):  # noqa: F811
    stub.refusals = [(400, "The prompt has 5000 tokens; this model takes 4095.", {})]
    say(page, "Long")
    expect(page.locator(".turn.assistant .trouble")).to_contain_text("this model takes 4095")
    stub.answers, stub.cut = ["a beginning that breaks off"], 3
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("The answer broke off.").wait_for()
    expect(page.locator(".markdown")).to_have_text("a beginning tha")
    stub.cut = None
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("a beginning that breaks off").wait_for()
    settled(page)
    expect(page.locator(".trouble")).to_have_count(0)
    context.set_offline(True)
    say(page, "Are you there?")
    page.locator(".trouble", has_text="The server does not answer.").wait_for()


def test_the_longest_answer_is_said_to_be_reached(page, stub):  # noqa: F811
    stub.answers = [[{"content": "Cut", "finish": "length"}]]
    say(page, "Hi")
    expect(page.locator(".turn.assistant .note")).to_contain_text("longest answer was reached")


def test_the_prompt_as_rendered(page, stub):  # noqa: F811
    say(page, "What do you read?")
    page.fill("#composer-text", "And this")
    page.click("#show-prompt")
    prompt = page.locator("dialog pre").inner_text()
    assert prompt.endswith("<|im_start|>user\nAnd this<|im_end|>\n<|im_start|>assistant\n")
    assert f"{len(prompt)} tokens" in page.locator("dialog .hint").inner_text()
    expect(page.locator("dialog .control").first).to_have_text("<|im_start|>")
    page.keyboard.press("Escape")
    stub.renders = False
    load(page, stub)
    assert page.locator("#show-prompt").is_hidden()


def test_side_by_side(page, stub):  # noqa: F811
    panel = settings(page)
    panel.get_by_text("Two answers to each message").click()
    expect(panel.get_by_label("Second model")).to_have_value("reference")
    say(page, "Compare")
    assert sorted(body["model"] for body in stub.seen) == ["reference", "tiny"]
    boxes = [page.locator(".pair .turn").nth(n).bounding_box() for n in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] < boxes[1]["x"]
    expect(page.locator(".pair .turn.chosen .label")).to_have_text("tiny")
    stub.answers = ["Again."]
    page.click("text=Continue with this")
    panel.get_by_text("Two answers to each message").click()
    say(page, "Next")
    expect(page.locator(".pair .turn.chosen .label")).to_have_text("reference")
    assert stub.seen[2]["messages"][1] == {"role": "assistant", "content": "Hello there."}
    panel.get_by_text("Two answers to each message").click()
    panel.get_by_label("Its path").fill("https://elsewhere.example/v1")
    panel.get_by_label("Its path").press("Enter")
    panel.get_by_text("is another server").wait_for()
    panel.get_by_label("Its path").fill("/reference/v1")
    panel.get_by_label("Its path").press("Enter")
    panel.locator("option", has_text="other").wait_for(state="attached")
    say(page, "Elsewhere")
    assert sorted(body["model"] for body in stub.seen[3:]) == ["other", "tiny"]


def test_token_probabilities(page, stub):  # noqa: F811
    settings(page).get_by_text("Token probabilities").click()
    stub.answers = ["Hello world"]
    say(page, "Hi")
    assert stub.seen[0]["logprobs"] is True
    assert stub.seen[0]["top_logprobs"] == 5
    page.hover(".turn.assistant")
    page.click(".turn.assistant [aria-label='Token probabilities']")
    expect(page.locator(".tokens-view")).to_have_text("Hello world")
    assert "81.9 %" in page.locator(".token").first.get_attribute("title")


def test_copy(page, stub, context):  # noqa: F811
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    stub.answers = ["Look:\n\n```py\nx = 1\ny = 2\n```\n"]
    say(page, "Code")
    page.click(".code [aria-label='Copy code']")
    page.locator(".code", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "x = 1\ny = 2"
    page.click(".turn.assistant [aria-label='Copy message']")
    page.locator(".turn.assistant .foot .icon-check").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "Look:\n\n```py\nx = 1\ny = 2\n```\n"


def test_keys(page, stub):  # noqa: F811
    field = page.locator("#composer-text")
    field.fill("one")
    field.press("Shift+Enter")
    field.press_sequentially("two")
    expect(field).to_have_value("one\ntwo")
    assert stub.seen == []
    page.keyboard.press("Control+/")
    expect(page.locator("dialog").get_by_text("Stop the answer")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+,")
    expect(page.locator("#panel")).to_be_visible()
    page.keyboard.press("Control+,")
    assert page.locator("#panel").is_hidden()
    field.press("Enter")
    settled(page)
    assert stub.seen[0]["messages"][0]["content"] == "one\ntwo"
    page.keyboard.press("Control+Shift+Enter")
    page.locator(".versions").wait_for()
    settled(page)
    page.keyboard.press("Control+Shift+O")
    page.locator(".welcome").wait_for()
    assert page.evaluate("document.activeElement.id") == "composer-text"


def test_nothing_said_becomes_html(page, stub):  # noqa: F811
    evil = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
    stub.answers = [[{"content": evil}, call(evil, evil)]]
    say(page, evil)
    page.locator(".results textarea").fill(evil)
    page.click("text=Give the result")
    page.locator(".turn.tool").wait_for()
    settled(page)
    page.click("#show-prompt")
    page.locator("dialog pre").wait_for()
    assert not page.evaluate("window.hacked")
    expect(page.locator("img")).to_have_count(0)
