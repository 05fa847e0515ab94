"""Records whose fields other tools have named → the fields of `fit`, tuning, pairs and prompts.

    TRL        prompt, completion · messages · prompt, chosen, rejected · chosen, rejected
    Alpaca     instruction, input, output              Dolly: instruction, context, response
    ShareGPT   conversations, a list of {"from", "value"}
        ↓
    prompts, responses · messages · prompts, chosen, rejected, margins

Records in our own fields pass as they are. Of the others, fields that are not named here are left aside: published data
sets have them.
"""

from keras_gemma.data import text_checks

ROLES_OF_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
CONVERSATIONS = ("conversations", "conversation")
INPUTS, OUTPUTS = ("input", "context"), ("output", "response")
KNOWN = (
    "fields of TRL (prompt and completion, messages), Alpaca (instruction, input, output) and ShareGPT (conversations) "
    "are read as well"
)


# === Messages ===


def is_message(value):
    """Whether a value is a message: `{"role", "content"}`, or `{"from", "value"}` as in ShareGPT."""
    return isinstance(value, dict) and ("role" in value or {"from", "value"} <= set(value))


def is_dialogue(value):
    """Whether a value is a list of messages."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and is_message(value[0])


def messages(value):
    """A list of messages with `role` and `content`; anything else as it is.

    Example:

    >>> from keras_gemma.data.record_formats import messages
    >>> messages([{"from": "human", "value": "Who?"}])
    [{'role': 'user', 'content': 'Who?'}]
    """
    return [_message(one) for one in value] if is_dialogue(value) else value


def _message(message):
    if not is_message(message) or "role" in message:
        return message
    speaker = message["from"]
    role = ROLES_OF_SHAREGPT.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": message["value"]}


def answer_of(value):
    """An answer as text: of the one message of the model, which may stand in a list; anything else as it is.

    Raises:
        ValueError: for several messages, and one by somebody else.
    """
    if not is_message(value) and not is_dialogue(value):
        return value
    said = messages([value] if is_message(value) else value)
    if len(said) != 1 or said[0].get("role") not in ("assistant", "model"):
        roles = ", ".join(repr(message.get("role")) for message in said)
        raise ValueError(f"An answer is a string, or one message of the assistant. Received messages by: {roles}")
    return said[0].get("content")


# === Tuning ===


def tuning_fields(fields):
    """The fields of an example to tune on, or of a batch of them as columns.

    Args:
        fields: dict of the values of one record, or of lists of them.

    Returns:
        A dict with `prompts` and `responses`, or with `messages`; `fields` itself where it has none of the formats.

    Raises:
        ValueError: for a record that lacks a field of its format, and columns of different lengths, naming them.

    Example:

    >>> from keras_gemma.data.record_formats import tuning_fields
    >>> tuning_fields({"prompt": "2+2=", "completion": "4", "id": 7})
    {'prompts': '2+2=', 'responses': '4'}
    >>> tuning_fields({"instruction": "Add.", "input": "2, 2", "output": "4"})["messages"][0]
    {'role': 'user', 'content': 'Add.\\n\\n2, 2'}
    """
    if "prompts" in fields:
        return fields
    # Tables have a null where a row goes without a field of others.
    names = {name for name, value in fields.items() if not text_checks.is_missing(value)}
    if "messages" in names:
        return {"messages": _each(messages, fields, ["messages"])}
    for name in CONVERSATIONS:
        if name in names:
            return {"messages": _each(messages, fields, [name])}
    if "instruction" in names:
        return {"messages": _each(_instructed, fields, ["instruction", *_instruction_fields(names)])}
    if "completion" in names:
        return _prompt_and_completion(fields)
    return {"prompts": fields["prompt"]} if names == {"prompt"} else fields


def _instruction_fields(names):
    given = [next((name for name in choice if name in names), None) for choice in (OUTPUTS, INPUTS)]
    if given[0] is None:
        raise ValueError(
            "Records of Alpaca have 'instruction' and 'output', and may have 'input' (Dolly: 'response', 'context'). "
            f"'output' is missing. Received: {', '.join(map(repr, sorted(names)))}"
        )
    return [name for name in given if name is not None]


def _instructed(instruction, output, context=None):
    # Bytes are what `tf.data` gives.
    instruction, context = (one.decode("utf-8") if isinstance(one, bytes) else one for one in (instruction, context))
    asked = f"{instruction}\n\n{context}" if isinstance(context, str) and context.strip() else instruction
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]


def _prompt_and_completion(fields):
    if "prompt" not in fields:
        raise ValueError(f"A 'completion' needs its 'prompt'. Received: {', '.join(map(repr, fields))}")
    if "label" in fields:
        raise ValueError(
            "Completions with a 'label' are good or bad ones: leave the bad ones and the field out to learn from the "
            "others. Received: 'prompt', 'completion' and 'label'"
        )
    both = _each(_answered, fields, ["prompt", "completion"])
    if isinstance(both, tuple):
        return dict(zip(("prompts", "responses"), both))
    return {"prompts": [prompt for prompt, _ in both], "responses": [answer for _, answer in both]}


def _answered(prompt, completion):
    """A prompt and the answer to it; a string that messages answer is a user's message."""
    answer = answer_of(completion)
    if answer is not completion and not is_dialogue(prompt):
        prompt = [{"role": "user", "content": prompt}]
    return messages(prompt), answer


