"""POST /v1/chat/completions over a real socket: OpenAI's client, refusals, and the prefix cache."""

import asyncio
import json

import numpy as np
import pytest

from slm_jax.chat.messages import EncodedChat, Message
from slm_jax.chat.template import ChatTemplate
from slm_jax.run.conversations import is_chat_trained
from slm_jax.serve.chat import ChatCompletion, format_chat_logprobs
from slm_jax.serve.chat_schema import ChatRequest
from slm_jax.serve.completions import Limits
from slm_jax.serve.conversation import chat_masks, encode_chat
from slm_jax.serve.detokenizer import IncrementalDetokenizer
from slm_jax.serve.errors import ApiError
from slm_jax.serve.requests import TokenLogprob
from slm_jax.utils.errors import UserError
from tests.serve.conftest import CONTEXT
from tests.serve.test_api import send, wait_until
from tests.serve.test_engine import make_request, run
from tokenizer import HybridTokenizer

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "The list is"}]
CONVERSATION = [
    Message("system", "It returns the value."),
    Message("user", "The list"),
    Message("assistant", "is a Sequence."),
    Message("user", "the first item, or None."),
]


def as_json(messages):
    return [message._asdict() for message in messages]


def test_two_streamed_turns_give_the_tokens_of_the_engine(client, served, engine, loaded):
    """Text, usage and reused tokens; the expected ids come from an engine without requests over HTTP."""
    template = ChatTemplate.of(loaded.tokenizer)
    messages = [Message("system", "It returns the value."), Message("user", "The list is")]
    options = {"model": "tiny", "max_completion_tokens": 12, "seed": 5, "temperature": 0.9}
    for turn in range(2):
        prompt = encode_chat(template, messages)
        parts = list(
            client.chat.completions.create(
                messages=as_json(messages), stream=True, stream_options={"include_usage": True}, **options
            )
        )
        assert parts[0].choices[0].delta.role == "assistant"
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        [reason] = [part.choices[0].finish_reason for part in parts if part.choices and part.choices[0].finish_reason]
        usage = parts[-1].usage
        assert all(part.usage is None for part in parts[:-1])
        complete = client.chat.completions.create(messages=as_json(messages), **options)
        message = complete.choices[0].message
        assert (message.content, complete.choices[0].finish_reason) == (text, reason)
        sampling = type(make_request([1], 1).sampling)(temperature=0.9, top_p=1.0, seed=5)
        request = make_request(prompt.ids, 12, sampling, boundaries=prompt.boundaries)
        run(engine, [request])
        assert text == loaded.tokenizer.decode(request.on_chunk.ids)
        assert reason == request.on_chunk.finish_reason
        assert usage.prompt_tokens == complete.usage.prompt_tokens == len(prompt.ids)
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert complete.usage.completion_tokens == usage.completion_tokens
        assert 0 <= usage.prompt_tokens_details.cached_tokens < len(prompt.ids)
        if turn:
            assert complete.usage.prompt_tokens_details.cached_tokens >= len(encode_chat(template, messages[:2]).ids)
        messages += [Message("assistant", text), Message("user", "the first item")]
    assert served.engines["tiny"].counters.reused_tokens > 0


