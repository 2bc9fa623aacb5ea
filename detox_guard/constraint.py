"""A grammar compiled over a backbone's tokenizer: which tokens may come next. The only module that knows llguidance."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from detox_guard.errors import InvalidParamsError, StepError
from detox_guard.text import template_of
from detox_guard.tools import tool_format

if TYPE_CHECKING:
    from detox_guard.backbone import Backbone
    from detox_guard.grammar import Grammar

__all__ = ["GrammarConstraint", "compile_grammar"]

_tokenizers: WeakKeyDictionary[Backbone, Any] = WeakKeyDictionary()
_lock = threading.Lock()


def compile_grammar(grammar: Grammar, backbone: Backbone) -> GrammarConstraint:
    """A fresh constraint for one request.

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
    matcher = LLMatcher(_tokenizer(backbone), source, log_level=0)
    constraint = GrammarConstraint(matcher, backbone.vocab_size)
    if matcher.is_error() or not constraint.allowed().any():
        reason = " ".join(matcher.get_error().split()) or "no text is of this language"
        raise InvalidParamsError("grammar", grammar.body, f"llguidance cannot enforce it: {reason}")
    return constraint


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
    """An engine `TokenConstraint`. One request's; not thread-safe."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> torch.Tensor:
        """`[vocab]` bool. End tokens are among them only where the text may end. All False if matching failed."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        # A matcher that failed (over its limits, say) allows the end tokens: that would pass half a text for a whole.
        if self._matcher.is_error():
            return torch.zeros(self._vocab_size, dtype=torch.bool)
        return torch.from_numpy(np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_))

    def accept(self, token_id: int) -> bool:
        """Take a token; True if the text is whole and nothing can follow."""
        if not self._matcher.consume_token(token_id):
            raise StepError(f"the grammar does not allow token {token_id}: {self._matcher.get_error()}")
        return bool(self._matcher.is_stopped())

    def rollback(self, tokens: int) -> None:
        """Take back the last tokens."""
        if not self._matcher.rollback(tokens):
            raise StepError(f"the grammar cannot take back {tokens} tokens: {self._matcher.get_error()}")
