"""Reasons to leave an example of tuning out, as the report names them (arXiv 2403.08295, section "Instruction tuning").

A filter is a function of two strings, what a user says and what the model answers in one example, to the reason to
drop it, or to `None`. `tuning_examples` applies filters and counts; one of one's own is any such function.
"""

import functools
import re
import unicodedata

from keras_gemma.data.extras import required

# What Presidio calls it, and the class that recognises it.
PERSONAL_DATA = {
    "EMAIL_ADDRESS": "EmailRecognizer",
    "PHONE_NUMBER": "PhoneRecognizer",
    "CREDIT_CARD": "CreditCardRecognizer",
    "IBAN_CODE": "IbanRecognizer",
    "IP_ADDRESS": "IpRecognizer",
    "US_SSN": "UsSsnRecognizer",
}
OTHER_ASSISTANTS = (
    "ChatGPT", "GPT", "Claude", "Bard", "LLaMA", "Llama", "Mistral", "Qwen", "DeepSeek", "Alpaca", "Vicuna", "Copilot",
    "Grok", "Alexa", "Siri",
)  # fmt: skip
OTHER_MAKERS = ("OpenAI", "Anthropic", "Meta", "Meta AI", "Microsoft", "Mistral AI", "Alibaba", "DeepSeek", "xAI")
MADE = "(?:made|created|built|developed|trained|designed)"
EXTRA = "filters"
WORD = re.compile(r"\w+")


def personal_data(entities=tuple(PERSONAL_DATA), least_score=0.4):
    """Finds what belongs to one person, by patterns and check sums (Presidio's recognisers).

    Args:
        entities: which of `PERSONAL_DATA` to look for.
        least_score: float from 0 to 1, how sure a recogniser must be. 0.4 takes a phone number by its digits.

    Returns:
        A filter; its reason is such as `"personal data (EMAIL_ADDRESS)"`.

    Raises:
        ValueError: for unknown entities.
        ImportError: without the extra `filters`.

    Example:

    >>> from keras_gemma.data import personal_data
    >>> personal_data()("Who wrote this?", "Ask jane@example.com.")
    'personal data (EMAIL_ADDRESS)'
    """
    unknown = set(entities) - set(PERSONAL_DATA)
    if unknown or not entities:
        raise ValueError(f"`entities` are some of {', '.join(PERSONAL_DATA)}. Received: {entities!r}")
    recognizers = {entity: _recognizer(entity) for entity in entities}

    def reason(said, answered):
        for entity, recognizer in recognizers.items():
            found = recognizer.analyze(f"{said}\n{answered}", [entity], None)
            if any(one.score >= least_score for one in found):
                return f"personal data ({entity})"
        return None

    return reason


def _recognizer(entity):
    kinds = required("presidio_analyzer.predefined_recognizers", EXTRA)
    recognizer = getattr(kinds, PERSONAL_DATA[entity])()
    if entity == "EMAIL_ADDRESS":
        # Presidio itself would download the list of top-level domains; the one that comes with the package serves.
        domains = required("tldextract", EXTRA).TLDExtract(suffix_list_urls=())
        recognizer.validate_result = lambda text: bool(domains(text).top_domain_under_public_suffix)
    return recognizer


def unsafe(least_probability=0.8, probability=None):
    """Finds insults, obscenities and threats.

    Args:
        least_probability: float from 0 to 1, from which on an example is dropped.
        probability: callable from a text to the probability that it is unsafe. By default the linear classifier of
            alt-profanity-check, which knows English, and mistakes single words such as those of a dictionary; for work
            that counts pass a better one.

    Returns:
        A filter; its reason is `"unsafe"`.

    Raises:
        ValueError: for a probability that is none.
        ImportError: for the classifier without the extra `filters`.

    Example:

    >>> from keras_gemma.data import unsafe
    >>> unsafe(probability=lambda text: float("idiot" in text))("What am I?", "An idiot.")
    'unsafe'
    """
    if not 0 < least_probability <= 1:
        raise ValueError(f"`least_probability` is above 0 and at most 1. Received: {least_probability}")
    probability = probability or _probability_of_profanity()

    def reason(said, answered):
        for text in (said, answered):
            if text and probability(text) >= least_probability:
                return "unsafe"
        return None

    return reason


def _probability_of_profanity():
    predict = required("profanity_check", EXTRA).predict_prob
    return lambda text: float(predict([text])[0])