def test_stop_n_and_logprobs(client, loaded):
    options = {"model": "tiny", "messages": MESSAGES, "seed": 2, "max_tokens": 20, "extra_body": {"ignore_eos": True}}
    free = client.chat.completions.create(**options, logprobs=True, top_logprobs=2).choices[0]
    assert free.finish_reason == "length"
    tokens = free.logprobs.content
    assert len(tokens) == 20
    assert free.message.content.startswith("".join(token.token for token in tokens))  # all but an incomplete character
    assert b"".join(map(bytes, (token.bytes for token in tokens))).decode() == "".join(token.token for token in tokens)
    for token in tokens:
        assert len(token.top_logprobs) == 2
        assert token.logprob <= token.top_logprobs[0].logprob
    stop = free.message.content[4:6]
    stopped = client.chat.completions.create(**options, stop=[stop]).choices[0]
    assert stopped.message.content == free.message.content[: free.message.content.index(stop)]
    assert stopped.finish_reason == "stop"
    several = client.chat.completions.create(**options, n=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.choices[0].message.content == free.message.content
    assert several.usage.completion_tokens == 60
    again = client.chat.completions.create(**{**options, "seed": 4}).choices[0]
    assert again.message.content == several.choices[2].message.content


def test_the_tokens_of_logprobs_are_the_text(tokenizer):
    """Case marks, characters of several tokens; the chosen token among the most probable ones is the same."""
    text = "LIST Naïve שלום. \U0001f600 None"
    ids = tokenizer.encode(text)
    detokenizer = IncrementalDetokenizer(tokenizer)
    detokenizer.append(ids, [TokenLogprob(-0.5, [(id_, -0.5), (tokenizer.eos_id, -2.0)]) for id_ in ids])
    detokenizer.finish()
    formatted = format_chat_logprobs(tokenizer, detokenizer.release(final=True)[1], 2)
    assert len(formatted) == len(ids)
    assert "".join(token["token"] for token in formatted) == text
    assert b"".join(bytes(token["bytes"]) for token in formatted) == text.encode()
    assert any(not tokenizer.token_bytes[id_] for id_ in ids)  # case marks
    for token in formatted:
        chosen, other = token.pop("top_logprobs")
        assert chosen == token
        assert (other["token"], other["bytes"]) == ("<EOS>", None)


def test_messages_in_other_forms_are_the_same_conversation(served):
    """Content parts, the role developer, and messages as the client returns them."""
    body = {"model": "tiny", "seed": 1, "max_tokens": 6}
    plain = send(served, "POST", PATH, {**body, "messages": as_json(CONVERSATION)})[2]
    messages = as_json(CONVERSATION)
    parts = [{"type": "text", "text": text} for text in ("It returns", " the value.")]
    messages[0] = {"role": "developer", "content": parts}
    messages[2] |= {"refusal": None, "tool_calls": None, "annotations": [], "audio": None}
    more = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "store": False,
    }
    status, _, other = send(served, "POST", PATH, {**body, "messages": messages, **more})
    assert status == 200
    assert other["choices"] == plain["choices"]
    assert other["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("change", "param", "text"),
    [
        ({"messages": []}, "messages", "messages must be a list of 1 to 1,000 objects with role, content"),
        ({"messages": "hi"}, "messages", 'objects with role, content, refusal, not "hi"'),
        ({}, "messages", "messages is required"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is required: a text or a"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", '"user" or "assistant", not "robot"'),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "call no tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0].type", 'messages[0].content[0].type "image_url" is not supported'),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type", "text"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls", "tools"),
        ({"messages": [{"role": "user", "content": "x", "nme": 1}]}, "messages[0].nme", "messages[0] has role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "message 1 has the role 'assistant'"),
        ({"messages": [*MESSAGES, *MESSAGES]}, "messages", "user and assistant take turns"),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools", "call no tools"),
        ({"messages": MESSAGES, "functions": [{}]}, "functions", "call no functions"),
        ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"messages": MESSAGES, "modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"messages": MESSAGES, "store": True}, "store", "store true is not supported"),
        ({"messages": MESSAGES, "store": 0}, "store", "store 0 is not supported"),
        ({"messages": MESSAGES, "audio": {}}, "audio", "read and write text only"),
        ({"messages": MESSAGES, "prompt": "x"}, "prompt", "send messages"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "needs logprobs true"),
        ({"messages": MESSAGES, "logprobs": True, "top_logprobs": 9}, "top_logprobs", "from 0 to 5, not 9"),
        ({"messages": MESSAGES, "max_tokens": 0}, "max_tokens", "max_tokens must be an integer of 1 or more, not 0"),
        ({"messages": MESSAGES, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"messages": MESSAGES, "max_completion_tokens": 10**6}, "max_completion_tokens", "exceeds the limit"),
        ({"messages": MESSAGES, "metadata": {"a": 1}}, "metadata.a", "metadata.a must be a text, not 1"),
        ({"messages": MESSAGES, "metadata": 1}, "metadata", "an object whose values are each a text, not 1"),
        ({"messages": MESSAGES, "stream_options": {"x": 1}}, "stream_options.x", "stream_options has include_usage"),
    ],
)  # fmt: skip
def test_invalid_requests_are_named(served, change, param, text):
    status, _, tree = send(served, "POST", PATH, {"model": "tiny", **change})
    assert (status, tree["error"]["param"], tree["error"]["type"]) == (400, param, "invalid_request_error")
    assert text in tree["error"]["message"]


