"""`detox-guard chat`: a conversation in the terminal. Knows turns, slash commands and Ctrl-C; knows no tokens.

The history is a list of chat messages, laid out by the backbone's own template at every turn.
"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detox_guard.cli import options, session
from detox_guard.cli.compare import make_pairs, pair_table, score_pairs
from detox_guard.cli.console import report, stdout_console, visible
from detox_guard.errors import DetoxGuardError, InvalidParamsError, UnsupportedBackboneError
from detox_guard.settings import DecodingParams
from detox_guard.text.prompts import with_template_kwargs

if TYPE_CHECKING:
    from detox_guard.detoxigen import DetoxiGen
    from detox_guard.results import Intervention
    from detox_guard.text.prompts import Prompt

__all__ = ["chat"]

HELP = """\
/alpha X      strength of the steering from now on; 0 is the plain model
/system TEXT  set the system message (without TEXT: remove it); the conversation starts anew
/reset        forget the conversation
/help         these lines
/quit         end (Ctrl-D too; Ctrl-C stops a reply, or ends at the prompt)"""


@options.decoding_options
@options.loading_options
def chat(
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also show what the plain model would say.")] = False,
    template_kwarg: options.TemplateKwargs = None,
    model: options.Model = None,
    detoxifier: options.Detoxifiers = None,
    with_guard: options.Guard = False,
    guard_threshold: options.GuardThreshold = None,
    audit_log: options.AuditLog = None,
    **fields: Any,
) -> None:
    """Talk with the model. Ctrl-C stops a reply, Ctrl-D or /quit ends; /help lists the commands."""
    taken_back: SimpleQueue[Intervention] = SimpleQueue()
    policy = options.guard_policy(with_guard, guard_threshold, audit_log, on_event=taken_back.put)
    loading = options.loading(fields)
    params = DecodingParams(**options.given(fields), trace=compare, guard=policy)
    variables = options.template_kwargs(template_kwarg)
    loaded = session.load_model(
        model,
        detoxifier,
        steered=params.alpha > 0 or policy is not None,
        **loading,
    )
    with loaded:
        if not loaded.backbone.has_chat_template:
            raise UnsupportedBackboneError(
                f"{loaded.model_id} has no chat template, so it cannot chat",
                hint="take an instruction-tuned model, or complete plain text with: detox-guard generate",
            )
        talk = _Talk(loaded, params, compare, system, taken_back, variables)
        if session.stdin_is_terminal():
            stdout_console().print(f"[dim]{session.visible_name(loaded.model_id)} · α {params.alpha:g} · /help[/]")
        talk.run()
    if talk.failed and not session.stdin_is_terminal():
        raise typer.Exit(1)


@dataclass
class _Talk:
    model: DetoxiGen
    params: DecodingParams
    compare: bool
    system: str | None
    taken_back: SimpleQueue[Intervention] = field(default_factory=SimpleQueue)
    variables: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)
    failed: bool = False

    def run(self) -> None:
        """Read lines until the end; an empty one asks nothing."""
        while (line := _read_line()) is not None:
            if line.startswith("/"):
                if not self._command(line):
                    return
            elif line:
                self._ask(line)

    def _command(self, line: str) -> bool:
        """Obey a slash command; False ends the chat."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/quit", "/exit"):
            return False
        try:
            if name == "/reset":
                self.turns.clear()
                _say("The conversation starts anew.")
            elif name == "/alpha":
                self._set_alpha(rest)
            elif name == "/system":
                self.system = rest or None
                self.turns.clear()
                _say(f"System message {'set' if rest else 'removed'}; the conversation starts anew.")
            elif name == "/help":
                print(HELP)
            else:
                raise InvalidParamsError("command", name, "one of /alpha, /system, /reset, /help, /quit")
        except DetoxGuardError as error:
            self._fail(error)
        return True

    def _set_alpha(self, text: str) -> None:
        try:
            alpha = float(text)
        except ValueError:
            raise InvalidParamsError("alpha", text, "a number, such as /alpha 2") from None
        if alpha > 0 and not self.model.streams:
            raise InvalidParamsError(
                "alpha", alpha, "0, for no detoxifier was loaded", hint="start with --alpha above 0"
            )
        self.params = self.params.replace(alpha=alpha)
        _say(f"α is {alpha:g}.")

    def _ask(self, words: str) -> None:
        """One turn. A reply that was stopped stays in the history as far as it came; one that failed is forgotten."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = with_template_kwargs([*head, *self.turns, {"role": "user", "content": words}], self.variables)
        try:
            text = self._compared(messages) if self.compare else self._streamed(messages)
        except DetoxGuardError as error:
            self._fail(error)
            return
        if text:
            self.turns += [{"role": "user", "content": words}, {"role": "assistant", "content": text}]

    def _streamed(self, messages: Prompt) -> str:
        pieces: list[str] = []
        terminal = sys.stdout.isatty()
        try:
            with closing(self.model.stream(messages, self.params)) as chunks:
                for chunk in chunks:
                    self._note(terminal)
                    pieces.append(chunk.text)
                    sys.stdout.write(visible(chunk.text) if terminal else chunk.text)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            _say(" (stopped)", end="")
        finally:
            print(flush=True)
        return "".join(pieces)

    def _note(self, terminal: bool) -> None:
        """Say dimly, where it happened, that something was taken back."""
        while not self.taken_back.empty():
            event = self.taken_back.get()
            if terminal:
                then = f", again at α {event.next_alpha:g}" if event.next_alpha is not None else f", {event.action}"
                _say(f" ↶ {event.tokens} tokens taken back (score {event.score:.2f}){then} ", end="")

    def _compared(self, messages: Prompt) -> str:
        params = self.params if self.params.seed is not None else self.params.replace(seed=session.draw_seed())
        (pair,) = make_pairs([messages], [params])
        try:
            session.run_all(self.model, pair.replies, words="Replying")
        except KeyboardInterrupt:
            _say("(stopped)")
        for reply in pair.replies[::-1]:
            if reply.error is not None:
                raise reply.error
        score_pairs([pair], session.load_named_scorer(None))
        stdout_console().print(pair_table(pair))
        return pair.asked.reply.text

    def _fail(self, error: DetoxGuardError) -> None:
        self.failed = True
        report(error)


def _read_line() -> str | None:
    """The next line without its ends; None at the end of input."""
    if not session.stdin_is_terminal():
        # What is no UTF-8 is refused as a prompt, by name.
        line = sys.stdin.buffer.readline().decode("utf-8", "surrogateescape")
        return line.strip() if line else None
    try:
        import readline  # arrow keys and history in input()

        # The marks keep readline from counting the colours as columns.
        mark = "\001\033[1m\002› \001\033[0m\002" if readline.__doc__ and sys.stdout.isatty() else "› "
    except ImportError:
        mark = "› "
    try:
        return input(mark).strip()
    except EOFError:
        print()
        return None


def _say(words: str, end: str = "\n") -> None:
    stdout_console().print(words, style="dim", markup=False, end=end)
