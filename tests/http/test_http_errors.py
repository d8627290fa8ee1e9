"""Errors in one form, whatever raised them."""

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from openqwen.http.errors import ApiError, as_api_error, install, validated
from openqwen.http.json_body import JSONRoute
from openqwen.support.errors import OpenQwenError


class Inner(BaseModel):
    size: int


class Outer(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str
    inner: list[Inner | int] = []


def application():
    app = FastAPI(strict_content_type=False)
    app.router.route_class = JSONRoute

    @app.post("/thing")
    async def thing(body: Outer):
        return {"name": body.name}

    @app.get("/thing")
    async def fail():
        raise RuntimeError("a secret")

    install(app)
    return app


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"name": 5}, "name", "valid string"),
        ({}, "name", "Field required"),
        ({"name": "a", "inner": [{"size": "x"}]}, "inner[0].size", "valid integer"),
        ({"name": "a", "inner": [{}]}, "inner[0].size", "Field required"),
        ([], None, "a JSON object"),
    ],
)
def test_a_wrong_field_is_named(ask, body, param, words):
    error = ask(application(), "POST", "/thing", json=body).json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    with pytest.raises(ApiError) as caught:
        validated(Outer, body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_fault_of_the_server_keeps_its_text_to_itself(ask):
    response = ask(application(), "GET", "/thing")
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text


def test_other_failures_have_the_same_form(ask):
    response = ask(application(), "PUT", "/thing")
    assert response.status_code == 405
    assert response.headers["allow"] == "GET, HEAD, POST"
    assert ask(application(), "GET", "/nothing").json()["error"]["type"] == "not_found_error"
    headers = {"content-type": "text/plain"}
    response = ask(application(), "POST", "/thing", content="{}", headers=headers)
    assert response.json()["error"]["param"] == "Content-Type"
    response = ask(application(), "POST", "/thing", content='{"name": Infinity}')
    assert "not JSON" in response.json()["error"]["message"]


def test_an_error_of_ours_says_what_to_do_and_names_known_fields_alone():
    error = OpenQwenError("It is wrong.", where="messages[3]", do="mend it")
    told = as_api_error(error, ["messages"])
    assert (told.status, told.param) == (400, "messages[3]")
    assert told.message == "It is wrong. What to do: mend it."
    assert as_api_error(error).param is None


def test_when_to_come_back():
    response = ApiError(429, "Busy.", retry=7).response()
    assert response.headers["retry-after"] == "7"
    assert ApiError(408, "Late.", code="timeout").response().headers["x-should-retry"] == "false"