def test_a_conversation_that_fills_the_context_is_refused_not_truncated(served, loaded):
    template = ChatTemplate.of(loaded.tokenizer)
    words = "The list is a Sequence. " * 60
    lengths = {len(encode_chat(template, [Message("user", words[:n])]).ids): n for n in range(1, 900)}
    content = words[: lengths[CONTEXT - 1]]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 50, "ignore_eos": True}
    status, _, tree = send(served, "POST", PATH, body)
    assert (status, tree["usage"]["completion_tokens"], tree["choices"][0]["finish_reason"]) == (200, 1, "length")
    for longer in (content + " list list", content * 200):
        body["messages"] = [{"role": "user", "content": longer}]
        for stream in (False, True):
            status, _, tree = send(served, "POST", PATH, {**body, "stream": stream})
            if len(longer) > 9000:
                assert status == 413
                continue
            assert (status, tree["error"]["code"], tree["error"]["param"]) == (
                400,
                "context_length_exceeded",
                "messages",
            )
            assert f"the limit is {CONTEXT - 1} tokens" in tree["error"]["message"]


@pytest.mark.parametrize(
    ("max_prompt", "text"),
    [
        (20, "the limit is 20 tokens, which this server accepts as a prompt (--max_prompt): "),
        (CONTEXT - 1, "the limit is 127 tokens, which this server accepts as a prompt (--max_prompt): "),
        (CONTEXT, "the limit is 127 tokens, so that an answer fits into the context of 128: "),
    ],
)
def test_the_smaller_of_both_limits_is_named(engine, max_prompt, text):
    async def encode(content):
        body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": content}]}).encode()
        ChatCompletion("tiny", engine, ChatRequest.parse(body), Limits(max_prompt, 100, 60)).encode()

    for content, size in (("list " * (max_prompt + 10), " tokens; "), ("list " * 9000, " characters; ")):
        with pytest.raises(ApiError) as refused:
            asyncio.run(encode(content))
        assert size + text in str(refused.value.body())


def test_the_context_of_a_model_is_the_one_that_is_enforced(served, monkeypatch):
    monkeypatch.setattr(served.engines["other"], "context", 77)
    models = {model["id"]: model["context"] for model in send(served, "GET", "/v1/models")[2]["data"]}
    assert models == {"tiny": CONTEXT, "other": 77}


def test_a_tokenizer_without_a_template_is_refused_with_the_reason(served, monkeypatch):
    engine = served.engines["other"]
    monkeypatch.setattr(engine, "chat_template", None)
    monkeypatch.setattr(engine, "no_chat_reason", "the tokenizer has no chat template")
    status, _, tree = send(served, "POST", PATH, {"model": "other", "messages": MESSAGES})
    assert (status, tree["error"]["param"], tree["error"]["code"]) == (400, "model", "no_chat_template")
    assert "the tokenizer has no chat template" in tree["error"]["message"]
    models = {model["id"]: model for model in send(served, "GET", "/v1/models")[2]["data"]}
    assert (models["other"]["chat"], models["tiny"]["chat"], models["tiny"]["chat_trained"]) == (False, True, False)


def test_a_run_trained_on_conversations_is_named(loaded, monkeypatch):
    folder = loaded.run.path / "corpus" / "part"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"format": 3}')
    assert not is_chat_trained(loaded.run)
    (folder / "manifest.json").write_text('{"format": 4, "chat_template": "0f"}')
    assert is_chat_trained(loaded.run)
    (folder / "manifest.json").write_text("damaged")
    assert not is_chat_trained(loaded.run)


