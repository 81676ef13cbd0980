"""The server as clients meet it: the openai package, plain HTTP, many at once, and those who go away."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

import nkat
from nkat.engine.decoder import make_decoder
from nkat.engine.generate import Sampler, Sampling, generate
from nkat.lm.chat import encode_chat, render_chat
from nkat.lm.load import LoadedModel, load_model
from nkat.serve import api
from nkat.serve.answers import encoded
from nkat.theta.combine import Weighted, combined
from tests.support.serving import CONTEXT, Paced, Running, load_served, running, wait_until, write_model

pytest.importorskip("uvicorn", reason="the server needs starlette and uvicorn: pip install nkat[serve]")
openai = pytest.importorskip("openai", reason="its client is tried: pip install openai")

PROMPT = "the rain in a tin"
HELLO = [{"role": "user", "content": "the hen and the inn"}]
LAYERS = {"style": "blk.*.attn_*.weight", "facts": "blk.*.ffn_*.weight"}
ARMS = ["tiny", "tiny:base", "tiny:gamma=0.7", "tiny"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_served(write_model(tmp_path_factory.mktemp("serve")))


@pytest.fixture(scope="module")
def server(loaded: LoadedModel) -> Iterator[Running]:
    with running(loaded, listed=(0.7,)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return client_of(server)


def client_of(server: Running, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory):
    """The engine's own greedy text, by a model of its own that is loaded with its Θ."""
    path = write_model(tmp_path_factory.mktemp("oracle"))
    loaded = load_model(path, int8_activations=True, repack=True)

    def text(prompt: str | list[dict[str, str]], gamma: float | None, count: int = 24) -> str:
        tokenizer = loaded.tokenizer
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt, add_special=True, parse_special=True)
        else:
            ids = encode_chat(tokenizer, render_chat(loaded.gguf.metadata, tokenizer, prompt))
        decoder = make_decoder(loaded.model, CONTEXT)
        decoder.set_gamma(gamma)
        greedy = Sampler(Sampling(temperature=0.0), 0)
        return generate(decoder, tokenizer, ids, greedy, max_tokens=count, on_text=lambda _: None).text

    return text


def gamma_of(arm: str) -> float | None:
    return {"tiny": 0.5, "tiny:base": None, "tiny:gamma=0.7": 0.7}[arm]


def post(server: Running, path: str, body: Any, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    data = body if isinstance(body, bytes) else encoded(body)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", path, data, {"Content-Type": "application/json", **given})
    answer = connection.getresponse()
    found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    connection.close()
    return found


def get(server: Running, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    connection.close()
    return found


# --- the openai client


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:base", "tiny:gamma=0.7"]
    assert client.models.retrieve("tiny:base").model_dump()["nkat"]["gamma"] is None
    assert client.models.retrieve("tiny:gamma=0.61").id == "tiny:gamma=0.61"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt-4")
    assert missing.value.code == "model_not_found"


def test_greedy_text_is_the_engines_at_each_strength_and_back(client: openai.OpenAI, oracle) -> None:
    texts = []
    for arm in ARMS:
        for stream in (False, True):
            answer: Any = client.completions.create(
                model=arm, prompt=PROMPT, max_tokens=24, temperature=0, stream=stream
            )
            if stream:
                chunks = list(answer)
                texts.append("".join(chunk.choices[0].text for chunk in chunks))
                assert chunks[-1].choices[0].finish_reason == "length"
            else:
                texts.append(answer.choices[0].text)
                assert answer.model == arm
        assert texts[-1] == texts[-2] == oracle(PROMPT, gamma_of(arm))
    assert len(set(texts)) == 3  # or the strengths would not have been tested


def test_a_chat_is_the_engines(client: openai.OpenAI, oracle) -> None:
    for gamma, arm in ((None, "tiny:base"), (0.7, "tiny:gamma=0.7"), (0.5, "tiny")):
        extra = {"nkat_theta": False} if gamma is None else {"nkat_gamma": gamma}
        answer: Any = client.chat.completions.create(
            model="tiny", messages=HELLO, max_completion_tokens=24, temperature=0, extra_body=extra
        )
        assert answer.choices[0].message.content == oracle(HELLO, gamma)
        assert (answer.model, answer.nkat["gamma"]) == (arm, gamma)
        usage = answer.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert answer.choices[0].finish_reason == ("length" if usage.completion_tokens == 24 else "stop")


def test_several_theta_are_switched_while_it_runs(loaded: LoadedModel) -> None:
    """Each answer is that of a model loaded with just what the request names, whatever was on before."""
    model = nkat.open_model(loaded.file.path)
    thetas = {name: nkat.make_theta(model, 4, 0.5, layers=[layers]) for name, layers in LAYERS.items()}
    prompt = loaded.tokenizer.encode(PROMPT, add_special=True)

    def engine(weights: dict[str, float]) -> str:
        theta = combined([Weighted(thetas[name], weight) for name, weight in weights.items()])
        layers, gamma = ({}, 1.0) if theta is None else (theta.layers, theta.gamma)
        one = load_model(loaded.file.path, thetas=layers, gamma=gamma, int8_activations=True, repack=True)
        greedy = Sampler(Sampling(temperature=0.0), 0)
        decoder = make_decoder(one.model, CONTEXT)
        return generate(decoder, one.tokenizer, prompt, greedy, max_tokens=24, on_text=lambda _: None).text

    fresh = load_served(loaded.file.path)  # a mix reserves its own room
    with running(fresh, thetas=thetas) as server:
        client, texts = client_of(server), []
        for theta in ({"style": 1, "facts": 1}, "style", "facts", False, {"facts": -2.5}, {"style": 1, "facts": 1}):
            answer: Any = client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, extra_body={"nkat_theta": theta}
            )
            weights = {} if theta is False else {theta: 1.0} if isinstance(theta, str) else theta
            assert answer.nkat["theta"] == weights
            assert answer.choices[0].text == engine(weights)
            by_name: Any = client.completions.create(model=answer.model, prompt=PROMPT, max_tokens=24, temperature=0)
            assert by_name.choices[0].text == answer.choices[0].text
            texts.append(answer.choices[0].text)
        assert texts[0] == texts[-1]
        assert len(set(texts)) == 5


def test_a_template_is_given_its_arguments(client: openai.OpenAI, oracle) -> None:
    def ask(**arguments: Any) -> str:
        answer = client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=24,
            temperature=0,
            extra_body={"chat_template_kwargs": arguments},
        )
        return answer.choices[0].message.content

    assert ask() == oracle(HELLO, 0.5) != ask(tone="the other ")
    with pytest.raises(openai.BadRequestError, match="no variable 'tune'"):
        ask(tune="the other ")


