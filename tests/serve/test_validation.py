"""Messages for invalid bodies: the full path of the parameter, its value, and what is allowed."""

import json

import pytest

pytest.importorskip("starlette")

from slm_jax.generation.sampling import Sampling
from slm_jax.serve.errors import ApiError
from slm_jax.serve.schema import CompletionRequest

PROMPT = (
    "prompt must be a text, a non-empty list of integers, a list of 1 to 256 texts or a list of 1 to 256 non-empty "
)
PROMPT += "lists of integers"
STOP = "stop must be a text of 1 to 200 characters or a list of at most 16 texts of 1 to 200 characters"


def parse(text):
    return CompletionRequest.parse(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ('{"model": 5}', "model", "model must be a text, not 5"),
        ('{"prompt": 5}', "prompt", f"{PROMPT}, not 5"),
        ('{"prompt": []}', "prompt", f"{PROMPT}, not []"),
        ('{"prompt": [[]]}', "prompt[0]", f"{PROMPT}, but prompt[0] is []"),
        ('{"prompt": [1, "x", 2]}', "prompt[1]", f'{PROMPT}, but prompt[1] is "x"'),
        ('{"prompt": ["x", null]}', "prompt[1]", f"{PROMPT}, but prompt[1] is null"),
        ('{"prompt": [[1, 2], [3, 4.5]]}', "prompt[1][1]", f"{PROMPT}, but prompt[1][1] is 4.5"),
        (json.dumps({"prompt": ["x"] * 300}), "prompt", f"{PROMPT}, not a list of 300"),
        ('{"max_tokens": -1}', "max_tokens", "max_tokens must be an integer of 0 or more, not -1"),
        ('{"max_tokens": "16"}', "max_tokens", 'max_tokens must be an integer of 0 or more, not "16"'),
        ('{"max_tokens": 16.5}', "max_tokens", "max_tokens must be an integer of 0 or more, not 16.5"),
        ('{"temperature": NaN}', "temperature", "temperature must be a number from 0 to 100, not NaN"),
        ('{"temperature": 1e999}', "temperature", "temperature must be a number from 0 to 100, not Infinity"),
        ('{"temperature": "hot"}', "temperature", 'temperature must be a number from 0 to 100, not "hot"'),
        ('{"top_p": 0}', "top_p", "top_p must be a number above 0, at most 1, not 0"),
        ('{"top_p": -Infinity}', "top_p", "top_p must be a number above 0, at most 1, not -Infinity"),
        ('{"n": 129}', "n", "n must be an integer from 1 to 128, not 129"),
        ('{"n": true}', "n", "n must be an integer from 1 to 128, not true"),
        ('{"stream": "yes"}', "stream", 'stream must be true or false, not "yes"'),
        (
            '{"stream_options": 3}',
            "stream_options",
            "stream_options must be an object with include_usage, include_obfuscation, not 3",
        ),
        (
            '{"stream_options": {"include_usage": 1}}',
            "stream_options.include_usage",
            "stream_options.include_usage must be true or false, not 1",
        ),
        (
            '{"stream_options": {"include_usage": true, "continuous_usage_stats": true}}',
            "stream_options.continuous_usage_stats",
            "unknown parameter 'stream_options.continuous_usage_stats': stream_options has include_usage, "
            "include_obfuscation",
        ),
        ('{"logprobs": 6}', "logprobs", "logprobs must be an integer from 0 to 5, not 6"),
        ('{"logprobs": true}', "logprobs", "logprobs must be an integer from 0 to 5, not true"),
        ('{"echo": 1}', "echo", "echo must be true or false, not 1"),
        ('{"stop": 1}', "stop", f"{STOP}, not 1"),
        ('{"stop": [""]}', "stop[0]", f'{STOP}, but stop[0] is ""'),
        (
            '{"stop": ["a", "b\\ud83d"]}',
            "stop[1]",
            'stop[1] must not contain a lone surrogate, half of a UTF-16 character, as "b\\ud83d" does',
        ),
        ('{"seed": -1}', "seed", "seed must be an integer from 0 to 4294967295, not -1"),
        ('{"user": []}', "user", "user must be a text, not []"),
        ('{"top_k": 0.5}', "top_k", "top_k must be an integer from 0 to 2147483647, not 0.5"),
        ('{"min_p": 2}', "min_p", "min_p must be a number from 0 to 1, not 2"),
        (
            '{"repetition_penalty": 0}',
            "repetition_penalty",
            "repetition_penalty must be a number above 0, at most 100, not 0",
        ),
        ('{"ignore_eos": "x"}', "ignore_eos", 'ignore_eos must be true or false, not "x"'),
        ('{"token_details": 2}', "token_details", "token_details must be true or false, not 2"),
        ('{"promt": "x"}', "promt", "unknown parameter 'promt': did you mean prompt?"),
        ('{"promt": null}', "promt", "unknown parameter 'promt': did you mean prompt?"),
        ('{"messages": []}', "messages", "messages is not supported: send a prompt, or use POST /v1/chat/completions"),
        ('{"max_completion_tokens": 5}', "max_completion_tokens", "is not supported: use max_tokens"),
        ('{"a\\ud800": 1}', None, "a name of a parameter contains a lone surrogate, half of a UTF-16 character"),
        (
            "{",
            None,
            "the body is not valid JSON (Expecting property name enclosed in double quotes at line 1 column 2)",
        ),
        ("", None, "the body is empty: send a JSON object"),
        ("[1]", None, "the body must be a JSON object, not [1]"),
        ("[" * 9000, None, "the body is nested too deeply"),
        ('{"seed": ' + "1" * 5000 + "}", None, "an integer in the body has too many digits"),
    ],
)
def test_messages_name_parameter_value_and_what_is_allowed(body, param, message):
    with pytest.raises(ApiError) as error:
        parse(body)
    assert (error.value.status, error.value.param) == (400, param)
    assert error.value.message == message or (message.startswith("is not") and error.value.message.endswith(message))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", "0.5"),
        ("presence_penalty", '"x"'),
        ("frequency_penalty", "-2"),
        ("logit_bias", '{"12": 5}'),
        ("logit_bias", '{"12": "x"}'),
        ("suffix", '"x"'),
        ("best_of", "3"),
        ("best_of", '"x"'),
    ],
)
def test_unsupported_parameters_of_openai_are_named_as_such(name, value):
    with pytest.raises(ApiError) as error:
        parse(f'{{"{name}": {value}}}')
    assert error.value.param == name
    assert error.value.message.startswith(f"{name} {value} is not supported, a parameter of OpenAI's API: leave it out")


