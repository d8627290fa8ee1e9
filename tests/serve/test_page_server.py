"""The chat page of a real server: what a model writes becomes a call on the page, and its result
the next prompt.
"""

import json

from browser import context, say, settings, settled, texts  # noqa: F401
from playwright.sync_api import expect

WRITTEN = (
    r'Let me look\.\n<tool_call>\n\{"name": "get_weather", "arguments": \{"place": '
    r'"Par\\"is"\}\}\n</tool_call>'
)


def test_a_call_that_the_model_writes(context, server):  # noqa: F811
    page, asked = context.new_page(), []

    def wish(route):
        """A random model calls no function by itself: the first answer is bound to the words of a
        call.
        """
        asked.append(route.request.post_data_json)
        forced = {} if len(asked) > 1 else {"structured_outputs": {"regex": WRITTEN}}
        route.continue_(post_data=json.dumps(asked[-1] | {"max_tokens": 200} | forced))

    page.route("**/v1/chat/completions", wish)
    page.goto(server.url)
    page.locator("#model", has_text="tiny").wait_for()
    tool = {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    }
    settings(page).get_by_label("Functions, as JSON").fill(json.dumps([tool]))
    say(page, "Is it warm in Paris?")
    assert texts(page, ".turn.assistant .markdown") == ["Let me look."]
    assert texts(page, ".call strong") == ["get_weather"]
    assert json.loads(page.locator(".call pre").inner_text()) == {"place": 'Par"is'}
    page.locator(".results textarea").fill('{"celsius": 21}')
    page.click("text=Give the result")
    page.locator(".turn.tool").wait_for()
    settled(page)
    call, result = asked[1]["messages"][1:]
    assert call["content"] == "Let me look."
    assert call["tool_calls"][0]["function"] == {
        "name": "get_weather",
        "arguments": '{"place": "Par\\"is"}',
    }
    assert result == {
        "role": "tool",
        "tool_call_id": call["tool_calls"][0]["id"],
        "content": '{"celsius": 21}',
    }
    expect(page.locator(".turn.assistant")).to_have_count(2)
