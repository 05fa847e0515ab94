"""Reasons to leave examples out: what a filter finds, and what it lets pass."""

import pytest

from keras_gemma.data import duplicates
from keras_gemma.data import mistaken_identity
from keras_gemma.data import personal_data
from keras_gemma.data import unsafe


@pytest.mark.parametrize(
    "entity, text",
    [
        ("EMAIL_ADDRESS", "Write to jane.doe@example.co.uk, please."),
        ("PHONE_NUMBER", "Call (212) 555-0123 at noon."),
        ("CREDIT_CARD", "It was 4111 1111 1111 1111."),
        ("IBAN_CODE", "To DE89 3704 0044 0532 0130 00."),
        ("IP_ADDRESS", "Log in at 192.168.10.5."),
    ],
)
def test_personal_data(entity, text):
    found = personal_data()
    assert found("Who?", text) == f"personal data ({entity})"
    assert found(text, "Why?") == f"personal data ({entity})"
    assert personal_data([entity])("Who?", text) == f"personal data ({entity})"


@pytest.mark.parametrize(
    "text",
    [
        "The war of 1914-1918, pages 100-200, chapter 3.1.2.",
        "The decorator @functools.cache of Python 3.11.",
        # Its check digit is wrong.
        "It was 4111 1111 1111 1112.",
        "name@localhost is no address that anyone has.",
    ],
)
def test_what_is_not_personal(text):
    assert personal_data()("What?", text) is None


def test_personal_data_of_another_kind_is_left_alone():
    assert personal_data(["IP_ADDRESS"])("Who?", "Write to jane@example.com.") is None


def test_unsafe():
    found = unsafe()
    assert found("Hello", "You stupid idiot, go and kill yourself.") == "unsafe"
    assert found("You fucking moron", "Hello") == "unsafe"
    assert found("Where did the old man go?", "He went down to the sea.") is None


def test_a_classifier_of_ones_own():
    found = unsafe(least_probability=0.5, probability=lambda text: text.count("!") / 10)
    assert found("a", "b!!!!!") == "unsafe"
    assert found("a!!!!", "b!!!!") is None


@pytest.mark.parametrize(
    "answer",
    [
        "I am ChatGPT.",
        "I'm Claude, happy to help.",
        "My name is Bard and I like poems.",
        "As an AI language model trained by OpenAI, I cannot feel.",
        "I was created by Anthropic to be helpful.",
        "I am a large language model, developed by Meta AI.",
        "OpenAI trained me on text.",
        "As ChatGPT, I know that.",
    ],
)
def test_mistaken_identity(answer):
    found = mistaken_identity()
    assert found("Who are you?", answer) == "mistaken self-identification"
    # What a user says about a model is no claim of ours.
    assert found(answer, "I am Gemma.") is None


@pytest.mark.parametrize(
    "answer",
    [
        "I am Gemma, an open model trained by Google.",
        "ChatGPT was made by OpenAI.",
        "Claude Monet painted it. I like his lilies.",
        "I am metaphorically speaking.",
        "As Llamas go, it is small. It is thought that I am clever.",
    ],
)
def test_what_is_no_mistake(answer):
    assert mistaken_identity()("Tell me.", answer) is None


def test_names_of_ones_own():
    found = mistaken_identity(assistants=["Gemma"], makers=["Google"])
    assert found("", "I am Gemma.") == "mistaken self-identification"
    assert found("", "I am ChatGPT.") is None


def test_near_duplicates():
    answer = "The quick brown fox jumps over the lazy dog and runs on into the dark and silent forest beyond the hill."
    found = duplicates(similarity=0.7)
    assert found("Tell me a story.", answer) is None
    assert found("Tell me a story.", answer.replace("silent", "quiet")) == "duplicate"
    assert found("TELL ME  a story", answer.upper()) == "duplicate"
    assert found("Tell me a story.", "Once there was a king who had three sons, and they were all fools.") is None


def test_equal_answers_to_other_questions_are_no_duplicates():
    found = duplicates(similarity=1.0)
    assert found("Is water wet?", "Yes.") is None
    assert found("Is fire hot?", "Yes.") is None
    assert found("is fire hot", "yes") == "duplicate"
    # The same words, cut elsewhere.
    assert found("Is fire hot? Yes.", "") is None


@pytest.mark.parametrize(
    "make, part",
    [
        (lambda: personal_data(["NAME"]), "NAME"),
        (lambda: personal_data([]), "EMAIL_ADDRESS"),
        (lambda: unsafe(least_probability=2, probability=len), "at most 1"),
        (lambda: duplicates(similarity=0), "above 0"),
    ],
)
def test_settings_out_of_range(make, part):
    with pytest.raises(ValueError, match=part):
        make()