def mistaken_identity(assistants=OTHER_ASSISTANTS, makers=OTHER_MAKERS):
    """Finds answers in which the model takes itself for another one, or says that someone else made it.

    Args:
        assistants: names that the model does not bear.
        makers: names of those who did not make it.

    Returns:
        A filter; its reason is `"mistaken self-identification"`. It reads answers only.

    Example:

    >>> from keras_gemma.data import mistaken_identity
    >>> mistaken_identity()("Who are you?", "I'm ChatGPT, a large language model trained by OpenAI.")
    'mistaken self-identification'
    >>> mistaken_identity()("Who made ChatGPT?", "ChatGPT was made by OpenAI.")
    """
    name, maker = _any_of(assistants), _any_of(makers)
    claims = [
        rf"\bI(?:'m| am|’m)(?: called| named)? (?:an? |the )?{name}",
        rf"\bmy name is {name}",
        rf"\b(?:call me|this is) {name}",
        rf"\bAs (?:an? )?{name}\b[^.!?]{{0,60}},\s*I\b",
        rf"\bI(?:'m| am|’m| was| have been)\b[^.!?]{{0,80}}\b{MADE} by {maker}",
        rf"\b{maker} {MADE} me\b",
        rf"\bAs (?:an? )?[^.!?]{{0,60}}\b{MADE} by {maker}\b[^.!?]{{0,60}}, I\b",
    ]
    pattern = re.compile("|".join(claims), re.IGNORECASE)
    return lambda said, answered: "mistaken self-identification" if pattern.search(answered) else None


def _any_of(names):
    return rf"(?:{'|'.join(re.escape(name) for name in sorted(names, key=len, reverse=True))})(?!\w)"


def duplicates(similarity=0.8, words=3, permutations=128):
    """Finds examples that are like an earlier one, whatever their case, punctuation and white space.

    The filter remembers: what it is used on first is kept. Used on validation data first and then on training data, it
    keeps the two apart.

    Args:
        similarity: float above 0, the part of their sequences of words that two examples share (Jaccard), estimated by
            MinHash (Broder 1997). 1 drops those alone whose words are all the same in the same order.
        words: int, how many make up a sequence.
        permutations: int. The more, the better the estimate.

    Returns:
        A filter; its reason is `"duplicate"`.

    Raises:
        ValueError: for a similarity outside its range.
        ImportError: below a similarity of 1 without the extra `filters`.

    Example:

    >>> from keras_gemma.data import duplicates
    >>> is_new = duplicates(similarity=1.0)
    >>> is_new("Name a colour.", "Blue."), is_new("name a  colour", "Blue!"), is_new("Name a colour.", "Red.")
    (None, 'duplicate', None)
    """
    if not 0 < similarity <= 1:
        raise ValueError(f"`similarity` is above 0 and at most 1. Received: {similarity}")
    seen = set()
    alike = None if similarity == 1 else _MinHashes(similarity, words, permutations)

    def reason(said, answered):
        text = tuple(WORD.findall(_plain(said))), tuple(WORD.findall(_plain(answered)))
        if text in seen or (alike is not None and alike.seen_or_added(text[0] + text[1])):
            return "duplicate"
        seen.add(text)
        return None

    return reason


class _MinHashes:
    """Signatures of texts, `[permutations]` each, and which of them are alike."""

    def __init__(self, similarity, words, permutations):
        datasketch = required("datasketch", EXTRA)
        self._words = words
        self._similarity = similarity
        self._index = datasketch.MinHashLSH(threshold=similarity, num_perm=permutations)
        self._empty = functools.partial(datasketch.MinHash, num_perm=permutations)
        self._signatures = []

    def seen_or_added(self, text):
        """Whether a sequence of words is like one that was added; if not, adds it."""
        signature = self._empty()
        last = max(1, len(text) - self._words + 1)
        signature.update_batch([" ".join(text[i : i + self._words]).encode() for i in range(last)])
        # The index knows candidates only.
        candidates = (self._signatures[number] for number in self._index.query(signature))
        if any(one.jaccard(signature) >= self._similarity for one in candidates):
            return True
        self._index.insert(len(self._signatures), signature)
        self._signatures.append(signature)
        return False


def _plain(text):
    return unicodedata.normalize("NFKC", text).casefold()