def test_every_parameter_refuses_every_wrong_type():
    """No text of pydantic, no missing path, for any parameter and any JSON type."""
    values = [None, True, 5, -5, 0.5, float("nan"), "x", "", [], ["x"], [None], [[]], {}, {"x": 1}, 10**400, "\ud800"]
    errors = []
    for name in CompletionRequest.model_fields:
        for value in values:
            try:
                parse(json.dumps({name: value}))
            except ApiError as error:
                errors.append((name, error))
    assert len(errors) > 150
    for name, error in errors:
        assert error.message.startswith((name, f"unknown parameter '{name}.x'")), error.message
        assert error.param is not None
        assert error.param.startswith(name)
        for word in ("Input", "valid ", "should", "pydantic", "List", "Dictionary"):
            assert word not in error.message


def test_all_problems_are_named_within_bounds():
    with pytest.raises(ApiError, match=r"n must be .*; top_k must be"):
        parse('{"n": 0, "top_k": -1}')
    with pytest.raises(ApiError, match="and 9,990 more problems") as error:
        parse(json.dumps({f"x{i}" * 50: i for i in range(10_000)}))
    assert len(error.value.message) < 6_000


def test_invalid_utf8_is_located():
    with pytest.raises(ApiError, match=r"not UTF-8 \(byte 0xff at offset 12\)"):
        CompletionRequest.parse(b'{"prompt": "\xff"}')


def test_unsupported_parameters_are_accepted_with_their_defaults():
    body = {"best_of": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "suffix": "", "user": "me"}
    assert CompletionRequest.parse(json.dumps(body).encode()).n == 1
    nulls = json.dumps(dict.fromkeys(CompletionRequest.model_fields)).encode()
    assert CompletionRequest.parse(nulls) == CompletionRequest()
    assert CompletionRequest.parse(b'{"seed": 4}').sampling() == Sampling(1.0, 0, 1.0, 0.0, 1.0, 0, 4)
