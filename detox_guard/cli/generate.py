"""`detox-guard generate`: prompts in, replies out, streamed, as a batch, as JSON, or beside the plain model's.

Knows options and what is printed; leaves decoding to `detox_guard.cli.session`.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path  # noqa: TC003  (typer reads annotations when it runs)
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detox_guard._files import prepare_file, write_whole
from detox_guard.cli import options, session
from detox_guard.cli.compare import Pair, make_pairs, score_pairs, show_pairs, summary, trace_sections
from detox_guard.cli.console import (
    exit_code,
    print_json,
    report,
    score_text,
    stderr_console,
    stdout_console,
    tinted,
    visible,
)
from detox_guard.cli.prompts import as_chat, messages_of, prompt_text, read_prompts
from detox_guard.errors import DetoxGuardError
from detox_guard.settings import DecodingParams
from detox_guard.text.prompts import with_template_kwargs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.cli.session import Exchange
    from detox_guard.detoxigen import DetoxiGen
    from detox_guard.scorers.base import ToxicityScorer

__all__ = ["generate"]


@options.decoding_options
@options.loading_options
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help='Prompts; "-" is stdin, as is a pipe.')] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help='A prompt a line, or .jsonl with "prompt" or "messages".')
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send each prompt as a user message.")] = False,
    system: Annotated[str | None, typer.Option(help="System message; implies --chat.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also the plain model's reply; with a guard, steering alone too.")
    ] = False,
    score: Annotated[bool, typer.Option("--score", help="Score the replies for toxicity.")] = False,
    scorer: Annotated[
        str | None, typer.Option(help="Hugging Face classifier instead of the embedded scorer; implies --score.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Write an HTML page that shows every token's steering.")] = None,
    template_kwarg: options.TemplateKwargs = None,
    as_json: options.Json = False,
    with_trace: Annotated[bool, typer.Option("--with-trace", help="Every token's figures in the JSON.")] = False,
    model: options.Model = None,
    detoxifier: options.Detoxifiers = None,
    with_guard: options.Guard = False,
    guard_threshold: options.GuardThreshold = None,
    audit_log: options.AuditLog = None,
    **fields: Any,
) -> None:
    """Complete prompts, or answer them with --chat, steered away from toxicity.

    One prompt streams. Several are decoded together and printed in order; one that fails does not hurt the others.
    """
    if not prompts and file is None and session.stdin_is_terminal():
        raise typer.BadParameter("give prompts, a --file, or pipe them in", param_hint="PROMPTS")
    policy = options.guard_policy(with_guard, guard_threshold, audit_log)
    loading = options.loading(fields)
    params = DecodingParams(**options.given(fields), guard=policy)
    params = params.replace(trace=params.trace and (compare or with_trace or trace is not None))
    if with_trace and not as_json:
        raise typer.BadParameter("needs --json", param_hint="--with-trace")
    variables = options.template_kwargs(template_kwarg)
    wanted = read_prompts(prompts or [], file)
    if trace is not None:
        prepare_file(trace)
    rater = session.load_named_scorer(scorer) if score or scorer or compare else None
    loaded = session.load_model(
        model,
        detoxifier,
        steered=params.alpha > 0 or policy is not None,
        **loading,
    )
    pairs = []
    for prompt in wanted:
        own = params if params.seed is not None else params.replace(seed=session.draw_seed())
        broken = prompt if isinstance(prompt, DetoxGuardError) else None
        text = "" if isinstance(prompt, DetoxGuardError) else prompt
        asked = as_chat(text, system) if chat or system is not None else text
        pair = make_pairs([asked if broken else with_template_kwargs(asked, variables)], [own])[0]
        for reply in pair.replies:
            reply.error = broken
        pairs.append(pair)
    with loaded:
        try:
            if len(pairs) == 1 and not compare and not as_json and not pairs[0].asked.reply.done:
                _stream(loaded, pairs[0].asked.reply, rater)
            else:
                _batch(loaded, pairs, rater, compare=compare, as_json=as_json, with_trace=with_trace)
        finally:  # after a Ctrl-C too: what was decoded is worth its page
            if trace is not None:
                _write_page(trace, pairs, compare)
    _finish(pairs, compare)


def _stream(model: DetoxiGen, reply: Exchange, scorer: ToxicityScorer | None) -> None:
    """Print the text while it is decoded; on a terminal behind its prompt, with the figures below."""
    terminal = sys.stdout.isatty()
    console = stdout_console()
    if terminal:
        plain_text = isinstance(reply.prompt, str)
        console.print(visible(prompt_text(reply.prompt)), style="dim", markup=False, end="" if plain_text else "\n")
    try:
        with closing(model.stream(reply.prompt, reply.params)) as chunks:
            for chunk in chunks:
                reply.text += chunk.text
                reply.generation = chunk.generation
                sys.stdout.write(visible(chunk.text) if terminal else chunk.text)
                sys.stdout.flush()
    except DetoxGuardError as error:
        reply.error = error
    finally:
        if terminal or reply.text:
            print(flush=True)
    if reply.generation is None:
        return
    if terminal or scorer is not None:
        stderr_console().print(_facts(reply, _score(scorer, reply)))


def _batch(
    model: DetoxiGen,
    pairs: Sequence[Pair],
    scorer: ToxicityScorer | None,
    *,
    compare: bool,
    as_json: bool,
    with_trace: bool,
) -> None:
    """Decode all together; print each as soon as it and those before it are done, and on Ctrl-C what there is."""
    console = stdout_console()
    owner = {id(pair.asked.reply): pair for pair in pairs}
    replies = [reply for pair in pairs for reply in (pair.replies if compare else [pair.asked.reply])]
    told: set[int] = set()

    def tell(reply: Exchange) -> None:
        pair = owner.get(id(reply))
        if pair is None or id(pair) in told:
            return
        told.add(id(pair))
        if as_json:
            print_json(json.dumps(_record(pair, scorer, compare, with_trace), ensure_ascii=False))
        elif not compare:
            _show(pair.asked.reply, scorer, first=len(told) == 1)

    # A progress bar and text on one terminal would write over each other: there, text comes after the bar.
    at_once = not sys.stdout.isatty()
    try:
        session.run_all(model, replies, on_done=tell if at_once else None)
    finally:
        for pair in pairs:
            tell(pair.asked.reply)
        if compare and not as_json:
            assert scorer is not None, "--compare loads a scorer"
            score_pairs(pairs, scorer)
            show_pairs(console, [p for p in pairs if any(reply.error is None for reply in p.replies)])
            console.print(summary(pairs))


def _show(reply: Exchange, scorer: ToxicityScorer | None, *, first: bool) -> None:
    """One reply of several: on a terminal under its prompt, in a pipe behind an empty line."""
    if reply.error is not None:
        return
    if not sys.stdout.isatty():
        print(("" if first else "\n") + reply.text, flush=True)
        return
    console = stdout_console()
    if not first:
        console.print()
    console.print(visible(prompt_text(reply.prompt)), style="bold italic", markup=False)
    console.print(tinted(reply.generation.trace if reply.generation else None, reply.text))
    console.print(_facts(reply, _score(scorer, reply)))


def _score(scorer: ToxicityScorer | None, reply: Exchange) -> float | None:
    if scorer is None or reply.generation is None:
        return None
    from detox_guard.scorers.base import checked_scores

    return checked_scores(scorer, [reply.text])[0]


def _facts(reply: Exchange, score: float | None) -> Any:
    """`stop · 12 + 40 tokens · seed 7 · toxicity 0.02 ░░░`."""
    from rich.text import Text

    done = reply.generation
    if done is None:
        return Text("cut off", "dim")
    usage = done.usage
    words = f"{done.finish_reason} · {usage.prompt_tokens} + {usage.completion_tokens} tokens · seed {done.seed}"
    if done.interventions:
        words += f" · {len(done.interventions)} interventions, {usage.discarded_tokens} tokens discarded"
    line = Text(words, "dim")
    return line if score is None else Text.assemble(line, (" · toxicity ", "dim"), score_text(score))


def _record(pair: Pair, scorer: ToxicityScorer | None, compare: bool, with_trace: bool) -> dict[str, Any]:
    """The JSON of one prompt: the reply's, and under "plain" and "steered" the others'."""
    asked = pair.asked.reply
    key = "prompt" if isinstance(asked.prompt, str) else "messages"
    record: dict[str, Any] = {key: messages_of(asked.prompt), **_half(asked, scorer, with_trace)}
    if compare:
        record |= {side.name: _half(side.reply, scorer, with_trace) for side in pair.sides[:-1]}
    return record


def _half(reply: Exchange, scorer: ToxicityScorer | None, with_trace: bool) -> dict[str, Any]:
    if reply.error is not None:
        error = reply.error
        return {"error": {"type": type(error).__name__, "message": str(error), "hint": error.hint or None}}
    done = reply.generation
    if done is None:
        return {"text": reply.text, "finish_reason": "interrupted", "seed": reply.params.seed}
    counts = ("prompt_tokens", "completion_tokens", "total_tokens", "discarded_tokens")
    usage = {name: getattr(done.usage, name) for name in counts}
    half: dict[str, Any] = {
        "text": done.text,
        "finish_reason": done.finish_reason,
        "usage": usage,
        "seed": done.seed,
        "alpha": done.steering.alpha,
        "detoxifiers": list(done.steering.detoxifiers),
    }
    if reply.params.guard is not None:
        half["interventions"] = [event.to_dict() for event in done.interventions]
    if scorer is not None:
        half["score"] = _score(scorer, reply)
    if with_trace and done.trace is not None:
        half["trace"] = done.trace.to_dict()
    return half


def _write_page(path: Path, pairs: Sequence[Pair], compare: bool) -> None:
    from detox_guard.html import trace_page

    whole = [pair for pair in pairs if pair.asked.reply.generation is not None]
    if whole:
        sections: Any = trace_sections(whole, compare=compare)
        write_whole(path, trace_page("detox-guard trace", sections))


def _finish(pairs: Sequence[Pair], compare: bool) -> None:
    """Report what failed. A lone prompt gives its error's own exit code; one among several gives 1."""
    failed = []
    for number, pair in enumerate(pairs, 1):
        others = pair.replies if compare else []
        error = next((reply.error for reply in (pair.asked.reply, *others) if reply.error), None)
        if error is not None:
            report(error, f"prompt {number}: " if len(pairs) > 1 else "")
            failed.append(error)
    if failed:
        raise typer.Exit(exit_code(failed[0]) if len(pairs) == 1 else 1)
