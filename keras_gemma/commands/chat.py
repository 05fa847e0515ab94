"""`keras-gemma chat`: a dialogue in the terminal, or one message a line from a pipe."""

import argparse
import contextlib
import difflib
import json
import os
import sys
from pathlib import Path

from keras_gemma.commands import checks
from keras_gemma.commands.arguments import SAMPLERS
from keras_gemma.commands.arguments import add_command
from keras_gemma.commands.arguments import add_model_options
from keras_gemma.commands.arguments import add_sampling_options
from keras_gemma.commands.arguments import load_model
from keras_gemma.commands.arguments import not_negative_float
from keras_gemma.commands.arguments import positive_float
from keras_gemma.commands.arguments import positive_int
from keras_gemma.commands.arguments import sampling_options
from keras_gemma.commands.arguments import seed
from keras_gemma.commands.arguments import share
from keras_gemma.commands.failures import in_one_line
from keras_gemma.commands.failures import sentence_of
from keras_gemma.staging import write_file

HELP = """\
  /help             this list
  /reset            forget the dialogue
  /retry            answer the last message again
  /system TEXT      instructions that stand before the first message; /system alone removes them
  /settings         show the settings; /settings NAME VALUE changes one, /settings NAME resets it
  /save FILE        write the dialogue as JSON
  /load FILE        go on with a saved dialogue
  /quit             end (so does Ctrl-D)
Ctrl-C stops an answer and keeps the dialogue. Pasted lines are one message."""
COMMANDS = [line.split()[0] for line in HELP.splitlines() if line.startswith("  /")]
# What `/settings` changes, and how text becomes a value.
SETTINGS = {
    "max_new_tokens": positive_int,
    "temperature": not_negative_float,
    "top_k": positive_int,
    "top_p": share,
    "min_p": share,
    "repetition_penalty": positive_float,
    "seed": seed,
    "sampler": str,
}


def add(commands):
    parser = add_command(
        commands,
        "chat",
        run,
        help="hold a dialogue",
        description="Holds a dialogue in the terminal. From a pipe, every line is a message.",
        epilog=f"commands inside the dialogue:\n{HELP}\n\n"
        "Instruction-tuned presets answer; any other preset merely continues the text.",
    )
    add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="instructions that stand before the first message")
    add_sampling_options(parser)


def run(args):
    sampling_options(args)
    checks.check_preset(args.preset)
    terminal = InteractiveTerminal() if sys.stdin.isatty() and sys.stdout.isatty() else Pipe()
    with terminal.waiting(f"loading {args.preset}"):
        model = load_model(args)
        if model.preprocessor is None:
            raise ValueError(f"{args.preset} has no tokenizer. `keras-gemma convert ... --tokenizer FILE` adds one.")
        # From here on no message compiles anything, whatever its length.
        model.engine.fix_sizes(model.preprocessor.sequence_length)
    terminal.note(f"{args.preset} listens. /help lists the commands, /quit ends.")
    converse(Dialogue(model, args), terminal)


def converse(dialogue, terminal):
    """Reads messages and commands, and answers them, until the input ends or `/quit`."""
    while (line := terminal.read()) is not None:
        text = line.strip()
        if text == "/quit":
            return
        try:
            if is_command(text):
                obey(text, dialogue, terminal)
            elif text:
                answer(dialogue, text, terminal)
        # The dialogue is worth more than the message that could not be answered.
        except Exception as error:
            terminal.complain(sentence_of(error))


def answer(dialogue, text, terminal):
    """Streams the reply to a message. Ctrl-C stops it; what was written until then stays."""
    pieces = dialogue.ask(text)
    reply = []
    try:
        with contextlib.closing(pieces):
            with terminal.waiting("thinking"):
                reply.extend(piece for piece in [next(pieces, None)] if piece is not None)
            terminal.begin_reply("".join(reply))
            for piece in pieces:
                reply.append(piece)
                terminal.write(piece)
    except KeyboardInterrupt:
        terminal.end_reply(" (stopped)")
    else:
        terminal.end_reply()
    dialogue.record(text, "".join(reply))


# === The dialogue ===


