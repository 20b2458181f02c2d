"""Conversations in rows: each format, and each fault with its reason."""

import pytest

from slm_jax.chat.formats import (
    MalformedConversationError,
    format_of_columns,
    format_of_row,
    named_format,
    parse_conversation,
)
from slm_jax.chat.messages import Message
from slm_jax.config.schema import DataConfig
from slm_jax.data.sources.documents import Document, InvalidRow
from slm_jax.data.sources.rows import ConversationMapper, Row, RowMapper, make_row_mapper, resolved_mapper

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}
PARSED = (Message("user", "Hi"), Message("assistant", "Hello."))


@pytest.mark.parametrize(
    ("row", "title", "messages"),
    [
        ({"id": 1, "messages": [USER, ANSWER]}, "OpenAI format (column messages)", PARSED),
        (
            {"messages": [{"role": "developer", "content": "Be brief."}, USER, ANSWER, USER]},
            "OpenAI format (column messages)",
            (Message("system", "Be brief."), *PARSED, PARSED[0]),
        ),
        ({"messages": [{"role": "system", "content": " "}, USER, ANSWER]}, "OpenAI format (column messages)", PARSED),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}, ANSWER]},
            "OpenAI format (column messages)",
            (Message("user", "a\nb"), PARSED[1]),
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
            "ShareGPT format (column conversations)",
            PARSED,
        ),
        ({"conversations": [USER, ANSWER]}, "OpenAI format (column conversations)", PARSED),
        (
            {"instruction": "Hi", "input": "", "output": "Hello."},
            "alpaca format (columns instruction, input, output)",
            PARSED,
        ),
        (
            {"instruction": "Add.", "context": "1 2", "response": "3", "category": "qa"},
            "dolly format (columns instruction, context, response)",
            (Message("user", "Add.\n\n1 2"), Message("assistant", "3")),
        ),
    ],
)
def test_each_format_is_detected_and_parsed(row, title, messages):
    found = format_of_row(row)
    assert found.title == title
    assert parse_conversation(row, found) == messages
    assert format_of_columns(row.keys()).columns == found.columns


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no message is the assistant's"),
        ("text", "column messages is text, not a list of messages"),
        (None, "column messages is empty (null), not a list of messages"),
        ([USER], "no message is the assistant's"),
        ([ANSWER], "a message of the assistant comes before the first of the user"),
        ([USER, USER, ANSWER], "two messages of role user in a row"),
        ([USER, ANSWER, ANSWER], "two messages of role assistant in a row"),
        ([USER, ANSWER, {"role": "system", "content": "x"}], "a system message is not the first message"),
        ([USER, {"role": "assistant", "content": " \n"}], "a message of role assistant is empty"),
        (
            [USER, {"role": "tool", "content": "4"}, ANSWER],
            "the role 'tool' is unknown (roles: system, user, assistant)",
        ),
        ([USER, {"role": "assistant", "content": None}], "the content of a message is empty (null), not text"),
        ([USER, {"role": "assistant", "content": 5}], "the content of a message is of type int, not text"),
        ([USER, {"role": "assistant"}], "a message has no content"),
        ([USER, {"from": "gpt", "text": "x"}], "a message has no value"),
        ([USER, "Hello."], "a message is text, not an object with role and content"),
        ([USER, {**ANSWER, "tool_calls": [{}]}], "a message calls tools, which is not supported"),
        ([USER, {**ANSWER, "weight": 0}], "a message has weight 0, which is not supported"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER],
            "a message has a part of type image_url: only text is read",
        ),
    ],
)
def test_a_malformed_conversation_has_one_reason(turns, reason):
    with pytest.raises(MalformedConversationError) as caught:
        parse_conversation({"messages": turns}, named_format("messages"))
    assert str(caught.value) == reason
    mapper = ConversationMapper()
    assert mapper.to_document(Row({"messages": turns}, "a.jsonl line 3")) == InvalidRow(reason, "a.jsonl line 3")


def test_instructions_without_text_are_malformed():
    for row, reason in [
        ({"instruction": "Hi", "output": " "}, "column output is empty"),
        ({"instruction": "Hi", "output": 3}, "column output is of type int, not text"),
        ({"instruction": "Hi", "input": 3, "output": "x"}, "column input is of type int, not text"),
    ]:
        with pytest.raises(MalformedConversationError, match=reason):
            parse_conversation(row, named_format("alpaca"))
    missing = ConversationMapper(named_format("dolly")).to_document(Row({"instruction": "x"}, "here"))
    assert missing == InvalidRow("column response is missing (columns: instruction)", "here")


CHAT = {"messages": [USER, ANSWER]}


@pytest.mark.parametrize(
    ("options", "rows", "document"),
    [
        ({}, [{"text": "t", **CHAT}], Document("t")),  # what was text stays text
        ({}, [{"text": None, **CHAT}, {"text": "t", **CHAT}], None),
        ({}, [CHAT], Document("", messages=PARSED)),
        ({}, [{"instruction": "Hi", "output": "Hello."}], Document("", messages=PARSED)),
        ({}, [{"body": "t"}], None),
        ({"format": "text"}, [CHAT], None),
        ({"format": "chat"}, [{"text": "t", **CHAT}], Document("", messages=PARSED)),
        ({"format": "messages", "text_field": "dialog"}, [{"dialog": CHAT["messages"]}], Document("", messages=PARSED)),
        ({"format": "alpaca"}, [{**CHAT, "instruction": "Hi", "output": "Hello."}], Document("", messages=PARSED)),
        ({"text_field": "body"}, [{"body": "t", **CHAT}], Document("t")),
        ({"template": "{q}", "response_field": "a"}, [{"q": "Q", "a": "A", **CHAT}], Document("Q", "A")),
    ],
)
def test_options_and_first_rows_decide(options, rows, document):
    mapper = resolved_mapper(make_row_mapper(DataConfig(**options)), rows).mapper
    result = mapper.to_document(Row(rows[0], "here"))
    assert result == document if document is not None else isinstance(result, InvalidRow)
    assert mapper.missing_column(rows[0].keys()) == (
        "" if isinstance(result, Document) else mapper.missing_column(rows[0])
    )


def test_named_instructions_are_conversations_only_where_asked_for():
    named = RowMapper(template="alpaca", response_column="output")
    row = {"instruction": "Hi", "output": "Hello."}
    for options, messages in [({}, None), ({"format": "text"}, None), ({"format": "chat"}, PARSED)]:
        mapper = resolved_mapper(make_row_mapper(DataConfig(**options), named), [row]).mapper
        assert mapper.to_document(Row(row, "here")).messages == messages
