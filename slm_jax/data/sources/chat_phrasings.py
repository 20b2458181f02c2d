"""Phrasings of the questions of `python-chat`: those that are trained on, and those that are held out.

A phrasing is a template whose `{name}` is replaced. Held-out phrasings never occur in training text; each of them asks
for the same as some that do, in other words.
"""

from typing import NamedTuple


class Phrasings(NamedTuple):
    """Phrasings of one question: `train` and `heldout`."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]


PURPOSE = Phrasings(
    (
        "What does {name} do?",
        "what does {name} do",
        "Explain {name}.",
        "What is {name}?",
        "Tell me about {name}.",
        "Describe {name}.",
        "What is {name} for?",
        "Can you explain what {name} does?",
        "What is the purpose of {name}?",
        "I saw {name} in a program. What does it do?",
        "How would you describe {name}?",
        "Please explain {name} to me.",
        "Do you know what {name} does?",
        "{name}: what does it do?",
        "What is the use of {name}?",
        "Could you tell me what {name} is?",
    ),
    (
        "What can I use {name} for?",
        "Please describe {name} in one sentence.",
        "I would like to know what {name} does.",
        "Can you tell me the purpose of {name}?",
        "Remind me, what is {name}?",
    ),
)

CLASS_PURPOSE = Phrasings(
    (
        "What is the class {name} for?",
        "What does the class {name} do?",
        "Explain the class {name}.",
        "Describe the class {name}.",
    ),
    ("What is the purpose of the class {name}?", "Tell me about the class {name}."),
)

MODULE_PURPOSE = Phrasings(
    (
        "What is the module {name} for?",
        "What does the module {name} do?",
        "Explain the module {name}.",
        "Describe the module {name}.",
        "What is the purpose of the module {name}?",
        "What can I do with the module {name}?",
        "what is the module {name}",
        "Why would I import {name}?",
    ),
    ("Tell me about the module {name}.", "What can the module {name} do?", "Please explain the module {name} to me."),
)

ARGUMENTS = Phrasings(
    (
        "What are the arguments of {name}?",
        "what are the arguments of {name}",
        "Which arguments does {name} take?",
        "What is the signature of {name}?",
        "Show me the signature of {name}.",
        "How do I call {name}?",
        "Which parameters does {name} have?",
        "List the parameters of {name}.",
        "What do I pass to {name}?",
        "Tell me the arguments of {name}.",
        "What arguments does {name} accept?",
        "Does {name} take arguments?",
    ),
    (
        "What parameters does {name} take?",
        "Please list the arguments of {name}.",
        "I want to call {name}. What are its arguments?",
        "Give me the signature of {name}.",
    ),
)

RETURNS = Phrasings(
    (
        "What does {name} return?",
        "what does {name} return",
        "What is the result of {name}?",
        "What is returned by {name}?",
        "What do I get from {name}?",
        "Which value does {name} return?",
        "What is the return value of {name}?",
        "Tell me what {name} returns.",
        "What comes back from {name}?",
        "What will {name} return?",
    ),
    (
        "Can you tell me what {name} returns?",
        "If I call {name}, what does it return?",
        "What value is returned by {name}?",
    ),
)

LOCATION = Phrasings(
    (
        "Which module contains {name}?",
        "which module contains {name}",
        "Which module is {name} in?",
        "Where do I find {name}?",
        "In which module is {name}?",
        "What do I import to use {name}?",
        "Which module has {name}?",
        "Where is {name} defined?",
        "From which module do I import {name}?",
        "Where does {name} come from?",
        "{name} is in which module?",
        "Tell me the module of {name}.",
    ),
    (
        "Which module do I import to use {name}?",
        "In which module do I find {name}?",
        "What module is {name} in?",
        "Can you tell me which module contains {name}?",
    ),
)

# Questions about the name of the turn before.
PURPOSE_AGAIN = Phrasings(
    (
        "And what does it do?",
        "What does it do?",
        "what does that do",
        "What is it for?",
        "And what is its purpose?",
        "Explain it.",
        "Tell me what it does.",
        "What is it?",
    ),
    ("And what is it for?", "Can you explain what it does?", "Describe it."),
)
ARGUMENTS_AGAIN = Phrasings(
    (
        "And what are its arguments?",
        "What are its arguments?",
        "which arguments does it take",
        "How do I call it?",
        "What is its signature?",
        "And which parameters does it have?",
        "Does it take arguments?",
        "What do I pass to it?",
    ),
    ("And how do I call it?", "Which parameters does it take?", "Tell me its arguments."),
)
RETURNS_AGAIN = Phrasings(
    (
        "And what does it return?",
        "What does it return?",
        "what is returned",
        "What is its result?",
        "And what is the return value?",
        "What do I get from it?",
        "Tell me what it returns.",
    ),
    ("And what do I get from it?", "What is its return value?", "Which value does it return?"),
)
LOCATION_AGAIN = Phrasings(
    (
        "Which module is it in?",
        "And which module is it in?",
        "which module contains it",
        "Where do I find it?",
        "What do I import to use it?",
        "In which module is it?",
        "And where is it defined?",
        "From which module do I import it?",
    ),
    ("And which module contains it?", "Where is it?", "Which module do I import for it?"),
)

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You answer questions about Python's standard library.",
    "You are an assistant for Python programmers. Answer in one sentence.",
    "Be brief.",
)

WHO_I_AM = "I am a small language model trained on Python's documentation."
WHAT_I_DO = "I answer questions about the functions, classes and modules of Python."
ONLY_PYTHON = "I can only answer questions about Python's standard library."

# Small talk: (phrasings, answer).
SMALL_TALK: tuple[tuple[Phrasings, str], ...] = (
    (
        Phrasings(
            ("Who are you?", "who are you", "What are you?", "Tell me about yourself.", "Please introduce yourself."),
            ("Can you tell me who you are?", "Describe yourself."),
        ),
        WHO_I_AM,
    ),
    (
        Phrasings(
            ("What can you do?", "what can you do", "What do you know?", "How can you help me?", "What can I ask you?"),
            ("Tell me what you can do.", "What are you able to do?"),
        ),
        WHAT_I_DO,
    ),
    (
        Phrasings(
            ("Are you a human?", "Are you a person?", "Are you real?", "Am I talking to a person?"),
            ("Are you a real person?",),
        ),
        "No, I am a small language model.",
    ),
    (
        Phrasings(
            ("Do you know everything?", "Are you always right?", "Do you make mistakes?", "Can I trust you?"),
            ("Are your answers always right?",),
        ),
        "No, I know only a part of Python's documentation, and I make mistakes.",
    ),
    (
        Phrasings(("Hello", "Hi", "hello", "Good morning", "Hello!", "Hey"), ("Good afternoon", "Hello there!")),
        "Hello! Ask me about Python's standard library.",
    ),
    (
        Phrasings(("Thanks", "Thank you.", "thank you", "Thanks a lot!", "Great, thanks."), ("Thank you very much!",)),
        "You are welcome.",
    ),
    (Phrasings(("Bye", "Goodbye", "See you.", "bye bye", "Good night"), ("See you tomorrow.",)), "Goodbye!"),
    (
        Phrasings(
            (
                "What is the capital of France?",
                "What is the weather today?",
                "Write a poem about the sea.",
                "Who won the last election?",
                "How old is the moon?",
                "Tell me a joke.",
                "What is the best movie?",
                "How do I cook rice?",
                "Who was the first president?",
                "What is the population of Brazil?",
                "Translate this into French.",
                "Sing a song for me.",
                "Recommend a book.",
                "What is the meaning of life?",
            ),
            ("What is the capital of Italy?", "Write a story about the moon.", "How do I cook an egg?"),
        ),
        ONLY_PYTHON,
    ),
)
