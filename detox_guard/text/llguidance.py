"""A grammar compiled over a backbone's tokenizer: which tokens may come next. The only module that calls llguidance."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from detox_guard._forking import in_children, native_work
from detox_guard.errors import InvalidParamsError, StepError
from detox_guard.text.template import template_of
from detox_guard.text.tools import tool_format

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone
    from detox_guard.text.grammar import Grammar

__all__ = ["GrammarConstraint", "compile_grammar"]

# What closes a list, an object or a string, or makes the shortest value, in the order to try them.
_CLOSERS = '}],"0123456789n.'

_tokenizers: WeakKeyDictionary[Backbone, Any] = WeakKeyDictionary()
_lock = threading.Lock()


def _unlock() -> None:
    """In a forked child, whoever held it is not there."""
    global _lock
    _lock = threading.Lock()


in_children(_unlock)


def compile_grammar(grammar: Grammar, backbone: Backbone, max_new_tokens: int) -> GrammarConstraint:
    """A fresh constraint for one reply of at most `max_new_tokens`.

    The first one of a backbone indexes its vocabulary (a third of a second for 50,000 tokens); after that a grammar
    takes some milliseconds. Raises `InvalidParamsError` for `grammar` if llguidance is missing or cannot enforce it, or
    the backbone has no fast tokenizer or no end token.
    """
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise InvalidParamsError(
            "grammar", grammar.kind, "llguidance is not installed", hint="pip install 'detox-guard[grammar]'"
        ) from error
    lark = grammar.lark(tool_format(template_of(backbone)))
    source = json.dumps({"grammars": [{"lark_grammar": lark}]})
    try:
        with native_work():
            tokenizer = _tokenizer(backbone)
            matcher = LLMatcher(tokenizer, source, log_level=0)
            empty = matcher.is_error() or not _mask(matcher, backbone.vocab_size).any()
    except (KeyboardInterrupt, SystemExit, InvalidParamsError):
        raise
    except BaseException as error:  # a panic in native code is no `Exception`
        raise InvalidParamsError("grammar", grammar.body, f"llguidance cannot enforce it: {error}") from error
    if empty:
        reason = " ".join(matcher.get_error().split()) or "no text is of this language"
        raise InvalidParamsError("grammar", grammar.body, f"llguidance cannot enforce it: {reason}")
    return GrammarConstraint(matcher, tokenizer, backbone.vocab_size, max_new_tokens)


def _tokenizer(backbone: Backbone) -> Any:
    from llguidance import LLTokenizer

    with _lock:
        if backbone not in _tokenizers:
            fast = getattr(backbone.tokenizer, "backend_tokenizer", None)
            if fast is None or not backbone.eos_token_ids:
                lacks = "fast tokenizer" if fast is None else "end token"
                raise InvalidParamsError("grammar", backbone.id, f"this backbone has no {lacks}")
            raw = type(fast).from_str(fast.to_str())  # a copy: padding and truncation are the caller's
            raw.no_padding()
            raw.no_truncation()
            size = max(backbone.vocab_size, raw.get_vocab_size(with_added_tokens=True))
            _tokenizers[backbone] = LLTokenizer(raw.to_str(), n_vocab=size, eos_token=list(backbone.eos_token_ids))
        return _tokenizers[backbone]


class GrammarConstraint:
    """An engine `TokenConstraint`. One reply's; not thread-safe.

    A model that babbles would run into `max_new_tokens` inside a string. So now and then the shortest way to the end is
    looked for, and when hardly more tokens are left than it takes, it is the only one open.
    """

    def __init__(self, matcher: Any, tokenizer: Any, vocab_size: int, max_new_tokens: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._left = self._look_at = max_new_tokens
        # What one token may add to the way, a list's next item say, must not make it too long.
        self._spare = min(64, max(16, max_new_tokens // 8))
        self._way: list[int] = []
        self._end = tokenizer.eos_token
        self._closers = {sign: tokenizer.tokenize_bytes(sign.encode())[0] for sign in _CLOSERS}

    def allowed(self) -> torch.Tensor:
        """`[vocab]` bool. End tokens are among them only where the text may end. All False if matching failed."""
        if not self._way and self._left <= self._look_at and not self._matcher.is_error():
            way = self._way_out()
            spare = self._left - len(way) - self._spare
            if way and spare <= 0 and max(way) < self._vocab_size:
                self._way = way
            # A token seldom makes the way longer by more than two: until a quarter of the time is gone, all is well.
            self._look_at = self._left - max(1, spare // 4)
        if self._way:
            only = torch.zeros(self._vocab_size, dtype=torch.bool)
            only[self._way[0]] = True
            return only
        return _mask(self._matcher, self._vocab_size)

    def accept(self, token_id: int) -> bool:
        """Take a token; True if the text is whole and nothing can follow."""
        if not self._matcher.consume_token(token_id):
            raise StepError(f"the grammar does not allow token {token_id}: {self._matcher.get_error()}")
        self._left -= 1
        self._way = self._way[1:]
        return bool(self._matcher.is_stopped())

    def rollback(self, tokens: int) -> None:
        """Take back the last tokens."""
        if not self._matcher.rollback(tokens):
            raise StepError(f"the grammar cannot take back {tokens} tokens: {self._matcher.get_error()}")
        self._left += tokens
        self._look_at = self._left
        self._way = []

    def _way_out(self) -> list[int]:
        """Tokens from here to the end, with the end token if it takes one; empty if none is found within what is left.

        Found by closing whatever can be closed; not always the shortest.
        """
        matcher = self._matcher.deep_copy()
        way: list[int] = []
        while len(way) < self._left:
            if matcher.is_accepting():
                return [*way, self._end]
            step = matcher.compute_ff_tokens() or [self._closing(matcher)]
            if not matcher.consume_tokens(step):
                break
            way += step
            if matcher.is_stopped():
                return way if len(way) <= self._left else []
        return []

    def _closing(self, matcher: Any) -> Any:
        """The token that gets nearer to the end, where not only one can follow."""
        fits = {sign: token for sign, token in self._closers.items() if matcher.validate_tokens([token])}
        # Where either bracket may stand, this is the inside of a string.
        if "}" in fits and "]" in fits:
            return fits.get('"', self._closers["."])
        return next(iter(fits.values())) if fits else int(_mask(matcher, self._vocab_size).byte().argmax())


def _mask(matcher: Any, vocab_size: int) -> torch.Tensor:
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    # A matcher that failed (over its limits, say) allows the end tokens: that would pass half a text for a whole.
    if matcher.is_error():
        return torch.zeros(vocab_size, dtype=torch.bool)
    return torch.from_numpy(np.unpackbits(bits, count=vocab_size, bitorder="little").view(np.bool_))