def _each(function, fields, names):
    """What a function makes of one record's values, or a list of what it makes of each row of columns."""
    values = [fields[name] for name in names]
    if not all(_is_column(value) for value in values):
        return function(*values)
    lengths = {name: len(fields[name]) for name in names}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"Every field needs as many examples. Received: {lengths}")
    return [function(*row) for row in zip(*values)]


def _is_column(value):
    if isinstance(value, (str, bytes, dict)) or is_dialogue(value):
        return False
    return hasattr(value, "__len__") and getattr(value, "shape", None) != ()


# === Pairs ===


def pair(record):
    """A pair of answers with its prompt, whether or not the answers repeat it.

    Args:
        record: a dict. `chosen` and `rejected` are strings or messages; the prompt is a string or messages, or what
            both answers begin with. Messages may repeat the prompt.

    Returns:
        A dict with `prompts`, `chosen` and `rejected` (strings), and `margins` where there are any; `record` itself
        where it has no pair.

    Raises:
        ValueError: for answers that share no beginning where there is no prompt, and those of several messages.

    Example:

    >>> from keras_gemma.data.record_formats import pair
    >>> asked, yes, no = ({"role": role, "content": said} for role, said in
    ...                   [("user", "Hi"), ("assistant", "Yo"), ("assistant", "No")])
    >>> pair({"chosen": [asked, yes], "rejected": [asked, no]})
    {'prompts': [{'role': 'user', 'content': 'Hi'}], 'chosen': 'Yo', 'rejected': 'No'}
    >>> pair({"prompt": "The sea is", "chosen": " deep.", "rejected": " is."})["prompts"]
    'The sea is'
    """
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= set(record):
        return record
    prompts = (record.get(name) for name in ("prompts", "prompt", *CONVERSATIONS))
    prompt = next((prompt for prompt in prompts if not text_checks.is_missing(prompt)), None)
    prompt, chosen, rejected = messages(prompt), messages(record["chosen"]), messages(record["rejected"])
    if is_dialogue(chosen) and is_dialogue(rejected):
        prompt, chosen, rejected = _without_repeated_prompt(prompt, chosen, rejected)
    elif prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _cut_behind_common_words(chosen, rejected)
    elif prompt is None:
        return record
    if isinstance(prompt, str) and (is_dialogue(chosen) or is_message(chosen)):
        prompt = [{"role": "user", "content": prompt}]
    answers = {"prompts": prompt, "chosen": answer_of(chosen), "rejected": answer_of(rejected)}
    margins = [record[name] for name in ("margins", "margin") if name in record]
    return {**answers, "margins": margins[0]} if margins else answers


