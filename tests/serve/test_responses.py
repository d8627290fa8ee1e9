"""/v1/responses, by the `openai` client."""

import json

import openai
import pytest
from test_chat import WEATHER

TALK = [
    {"role": "system", "content": "Book"},
    {"role": "user", "content": "What is the best book?"},
]
TOOL = {"type": "function", **WEATHER["function"]}


def ask(client, **options):
    defaults = {"model": "tiny", "input": TALK, "max_output_tokens": 8, "temperature": 0}
    return client.responses.create(**(defaults | options))


def test_a_response_is_the_chats_answer(client):
    response = ask(client)
    assert response.id.startswith("resp_")
    assert response.output[0].id.startswith("msg_")
    assert (response.status, response.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert response.usage.output_tokens == 8
    chat = client.chat.completions.create(model="tiny", messages=TALK, max_tokens=8, temperature=0)
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    told = ask(client, input="What is the best book?", instructions="Book")
    assert told.output_text == response.output_text


def test_a_stream(client):
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    final = events[-1].response
    assert (
        "".join(event.delta for event in events[4:-4])
        == final.output_text
        == ask(client).output_text
    )
    assert {event.item_id for event in events[3:-2]} == {final.output[0].id}
    assert events[0].response.id == final.id


def test_calls_and_their_results(client):
    options = {
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "get_weather"},
        "max_output_tokens": 200,
    }
    response = ask(client, **options)
    (call,) = response.output
    assert (call.type, call.name, response.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    events = list(ask(client, stream=True, **options))
    deltas = [
        event.delta for event in events if event.type == "response.function_call_arguments.delta"
    ]
    assert "".join(deltas) == call.arguments
    talk = [
        *TALK,
        {
            "type": "function_call",
            "call_id": call.call_id,
            "name": call.name,
            "arguments": call.arguments,
        },
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    assert ask(client, input=talk, tools=[TOOL]).output


def test_a_response_that_goes_on_from_another(client):
    first = ask(client, instructions="Be brief.")
    assert first.store
    second = ask(client, input="Why?", previous_response_id=first.id)
    answer = {"role": "assistant", "content": first.output_text}
    whole = [*TALK, answer, {"role": "user", "content": "Why?"}]
    alone = ask(client, input=whole, store=False)
    assert second.previous_response_id == first.id
    assert (second.output_text, second.usage.input_tokens) == (
        alone.output_text,
        alone.usage.input_tokens,
    )
    *_, last = ask(client, input="And then?", previous_response_id=second.id, stream=True)
    third = [
        *whole,
        {"role": "assistant", "content": second.output_text},
        {"role": "user", "content": "And then?"},
    ]
    assert last.response.output_text == ask(client, input=third).output_text
    with pytest.raises(openai.BadRequestError, match="send the whole conversation") as refused:
        ask(client, input="Why?", previous_response_id=alone.id)
    assert refused.value.code == "previous_response_not_found"


def test_a_result_for_a_call_that_is_kept(client):
    forced = {"tool_choice": {"type": "function", "name": "get_weather"}, "max_output_tokens": 200}
    first = ask(client, tools=[TOOL], **forced)
    (call,) = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    later = ask(client, input=[result], tools=[TOOL], previous_response_id=first.id)
    told = {
        "type": "function_call",
        "call_id": call.call_id,
        "name": call.name,
        "arguments": call.arguments,
    }
    whole = ask(client, input=[*TALK, told, result], tools=[TOOL])
    assert (later.usage.input_tokens, later.output_text) == (
        whole.usage.input_tokens,
        whole.output_text,
    )


def test_structure(client):
    form = {"type": "json_schema", "name": "x", "schema": {"const": "foo"}}
    response = ask(client, text={"format": form}, max_output_tokens=30)
    assert (response.output_text, response.status) == ('"foo"', "completed")


def test_a_response_can_be_read_and_deleted(client):
    first = ask(client)
    assert client.responses.retrieve(first.id) == first
    *_, last = ask(client, stream=True, metadata={"a": "b"})
    assert client.responses.retrieve(last.response.id) == last.response
    client.responses.delete(first.id)
    for call in (
        client.responses.retrieve,
        client.responses.delete,
        client.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError):
            call(first.id)
    unkept = ask(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_the_items_of_a_response(client):
    first = ask(client, input=TALK)
    second = ask(client, input="Why?", previous_response_id=first.id)
    items = client.responses.input_items.list(second.id, order="asc").data
    assert [item.role for item in items] == ["system", "user", "assistant", "user"]
    assert [item.content[0].text for item in items] == [
        *(message["content"] for message in TALK),
        first.output_text,
        "Why?",
    ]
    assert items[2].id == first.output[0].id
    assert [part.type for item in items for part in item.content] == [
        "input_text",
        "input_text",
        "output_text",
        "input_text",
    ]
    page = client.responses.input_items.list(second.id, limit=3)
    assert [item.id for item in page.data] == [item.id for item in items[:0:-1]]
    assert page.has_more
    assert len(list(page)) == 4  # the client asks for the next page
    with pytest.raises(openai.BadRequestError):
        client.responses.input_items.list(second.id, limit=0)


def test_items_that_other_responses_made_are_read(client):
    whole = ask(
        client,
        input=[
            *TALK,
            {"role": "assistant", "content": "Ulysses."},
            {"role": "user", "content": "Why?"},
        ],
    )
    said = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
    said["content"] = [{"type": "output_text", "text": "Ulysses.", "annotations": []}]
    reasoning = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [{"type": "summary_text", "text": "so"}],
    }
    question = {"role": "user", "content": [{"type": "input_text", "text": "Why?"}]}
    parts = ask(client, input=[*TALK, reasoning, said, question])
    assert (parts.output_text, parts.usage.input_tokens) == (
        whole.output_text,
        whole.usage.input_tokens,
    )
    items = client.responses.input_items.list(parts.id, order="asc").data
    for reference in ({"type": "item_reference", "id": "msg_1"}, {"id": items[2].id}):
        referred = ask(client, input=[*TALK, reference, question])
        assert referred.usage.input_tokens == whole.usage.input_tokens
    with pytest.raises(openai.NotFoundError, match="msg_9"):
        ask(client, input=[{"type": "item_reference", "id": "msg_9"}])


def test_an_id_may_be_null(server):
    item = {"id": None, "role": "user", "content": "x"}
    answer = server.http.post("/v1/responses", json={"input": [item], "max_output_tokens": 1})
    assert answer.status_code == 200


def test_calls_and_a_message_are_one_turn(client):
    function = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    call = {"type": "function_call", "call_id": "c", **function}
    message = {"role": "assistant", "content": "Let me look."}
    turn = {
        "role": "assistant",
        "content": "Let me look.",
        "tool_calls": [{"type": "function", "function": function}],
    }
    chat = [*TALK, turn, {"role": "tool", "content": "sunny\nwarm"}]
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0, "tools": [WEATHER]}
    expected = client.chat.completions.create(messages=chat, **options)
    output = [{"type": "input_text", "text": "sunny"}, {"type": "input_text", "text": "warm"}]
    for given in ("sunny\nwarm", output):
        result = {"type": "function_call_output", "call_id": "c", "output": given}
        for items in ([call, message], [message, call]):
            answer = ask(client, input=[*TALK, *items, result], tools=[TOOL])
            assert answer.usage.input_tokens == expected.usage.prompt_tokens
            assert answer.output_text == expected.choices[0].message.content
    apart = ask(client, input=[*TALK, message, message])
    two = client.chat.completions.create(
        model="tiny", messages=[*TALK, message, message], max_tokens=1
    )
    assert apart.usage.input_tokens == two.usage.prompt_tokens


def test_log_probabilities(client):
    chat = client.chat.completions.create(
        model="tiny", messages=TALK, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    expected = [(e.token, e.logprob, len(e.top_logprobs)) for e in chat.choices[0].logprobs.content]
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = ask(client, **options)
    told = response.output[0].content[0].logprobs
    assert [(e.token, e.logprob, len(e.top_logprobs)) for e in told] == expected
    events = list(ask(client, stream=True, **options))
    streamed = [
        e for event in events if event.type == "response.output_text.delta" for e in event.logprobs
    ]
    assert [e.token for e in streamed] == [token for token, _, _ in expected]
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert len(done.logprobs) == len(events[-1].response.output[0].content[0].logprobs) == 8
    assert ask(client).output[0].content[0].logprobs == []


@pytest.mark.parametrize(
    "options",
    [
        {"input": []},
        {"input": [{"role": "user"}]},
        {"text": {"format": {"type": "json_schema", "name": "x"}}},
        {"previous_response_id": "resp_1"},
        {"max_output_tokens": 0},
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}},
    ],
    ids=str,
)
def test_what_is_refused(client, options):
    with pytest.raises(openai.BadRequestError):
        ask(client, **options)
