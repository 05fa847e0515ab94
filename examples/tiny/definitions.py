"""Words → prompts with their definitions, and pairs of which one definition is the word's own.

A prompt is a word and a line break. Of a pair, the better answer is the definition that the dictionary gives to the
word; the other one is what a model wrote for the word, a little too hot, or for every fourth word the definition of
another one.
"""

import keras_hub
import numpy as np

MOST_PROMPT_TOKENS = 8
MOST_NEW_TOKENS = 23
# Prompt, response and an end: what a reward model reads, and what a rollout fills at most.
ROW = MOST_PROMPT_TOKENS + MOST_NEW_TOKENS + 1
DRAWN_FOR_A_WORD = 2
# At 1 its answers are so close to definitions that a judge of its size does not learn the difference.
TEMPERATURE_OF_REJECTED = 1.3
WORDS_FOR_ONE_OF_ANOTHER = 4
ROWS_AT_ONCE = 256
OF_ANOTHER_WORD, WRITTEN_BY_A_MODEL = "another word's", "a model's"
KINDS = (OF_ANOTHER_WORD, WRITTEN_BY_A_MODEL)


def prompt_of(word):
    return f"{word.word}\n"


def as_examples(words):
    return {"prompts": [*map(prompt_of, words)], "responses": [word.definition for word in words]}


def fits(word, preprocessor):
    """Whether prompt and definition, its end included, have their room in a row."""
    prompt = len(preprocessor.prompt_ids(prompt_of(word)))
    response = len(preprocessor.tokenizer.encode(word.definition)) + 1
    return prompt <= MOST_PROMPT_TOKENS and response <= MOST_NEW_TOKENS


def write(model, prompts, seed, sampler=None):
    """What a model answers, drawn from all of its distribution unless a sampler says otherwise."""
    sampler = sampler or keras_hub.samplers.RandomSampler(temperature=1.0)
    texts = []
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        part = prompts[start : start + ROWS_AT_ONCE]
        options = dict(max_new_tokens=MOST_NEW_TOKENS, sampler=sampler, seed=seed + start, strip_prompt=True)
        texts += model.generate(part, **options)
    return texts


def pairs_of(words, model, seed):
    """Pairs for `GemmaRewardModel.fit`, one a word.

    Args:
        words: list of `Word`, in no order of meaning or length.
        model: the `GemmaCausalLM` that writes the definitions which are none.
        seed: int.

    Returns:
        A list of dicts `{"prompts", "chosen", "rejected", "kind"}`.
    """
    of_others = words[::WORDS_FOR_ONE_OF_ANOTHER]
    of_a_model = [word for i, word in enumerate(words) if i % WORDS_FOR_ONE_OF_ANOTHER]
    written = _pairs(of_a_model, written_definitions(of_a_model, model, seed), WRITTEN_BY_A_MODEL)
    return _pairs(of_others, definitions_of_others(of_others), OF_ANOTHER_WORD) + balanced_in_length(written)


def _pairs(words, rejected, kind):
    return [
        {"prompts": prompt_of(word), "chosen": word.definition, "rejected": answer, "kind": kind}
        for word, answer in zip(words, rejected)
        if answer
    ]


def definitions_of_others(words):
    """For each word the definition of one of the same part of speech and about the same length.

    Words that are neighbours by part of speech and length exchange their definitions. So every definition is rejected
    as often as it is chosen, and nothing in it tells which it is. The empty string where there is no neighbour, or
    one with the same definition.
    """
    order = sorted(range(len(words)), key=lambda i: (words[i].part_of_speech, len(words[i].definition)))
    found = [""] * len(words)
    for i, j in zip(order[0::2], order[1::2]):
        one, other = words[i], words[j]
        if one.part_of_speech == other.part_of_speech and one.definition != other.definition:
            found[i], found[j] = other.definition, one.definition
    return found


def written_definitions(words, model, seed):
    """For each word what a model wrote for it: of two that came to an end, the one whose length is nearer."""
    prompts = [prompt_of(word) for word in words]
    hot = keras_hub.samplers.RandomSampler(temperature=TEMPERATURE_OF_REJECTED)
    drawn = [write(model, prompts, seed + 1_000_003 * n, hot) for n in range(DRAWN_FOR_A_WORD)]
    return [_nearest_in_length(word, texts, model.preprocessor.tokenizer) for word, texts in zip(words, zip(*drawn))]


def _nearest_in_length(word, texts, tokenizer):
    """The empty string where no text will do."""
    length = len(tokenizer.encode(word.definition))
    lengths = {text.strip(): len(tokenizer.encode(text)) for text in texts}
    usable = [text for text in lengths if text and text != word.definition and lengths[text] < MOST_NEW_TOKENS - 1]
    return min(usable, key=lambda text: abs(lengths[text] - length), default="")


def balanced_in_length(pairs):
    """As many pairs whose better answer is the longer one as such where it is the shorter one.

    Of the side that has more, the pairs with the largest differences are left out.
    """
    ahead = [len(pair["chosen"]) - len(pair["rejected"]) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: ahead[i])
    surplus = sum(difference < 0 for difference in ahead) - sum(difference > 0 for difference in ahead)
    kept = order[surplus:] if surplus > 0 else order[: len(order) + surplus]
    return [pairs[i] for i in sorted(kept)]


def share_longer(pairs):
    """How often the better answer has more characters, half of the equal ones included: 0.5 if length tells nothing."""
    ahead = [np.sign(len(pair["chosen"]) - len(pair["rejected"])) for pair in pairs]
    return float(np.mean(ahead) / 2 + 0.5)


def habits(texts):
    """Mean words of a text, how many different texts there are for each, and the share of those that repeat themselves.

    A text repeats itself where three words in a row come twice in it.
    """
    return {
        "words": float(np.mean([len(text.split()) for text in texts])),
        "different": len(set(texts)) / len(texts),
        "repeating": float(np.mean([repeats_itself(text) for text in texts])),
    }


def repeats_itself(text):
    words = text.split()
    runs = [*zip(words, words[1:], words[2:])]
    return len(set(runs)) < len(runs)