def _without_repeated_prompt(prompt, chosen, rejected):
    """The prompt, and the messages behind it."""
    shared = 0
    # The last message is an answer, even where both are equal.
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    repeated = chosen[:shared]
    if not repeated:
        if prompt is None:
            raise ValueError(
                "A pair has a 'prompt', or 'chosen' and 'rejected' begin with the same messages. Received neither"
            )
        return prompt, chosen, rejected
    # A prompt in front that the answers go on from, or the same once more.
    goes_on = is_dialogue(prompt) and list(prompt) != repeated[: len(prompt)]
    return [*prompt, *repeated] if goes_on else repeated, chosen[shared:], rejected[shared:]


def _cut_behind_common_words(chosen, rejected):
    """The beginning that two texts share, up to their last common white space, and what is left of them."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    last_space = max((place for place in range(shared) if chosen[place].isspace()), default=0)
    # White space belongs to the word behind it, and no word is cut.
    end = len(chosen[:last_space].rstrip())
    if not end:
        raise ValueError(
            "A pair has a 'prompt', or 'chosen' and 'rejected' begin with the same words. Received neither"
        )
    return chosen[:end], chosen[end:], rejected[end:]


def pair_columns(fields):
    """As `pair`, of a batch of pairs as columns; anything else as it is."""
    if not isinstance(fields, dict) or not {"chosen", "rejected"} <= set(fields):
        return fields
    if "prompts" in fields and not _has_messages(fields):
        return fields
    if any(isinstance(value, (str, bytes, dict)) or not hasattr(value, "__len__") for value in fields.values()):
        return fields
    return columns_of([pair(record) for record in records_of_columns(fields)])


def _has_messages(fields):
    columns = (fields[name] for name in ("chosen", "rejected") if isinstance(fields[name], list))
    return any(is_dialogue(value) or is_message(value) for column in columns for value in column)


def records_of_columns(columns):
    """Rows of columns, a list of dicts.

    Raises:
        ValueError: for columns of different lengths.
    """
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Every field needs as many examples. Received: {lengths}")
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def columns_of(records):
    """Records as columns, a dict of lists.

    Raises:
        ValueError: for records of different fields.
    """
    for number, record in enumerate(records):
        if set(record) != set(records[0]):
            raise ValueError(
                "Records have the same fields. "
                f"Received: {sorted(records[0])}, and {sorted(record)} for number {number}"
            )
    return {name: [record[name] for record in records] for name in records[0]}


# === Prompts ===


def prompts_and_columns(prompts):
    """Prompts, and what else is known of each.

    Args:
        prompts: a list of strings or dialogues, a list of records with `prompt` (or `prompts`) and further fields, or
            a dict of such columns.

    Returns:
        A list of strings and dialogues, and a dict of lists, the further fields.

    Raises:
        ValueError: for records without a prompt, or with different fields.

    Example:

    >>> from keras_gemma.data.record_formats import prompts_and_columns
    >>> prompts_and_columns([{"prompt": "2+2=", "answer": "4"}, {"prompt": "1+1=", "answer": "2"}])
    (['2+2=', '1+1='], {'answer': ['4', '2']})
    """
    if is_dialogue(prompts):
        raise ValueError("A list of dialogues is expected. Received a single dialogue: wrap it in a list.")
    if isinstance(prompts, dict):
        columns = columns_of(records_of_columns(prompts)) if prompts else {}
    elif isinstance(prompts, (list, tuple)) and prompts and all(isinstance(one, dict) for one in prompts):
        columns = columns_of(list(prompts))
    else:
        return prompts if not isinstance(prompts, (list, tuple)) else [messages(one) for one in prompts], {}
    names = [name for name in ("prompt", "prompts") if name in columns]
    if len(names) != 1:
        raise ValueError(
            "A record to answer has one field 'prompt', and further ones for the reward. "
            f"Received: {', '.join(map(repr, columns)) or 'no fields'}"
        )
    return [messages(one) for one in columns.pop(names[0])], columns
