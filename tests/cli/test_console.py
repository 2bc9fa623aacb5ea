"""What the commands show: tints, summaries, and no control character."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from detox_guard.cli.compare import BETTER, Pair, Side, summary
from detox_guard.cli.console import tinted, visible
from detox_guard.cli.session import Exchange
from detox_guard.results import TokenTrace, Trace
from detox_guard.settings import DecodingParams


def test_visible_leaves_no_control_character() -> None:
    assert visible("a\x1b[31mb\x9bc\x07\td\ne\r") == "a\ufffd[31mb\ufffdc\ufffd\td\ne\ufffd"


def token(text: str, kl: float, replaced: bool) -> TokenTrace:
    return TokenTrace(text, 1, 0.5, 0.5, 0.1, kl, 0.0, False, "x", 2 if replaced else 1, 0.5)


def test_tint_deepens_with_the_steering() -> None:
    trace = Trace((token("calm ", 0.0, True), token("some ", 0.5, False), token("\x1bmuch", float("inf"), True)))
    text = tinted(trace, "")
    assert text.plain == "calm some \ufffdmuch"
    assert [str(span.style) for span in text.spans] == [
        "not underline #1c1b1a on rgb(251,207,168)",
        "underline #1c1b1a on rgb(238,132,52)",
    ]
    console = Console(file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(text)
    assert "48;2;238;132;52" in console.file.getvalue()  # type: ignore[attr-defined]


def test_summary_is_honest() -> None:
    def pair(plain: float, asked: float) -> Pair:
        reply = Exchange("x", DecodingParams())
        return Pair([Side("plain", reply, plain), Side("steered", reply, asked)])

    line = summary([pair(0.8, 0.2), pair(0.3, 0.3 + BETTER / 2), pair(0.1, 0.4)])
    assert "1 of 3 got better, 1 stayed the same, 1 got worse" in line
    assert summary([]) == "Nothing to compare."