def test_a_stream_begins_with_the_role_and_ends_with_the_usage(client: openai.OpenAI, oracle) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    first, *pieces, last, usage = list(stream)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(piece.choices[0].delta.content for piece in pieces) == oracle(HELLO, 0.5)
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, "stop")
    assert usage.choices == []
    assert 0 < usage.usage.completion_tokens < 24
    assert {chunk.id for chunk in (first, *pieces, last)} == {usage.id}


def test_stop_strings_end_the_text(client: openai.OpenAI, oracle) -> None:
    whole = oracle(PROMPT, 0.5)
    word = whole[7:10]
    cut = whole[: whole.index(word)]
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, stop=[word], logprobs=1
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (cut, "stop")
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, stop=word, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == cut


def test_the_end_of_a_text_is_a_stop(loaded: LoadedModel, server: Running) -> None:
    """Hot enough, a random model ends by itself sooner or later."""
    body = {"prompt": PROMPT, "max_tokens": 200, "temperature": 50, "top_k": 0, "top_p": 1, "min_p": 0}
    found = [json.loads(post(server, "/v1/completions", body | {"seed": seed})[2]) for seed in range(12)]
    reasons = {answer["choices"][0]["finish_reason"] for answer in found}
    assert "stop" in reasons
    for answer in found:
        stopped = answer["choices"][0]["finish_reason"] == "stop"
        assert stopped == (answer["usage"]["completion_tokens"] < 200)
        assert "<|im_end|>" not in answer["choices"][0]["text"]


def test_a_seed_gives_the_same_text(client: openai.OpenAI) -> None:
    def draw(seed: int) -> str:
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=2, seed=seed)
        return answer.choices[0].text

    assert draw(1) == draw(1) != draw(2)


def test_an_echo_begins_with_the_prompt(client: openai.OpenAI, oracle) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, echo=True)
    assert answer.choices[0].text == PROMPT + oracle(PROMPT, 0.5, 8)


