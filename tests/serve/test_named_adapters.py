"""Adapters by name: the model field of a request chooses one, as with vLLM."""

import openai
import pytest
import torch
from serving import Server

from openqwen.engine import Engine, Sampling
from openqwen.model import load_model
from openqwen.model.lora import LoraConfig, add_adapters, load_adapter, save_adapter
from openqwen.tokenizer import load_tokenizer

PROMPT = list(range(40, 80))


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    folders = {}
    for number, name in enumerate(("poet", "clerk")):
        network, config = load_model(tiny), LoraConfig(rank=4)
        add_adapters(network, config, torch.Generator().manual_seed(number))
        for parameter in (p for n, p in network.named_parameters() if "lora_B" in n):
            torch.nn.init.normal_(
                parameter, std=0.3, generator=torch.Generator().manual_seed(number)
            )
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        save_adapter(network, config, folders[name], str(tiny))
    return folders


@pytest.fixture(scope="module", params=[(), ("--quantize", "int8")], ids=["plain", "int8"])
def served(tiny, adapters, request):
    running = Server(tiny, *request.param, "--adapters", *(f"{n}={f}" for n, f in adapters.items()))
    yield running, bool(request.param)
    assert running.stop() == 0, running.log


def test_the_models_name_chooses_the_adapter(served, tiny, adapters):
    server, packed = served
    client = server.client()
    models = list(client.models.list())
    assert [m.id for m in models] == ["tiny", "poet", "clerk"]
    assert [m.model_dump().get("parent") for m in models] == [None, "tiny", "tiny"]
    assert client.models.retrieve("poet").id == "poet"
    answers = {}
    for name in ("tiny", "poet", "clerk"):
        made = client.completions.create(
            model=name, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=1
        )
        answers[name] = made.choices[0].text
        assert made.model == name
        if not packed:
            truth = load_model(tiny)
            if name in adapters:
                load_adapter(truth, adapters[name])
            (output,) = Engine(truth, load_tokenizer(tiny)).generate(
                [PROMPT], Sampling(max_tokens=12)
            )
            assert answers[name] == output.text
    assert len(set(answers.values())) == 3
    chunks = client.chat.completions.create(
        model="poet",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=5,
        temperature=0,
        n=2,
        stream=True,
    )
    assert {chunk.model for chunk in chunks} == {"poet"}
    assert (
        client.responses.create(model="clerk", input="Hello", max_output_tokens=3).model == "clerk"
    )


def test_a_name_that_is_not_served_is_not_found(served):
    client = served[0].client()
    with pytest.raises(
        openai.NotFoundError, match=r"no model 'painter' here\. Known models: tiny, poet, clerk"
    ) as caught:
        client.completions.create(model="painter", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(
        openai.NotFoundError, match=r"models: tiny[.]"
    ):  # embeddings are the model's own
        client.embeddings.create(model="poet", input="x")


@pytest.mark.parametrize("entry", ["poet", "tiny={folder}"])
def test_an_adapter_that_cannot_be_given_so_ends_the_start(tiny, adapters, start, entry):
    with pytest.raises(AssertionError, match="is not an adapter"):
        start(tiny, "--adapters", entry.format(folder=adapters["poet"]))