class Dialogue:
    """Messages, instructions and settings.

    Args:
        model: a `GemmaCausalLM`.
        args: the command's arguments, whose sampling options `set` changes.
    """

    def __init__(self, model, args):
        self.model = model
        self.args = args
        self.initial = dict(vars(args))
        self.system = args.system
        self.messages = []

    def ask(self, text):
        """Yields the reply to a message in pieces. The dialogue stays as it is until `record`."""
        sampling = sampling_options(self.args)
        asked = [*self.messages, {"role": "user", "content": text}]
        return self.model.stream(self._prompt(asked, sampling["max_new_tokens"]), **sampling)

    def record(self, text, reply):
        """Takes a message and its reply into the dialogue; without a reply, neither."""
        reply = reply.strip()
        if reply:
            self.messages += [{"role": "user", "content": text}, {"role": "model", "content": reply}]

    def take_back(self):
        """Removes the last exchange and returns its message, or `None` where there is none."""
        if not self.messages:
            return None
        text = self.messages[-2]["content"]
        self.messages = self.messages[:-2]
        return text

    def set(self, name, value=None):
        """Changes a setting, or puts it back to what the command line said."""
        changed = {**vars(self.args), name: self.initial[name] if value is None else value}
        sampling_options(argparse.Namespace(**changed))
        setattr(self.args, name, changed[name])

    def save(self, path):
        """Writes the dialogue as JSON."""
        content = {"system": self.system, "messages": self.messages}
        write_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def load(self, path):
        """Replaces the dialogue by a saved one, or by a list of messages.

        Raises:
            ValueError: for a file that holds no dialogue.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a JSON file: {error}") from error
        content = {"system": None, "messages": content} if isinstance(content, list) else content
        if not isinstance(content, dict) or not is_dialogue(content.get("messages")):
            raise ValueError(f"{path} holds no dialogue: messages by 'user' and 'model' in turn are expected.")
        self.system, self.messages = content.get("system"), content["messages"]

    def _prompt(self, messages, new_tokens):
        """The dialogue without its oldest exchanges, so that the sequence length leaves room for a reply."""
        room = self.model.preprocessor.sequence_length - new_tokens
        while len(messages) > 2 and len(self.model.preprocessor.prompt_ids(self._instructed(messages))) > room:
            messages = messages[2:]
        return self._instructed(messages)

    def _instructed(self, messages):
        # Gemma 1 has no system role: its instructions stand in the first message.
        if not self.system:
            return messages
        return [{"role": "user", "content": f"{self.system}\n\n{messages[0]['content']}"}, *messages[1:]]


def is_dialogue(messages):
    return (
        isinstance(messages, list)
        and len(messages) % 2 == 0
        and all(
            isinstance(message, dict)
            and message.get("role") in (("user",), ("model", "assistant"))[i % 2]
            and isinstance(message.get("content"), str)
            for i, message in enumerate(messages)
        )
    )


# === Commands inside the dialogue ===


def is_command(text):
    """Whether a message begins with a slash and a word. A path such as `/etc/hosts` is none."""
    word = text.split(maxsplit=1)[0] if text else ""
    return word.startswith("/") and word[1:].isalpha()


def obey(text, dialogue, terminal):
    """Runs a command of the dialogue."""
    word, _, rest = text.partition(" ")
    rest = rest.strip()
    if word == "/help":
        terminal.note(HELP)
    elif word == "/reset":
        dialogue.messages = []
        terminal.note("The dialogue is forgotten.")
    elif word == "/retry":
        _retry(dialogue, terminal)
    elif word == "/system":
        dialogue.system = rest or None
        terminal.note(f"Instructions: {rest}" if rest else "No instructions.")
    elif word == "/settings":
        _settings(rest, dialogue, terminal)
    elif word in ("/save", "/load"):
        _save_or_load(word, rest, dialogue, terminal)
    else:
        closest = difflib.get_close_matches(word, COMMANDS, n=1)
        hint = f" Did you mean {closest[0]}?" if closest else " /help lists the commands."
        terminal.complain(f"No command {word}.{hint} A message cannot begin with a slash and a word.")


def _retry(dialogue, terminal):
    before = dialogue.messages
    text = dialogue.take_back()
    if text is None:
        terminal.complain("There is no message to answer again.")
        return
    try:
        answer(dialogue, text, terminal)
    except Exception:
        dialogue.messages = before
        raise


def _settings(rest, dialogue, terminal):
    name, _, value = rest.partition(" ")
    name = name.replace("-", "_")
    if name and name not in SETTINGS:
        raise ValueError(f"No setting {name!r}. Settings are {', '.join(SETTINGS)}.")
    if name:
        dialogue.set(name, _setting(name, value.strip()) if value.strip() else None)
    shown = {name: getattr(dialogue.args, name) for name in SETTINGS}
    lines = [f"  {name:20}{'default' if value is None else value}" for name, value in shown.items()]
    terminal.note("\n".join(lines))


def _setting(name, text):
    if name == "sampler" and text not in SAMPLERS:
        raise ValueError(f"Samplers are {', '.join(SAMPLERS)}. Received: {text!r}")
    try:
        return SETTINGS[name](text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{name} {error}.") from None
    except ValueError:
        raise ValueError(f"{name} must be a whole number, received {text!r}.") from None


def _save_or_load(word, path, dialogue, terminal):
    if not path:
        raise ValueError(f"{word} takes a file: {word} dialogue.json")
    path = os.path.expanduser(path)
    if word == "/save":
        dialogue.save(path)
        terminal.note(f"{len(dialogue.messages)} messages saved to {path}.")
    else:
        dialogue.load(path)
        terminal.note(f"{len(dialogue.messages)} messages loaded from {path}.")


# === Terminals ===


class Pipe:
    """Messages from a pipe or file, replies to one: nothing but text."""

    def read(self):
        try:
            return input()
        except (EOFError, KeyboardInterrupt):
            return None

    def begin_reply(self, text):
        self.write(text)

    def write(self, text):
        sys.stdout.write(text)
        sys.stdout.flush()

    def end_reply(self, said=""):
        self.write(f"{said}\n")

    def note(self, text):
        pass

    def complain(self, text):
        print(f"keras-gemma: {in_one_line(text)}", file=sys.stderr)

    def waiting(self, what):
        return contextlib.nullcontext()


class InteractiveTerminal(Pipe):
    """A person's terminal: line editing with a history, labels in colour, a spinner while nothing comes."""

    def __init__(self, session=None):
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._session = session or _prompt_session()

    def read(self):
        from prompt_toolkit.formatted_text import FormattedText

        while True:
            try:
                return self._session.prompt(FormattedText([("bold ansicyan", "you> ")]))
            except KeyboardInterrupt:
                self.note("Ctrl-D or /quit ends.")
            except EOFError:
                return None

    def begin_reply(self, text):
        self._console.print("[bold green]gemma>[/] ", end="")
        self.write(text)

    def note(self, text):
        self._console.print(text, style="dim", markup=False)

    def complain(self, text):
        self._console.print(in_one_line(text), style="red", markup=False)

    def waiting(self, what):
        return self._console.status(f"[dim]{what} …[/]")


def _prompt_session():
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.history import InMemoryHistory

    folder = Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")).expanduser() / "keras_gemma"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        history = FileHistory(str(folder / "chat_history"))
    except OSError:
        history = InMemoryHistory()
    return PromptSession(history=history)