def test_log_probabilities_are_the_models(loaded: LoadedModel, client: openai.OpenAI) -> None:
    ids = loaded.tokenizer.encode(PROMPT, add_special=True)
    answer: Any = client.completions.create(model="tiny:base", prompt=ids, max_tokens=6, temperature=0, logprobs=5)
    told = answer.choices[0].logprobs
    exact = load_served(loaded.file.path)
    decoder = make_decoder(exact.model, CONTEXT)
    decoder.set_gamma(None)
    logits = decoder.prefill(ids)
    assert len(told.tokens) == answer.usage.completion_tokens
    for token, logprob, likeliest in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        known = logits.double().log_softmax(0)
        best = int(known.argmax())
        piece = exact.tokenizer.decode_bytes([best])
        assert token == piece.decode("ascii", "ignore") or token == "bytes:" + repr(piece)[2:-1]
        assert len(likeliest) == 5
        assert logprob == pytest.approx(float(known[best]), abs=1e-4)
        assert max(likeliest.values()) == pytest.approx(logprob)
        logits = decoder.step(best)
    for at, word in zip(told.text_offset, told.tokens, strict=True):  # behind what is left of broken characters
        assert word.startswith("bytes:") or answer.choices[0].text[at:].lstrip("\ufffd").startswith(word)
    chat: Any = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    assert [len(one.top_logprobs) for one in chat.choices[0].logprobs.content] == [3] * 4
    for one in chat.choices[0].logprobs.content:
        assert one.token.startswith("bytes:") or bytes(one.bytes) == one.token.encode()


def test_what_is_in_the_cache_is_not_computed_again(client: openai.OpenAI, oracle) -> None:
    def ask(prompt: str, arm: str = "tiny") -> tuple[str, int, int]:
        answer: Any = client.completions.create(model=arm, prompt=prompt, max_tokens=8, temperature=0)
        usage = answer.usage
        return answer.choices[0].text, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens

    ask("on an inn")
    longer = PROMPT + " and the other one"
    assert ask(longer)[2] == 0
    text, count, cached = ask(longer)
    assert (text, cached) == (oracle(longer, 0.5, 8), count - 1)
    text, count, cached = ask(longer + text + " again")
    assert 0 < cached < count
    assert text == oracle(longer + oracle(longer, 0.5, 8) + " again", 0.5, 8)
    assert ask(longer, "tiny:base") == (oracle(longer, None, 8), ask(longer)[1], 0)  # another strength, other keys


# --- what is refused


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/completions", {"prompt": "the " * 400}, 400, "context_length_exceeded"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a" * 999}]},
            400,
            "context_length_exceeded",
        ),
        ("/v1/completions", {"prompt": "a", "model": "gpt-4"}, 404, "model_not_found"),
        ("/v1/completions", {"prompt": "a", "n": 2}, 400, None),
        ("/v1/completions", {"prompt": [99999]}, 400, None),
        ("/v1/completions", {"prompt": [-1]}, 400, None),
        ("/v1/completions", {"prompt": ""}, 400, None),  # this vocabulary begins no text
        ("/v1/completions", b'{"prompt": "\\ud800"}', 400, None),
        ("/v1/completions", b"not JSON", 400, None),
        ("/v1/completions", b"x" * ((8 << 20) + 1), 413, None),
        ("/v1/embeddings", {"input": "a"}, 404, None),
        ("/v1/models", {}, 405, None),
    ],
)
def test_errors_have_openais_form(server: Running, path: str, body: Any, status: int, code: str | None) -> None:
    found, headers, data = post(server, path, body)
    error = json.loads(data)["error"]
    assert (found, error["code"]) == (status, code)
    assert headers["content-type"] == "application/json"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert not re.search(r"Traceback|\.py|/home|/tmp", error["message"])


def test_the_answer_ends_where_the_context_does(server: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 10_000, "temperature": 0}
    answer = json.loads(post(server, "/v1/completions", body)[2])
    assert answer["usage"]["total_tokens"] <= CONTEXT
    assert (answer["choices"][0]["finish_reason"] == "length") == (answer["usage"]["total_tokens"] == CONTEXT)


def test_only_json_is_read(server: Running) -> None:
    """A form that a page of somebody else's sends is not."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert post(server, "/v1/completions", b'{"prompt": "a"}', Content_Type=kind)[0] == 415
    assert post(server, "/v1/completions", b"", Content_Encoding="gzip")[0] == 415


def test_a_model_without_a_template_has_no_chat(tmp_path) -> None:
    from tests.support.tiny_models import write_tiny_model

    plain = load_served(write_tiny_model(tmp_path / "plain.gguf", "llama"))
    with running(plain) as server:
        status, _, data = post(server, "/v1/chat/completions", {"messages": HELLO})
        assert (status, json.loads(data)["error"]["code"]) == (400, "no_chat_template")
        assert [one["id"] for one in json.loads(get(server, "/v1/models")[2])["data"]] == ["tiny"]
        assert post(server, "/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200
        assert post(server, "/v1/completions", {"prompt": "a", "nkat_gamma": 0.9})[0] == 400


def test_health_and_the_page_need_nothing(server: Running) -> None:
    assert json.loads(get(server, "/health")[2]) == {"status": "ok"}
    status, headers, page = get(server, "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert not re.search(rb"""(src|href)=["']?(https?:)?//""", page)  # nothing from elsewhere
    assert "server" not in headers


