"""What replies, caches and traces are told of a model and a guard. Knows names and hashes; knows no text."""

from __future__ import annotations

import hashlib
import json
import threading
from typing import TYPE_CHECKING, Any
from uuid import uuid4
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from detox_guard import DetoxiGen, Generation, GuardPolicy

PROVIDER = "detox_guard"


def generation_info(detoxigen: DetoxiGen, generation: Generation, guard: GuardPolicy | None = None) -> dict[str, Any]:
    """What LangChain's metadata says of one reply: small and JSON-able, the same for both models. `guard` is the one in
    force, where someone may ask for it."""
    told = generation.summary()
    if guard is not None:
        told["policy"] = policy_mark(guard)
    return {
        "finish_reason": generation.finish_reason,
        "model_name": detoxigen.model_id,
        "model_provider": PROVIDER,
        "detox": told,
    }


def policy_mark(guard: GuardPolicy) -> str:
    """The same for policies that release the same text: a scorer's name alone does not tell."""
    told = guard.model_dump(mode="json", exclude={"scorer", "on_event", "audit_log", "keep_discarded"})
    scorer = guard.scorer
    told["scorer"] = scorer if isinstance(scorer, str) else f"{name_of(scorer)} at {id(scorer)}"
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


_identities: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_identities_lock = threading.Lock()


def identity_of(detoxigen: object) -> str:
    """A name that no other one has, in this process or another: a cache key."""
    with _identities_lock:
        return _identities.setdefault(detoxigen, uuid4().hex)


def name_of(value: object) -> str:
    """A scorer or a callback, in a cache key."""
    return str(getattr(value, "name", None) or getattr(value, "__qualname__", type(value).__qualname__))