def test_the_answer_is_computed_ahead_for_the_next_turn(served, loaded):
    engine = served.engines["tiny"]
    template = ChatTemplate.of(loaded.tokenizer)
    messages = [Message("user", "first item, or None")]
    body = {"model": "tiny", "max_tokens": 20, "seed": 3, "ignore_eos": True}
    answer = send(served, "POST", PATH, {**body, "messages": as_json(messages)})[2]["choices"][0]["message"]["content"]
    messages += [Message("assistant", answer)]
    answered = encode_chat(template, messages, generation_prompt=False)
    wait_until(lambda: any(len(entry.ids) == len(answered.ids) for entry in engine.prefixes._entries))
    messages.append(Message("user", "The value"))
    for stream in (False, True):
        options = {"stream": stream, "stream_options": {"include_usage": True}} if stream else {}
        _, _, tree = send(served, "POST", PATH, {**body, "messages": as_json(messages), **options})
        tree = json.loads(tree.split("data: ")[-2]) if stream else tree
        assert tree["usage"]["prompt_tokens_details"]["cached_tokens"] == len(answered.ids)
    metrics = send(served, "GET", "/metrics")[2]
    assert f'slm_prefix_reused_tokens_total{{model="tiny"}} {engine.counters.reused_tokens}' in metrics
    assert 'slm_prefix_bytes{model="tiny"} ' in metrics


def test_boundaries_are_the_same_in_every_later_turn(tokenizer):
    template = ChatTemplate.of(tokenizer)
    ids, boundaries = encode_chat(template, CONVERSATION)
    assert ids == template.encode(CONVERSATION, generation_prompt=True).ids.tolist()
    first = encode_chat(template, CONVERSATION[:2])
    answered = encode_chat(template, CONVERSATION[:3], generation_prompt=False)
    assert [b for b in boundaries if b < len(first.ids)] == first.boundaries
    assert len(first.ids) in boundaries
    assert len(answered.ids) in boundaries
    assert [b for b in boundaries if b < len(answered.ids)] == answered.boundaries
    other = encode_chat(template, [CONVERSATION[0], Message("user", "None")])
    assert other.boundaries == first.boundaries  # the system message of another conversation is reused
    assert other.ids[: first.boundaries[0]] == ids[: first.boundaries[0]]

    class Published:
        """Marks no response before a generation prompt, as the templates of published models do."""

        def encode(self, messages, generation_prompt=False):
            chat = template.encode(messages, generation_prompt)
            return EncodedChat(chat.ids, np.zeros_like(chat.predicted)) if generation_prompt else chat

    assert encode_chat(Published(), CONVERSATION) == (ids, boundaries)

    class Hiding(Published):
        """Does not tell which tokens are the assistant's."""

        def encode(self, messages, generation_prompt=False):
            if not generation_prompt:
                raise UserError("hidden")
            return super().encode(messages, generation_prompt)

    assert encode_chat(Hiding(), CONVERSATION).ids == ids
    with pytest.raises(UserError, match="take turns"):
        encode_chat(template, [*CONVERSATION, *CONVERSATION])


def test_an_answer_ends_with_its_token_and_contains_no_other_special_one(tokenizer, engine, loaded):
    template = ChatTemplate.of(tokenizer)
    suppressed, stops = chat_masks(tokenizer, template)
    assert set(stops) == {tokenizer.turn_ids.end, tokenizer.eos_id}
    assert {tokenizer.turn_ids.user, tokenizer.turn_ids.system, tokenizer.turn_ids.assistant} <= set(suppressed)
    assert set(suppressed) | set(stops) == {*tokenizer.suppressed_ids, tokenizer.eos_id}
    prompt = encode_chat(template, CONVERSATION[:2])
    hot = type(make_request([1], 1).sampling)
    requests = [
        make_request(prompt.ids, 100, hot(temperature=3.0, top_p=1.0, seed=seed), boundaries=prompt.boundaries)
        for seed in range(10)
    ]
    run(engine, requests)
    assert {request.on_chunk.finish_reason for request in requests} == {"stop", "length"}
    assert not any(set(suppressed) & set(request.on_chunk.ids) for request in requests)
    ready = HybridTokenizer.pretrained("english-8k")
    assert set(chat_masks(ready, ChatTemplate.of(ready))[1]) == {ready.turn_ids.end, ready.eos_id}