# --- who may ask


def test_a_key_is_asked_for_and_not_told(loaded: LoadedModel) -> None:
    with running(loaded, Paced(), keys=("first-key", "second-key")) as server:
        for shown in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "first-key"},
            {"Authorization": "Bearer "},
        ):
            status, headers, data = get(server, "/v1/models", **shown)
            assert (status, json.loads(data)["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
            assert b"-key" not in data
        assert post(server, "/v1/completions", {"prompt": "a"})[0] == 401
        with pytest.raises(openai.AuthenticationError):
            client_of(server, "wrong").models.list()
        assert [client_of(server, key).models.list().data[0].id for key in ("first-key", "second-key")] == ["tiny"] * 2
        assert get(server, "/health")[0] == get(server, "/")[0] == 200
        assert not any("-key" in line for line in server.log)


def test_pages_of_others_are_kept_out(loaded: LoadedModel, server: Running) -> None:
    """By their own name for this machine, and by the browser's question first, unless they are let in."""
    assert get(server, "/v1/models", Host="evil.example:8080")[0] == 403
    assert get(server, "/v1/models", Host="localhost:1")[0] == get(server, "/v1/models", Host="[::1]:1")[0] == 200
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as old:
        old.sendall(b"GET /health HTTP/1.0\r\n\r\n")  # a probe, which names no host
        assert read_until(old, b"\r\n").startswith(b"HTTP/1.1 200 ")
    assert "access-control-allow-origin" not in get(server, "/v1/models", Origin="https://chat.example")[1]
    with running(loaded, Paced(), origins=("https://chat.example",), hosts=None) as open_one:
        headers = get(open_one, "/v1/models", Origin="https://chat.example", Host="any.example")[1]
        assert headers["access-control-allow-origin"] == "https://chat.example"
        assert "access-control-allow-origin" not in get(open_one, "/v1/models", Origin="https://evil.example")[1]


# --- the queue


def test_a_full_queue_says_when_to_come_back(loaded: LoadedModel) -> None:
    paced = Paced()
    with running(loaded, paced, places=3) as server, ThreadPoolExecutor() as pool:
        body = {"prompt": "a", "max_tokens": 2}
        waiting = [pool.submit(post, server, "/v1/completions", body) for _ in range(3)]
        wait_until(lambda: server.worker._taken == 3)
        status, headers, data = post(server, "/v1/completions", body)
        assert (status, json.loads(data)["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            client_of(server).completions.create(model="tiny", prompt="a")
        for _ in range(6):
            paced.steps.release()
        assert [one.result()[0] for one in waiting] == [200] * 3
        for _ in range(2):
            paced.steps.release()
        assert post(server, "/v1/completions", body)[0] == 200
        assert len(paced.asked) == 4  # the refused ones never came to the model


def open_stream(server: Running, **fields: Any) -> socket.socket:
    body = encoded({"prompt": "a", "stream": True, "max_tokens": 50} | fields)
    host, _, port = urlsplit(server.url).netloc.partition(":")
    link = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
    link.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
    return link


def read_until(link: socket.socket, word: bytes) -> bytes:
    found = b""
    while word not in found:
        more = link.recv(4096)
        assert more, found
        found += more
    return found


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_is_not_answered_any_more(loaded: LoadedModel, stream: bool) -> None:
    paced = Paced()
    with running(loaded, paced) as server, ThreadPoolExecutor() as pool:
        gone = open_stream(server, stream=stream)
        wait_until(lambda: len(paced.asked) == 1)
        waits = open_stream(server, stream=stream)  # and one that goes away while it waits
        wait_until(lambda: server.worker._taken == 2)
        follows = pool.submit(post, server, "/v1/completions", {"prompt": "b", "max_tokens": 3})
        wait_until(lambda: server.worker._taken == 3)
        if stream:
            paced.steps.release()
            read_until(gone, b'"text":"a"')
        gone.close()
        waits.close()
        wait_until(lambda: paced.given_up == 1)
        for _ in range(3):
            paced.steps.release()
        assert json.loads(follows.result()[2])["choices"][0]["text"] == "aaa"
        assert len(paced.asked) == 2
        wait_until(lambda: len(server.log) == 3)
        assert sum("the client went away" in line for line in server.log) == 2
        assert server.worker._taken == 0


def test_a_stream_that_waits_says_so(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "QUIET_SECONDS", 0.01)
    paced = Paced()
    with running(loaded, paced) as server:
        link = open_stream(server, max_tokens=1)
        read_until(link, b": waiting\n\n")
        paced.steps.release()
        assert b'"text":"a"' in read_until(link, b"[DONE]")
        link.close()


def test_a_fault_is_told_without_its_details_and_the_next_is_answered(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    paced = Paced()
    paced.failure = RuntimeError("something broke in /somebody/home")
    with running(loaded, paced) as server:
        status, _, data = post(server, "/v1/completions", {"prompt": "a"})
        assert (status, json.loads(data)["error"]["code"]) == (500, "internal_error")
        assert b"broke" not in data
        _, _, data = post(server, "/v1/completions", {"prompt": "a", "stream": True})
        assert b"internal_error" in data
        assert b"[DONE]" not in data
        with pytest.raises(openai.APIError, match="failed to answer"):
            list(client_of(server).completions.create(model="tiny", prompt="a", stream=True))
        assert "something broke in /somebody/home" in capsys.readouterr().err
        paced.failure = None
        paced.steps.release()
        assert post(server, "/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200


def test_when_it_stops_all_are_told(loaded: LoadedModel) -> None:
    paced = Paced()
    with running(loaded, paced) as server, ThreadPoolExecutor() as pool:
        writing = open_stream(server)
        wait_until(lambda: len(paced.asked) == 1)
        waiting = pool.submit(post, server, "/v1/completions", {"prompt": "b"})
        wait_until(lambda: server.worker._jobs.qsize() == 1)
        server.worker.stop(60)
        assert get(server, "/health")[0] == 503
        assert post(server, "/v1/completions", {"prompt": "c"})[0] == 503
        for _ in range(50):  # the one that is written comes to its end
            paced.steps.release()
        assert b'"finish_reason":"length"' in read_until(writing, b"[DONE]")
        status, _, data = waiting.result()
        assert (status, json.loads(data)["error"]["code"]) == (503, "shutting_down")
        writing.close()


def test_when_it_must_stop_at_once_the_answer_is_cut_and_that_is_told(loaded: LoadedModel) -> None:
    paced = Paced()
    with running(loaded, paced) as server:
        writing = open_stream(server)
        wait_until(lambda: len(paced.asked) == 1)
        server.worker.stop(0)
        assert b"shutting_down" in read_until(writing, b"0\r\n\r\n")
        writing.close()


def test_many_clients_lose_nothing(server: Running, oracle) -> None:
    """32 at a time, each with a conversation and a strength of its own, and each gets its own answer."""
    lines = [f"the {letter} in a tin" for letter in "abcdefgh"]
    asked = [(lines[i % 8], ARMS[i % 3], i % 2 == 0) for i in range(32)]
    start = threading.Barrier(32)

    def ask(prompt: str, arm: str, stream: bool) -> str:
        start.wait(60)
        body = {"prompt": prompt, "model": arm, "max_tokens": 8, "temperature": 0, "stream": stream}
        status, _, data = post(server, "/v1/completions", body)
        assert status == 200
        if not stream:
            return json.loads(data)["choices"][0]["text"]
        events = [line[6:] for line in data.decode().split("\n\n") if line]
        assert events[-1] == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])

    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(lambda one: ask(*one), asked))
    assert texts == [oracle(prompt, gamma_of(arm), 8) for prompt, arm, _ in asked]


def test_a_line_of_log_says_what_was_done_and_not_what_was_said(server: Running) -> None:
    before = len(server.log)
    post(server, "/v1/completions", {"prompt": "a secret hen", "max_tokens": 2, "nkat_theta": False})
    wait_until(lambda: len(server.log) > before)
    line = server.log[-1]
    assert re.search(
        r"127\.0\.0\.1 POST /v1/completions 200 [\d.]+ s; tiny:base; prompt \d+.*, generated 2, length$", line
    )
    assert "hen" not in line


def test_a_path_cannot_make_lines_of_its_own(server: Running) -> None:
    before = len(server.log)
    assert get(server, "/%0a12:00:00%20127.0.0.1%20GET%20/admin%20200%1b[31m")[0] == 404
    wait_until(lambda: len(server.log) > before)
    assert server.log[-1].isprintable()
