"""`python -m detox_benchmarks registry`: every type of transformers, exact or refused and why. Knows no layer.

Each type is tried in a child process of its own, which is ended when it takes too long.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from detox_benchmarks.registry.check import TOLERANCE, largest_error
from detox_benchmarks.registry.shapes import default_config, tiny_config, tiny_model, tiny_tokenizer
from detox_guard.errors import DetoxGuardError, UnsupportedBackboneError
from detox_guard.models.backbone import from_model
from detox_guard.models.checks import REFUSED, causal_class, check_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from multiprocessing.connection import Connection
    from pathlib import Path

__all__ = ["Tried", "table", "try_all", "types_of", "write_into"]

Verdict = Literal["exact", "refused", "not tried"]
_LIMIT_S = 120.0
_BEGIN, _END = "<!-- table: begin -->", "<!-- table: end -->"
_WAYS = {
    "padded": "prompts and rows in one pass",
    "rows": "rows in one pass",
    "alone": "a pass a row",
    "recompute": "a pass a row, over everything again",
}


@dataclass(frozen=True)
class Tried:
    """What became of one type."""

    kind: str
    verdict: Verdict
    how: str
    """How it is run; why it is refused; what went wrong with the tiny model."""
    error: float | None = None
    """The largest difference of a probability from that of a whole pass."""


def types_of(names: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """transformers' causal types, and those of images and text besides; or those of them that are named."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    wanted = set(names)
    causal = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not wanted or kind in wanted]
    others = [kind for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if not wanted or kind in wanted]
    return causal, [kind for kind in others if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def try_all(kinds: Iterable[str]) -> Iterator[Tried]:
    """Each type in a child of this process."""
    import transformers

    transformers.logging.set_verbosity_error()
    _try("llama")  # so that children find loaded what they all need
    context = multiprocessing.get_context("fork")
    for kind in kinds:
        ours, theirs = context.Pipe()
        child = context.Process(target=_child, args=(kind, theirs), daemon=True)
        child.start()
        theirs.close()
        try:
            yield Tried(**ours.recv()) if ours.poll(_LIMIT_S) else Tried(kind, "not tried", "took too long")
        except EOFError:
            yield Tried(kind, "not tried", "the process died")
        finally:
            child.kill()
            child.join()


def _child(kind: str, to: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    to.send(asdict(_try(kind)))


def _try(kind: str) -> Tried:
    if kind in REFUSED:
        return Tried(kind, "refused", REFUSED[kind])
    try:
        default = default_config(kind)  # of an encoder-decoder, say, no tiny one need be made
        check_config(default, causal_class(default, kind), kind)
        config = tiny_config(kind)
        check_config(config, causal_class(config, kind), kind)
        backbone = from_model(tiny_model(config), tiny_tokenizer(), id=kind)
        error = largest_error(backbone)
    except UnsupportedBackboneError as refusal:
        reason = str(refusal).split("cannot be steered: ")[-1].split("\n")[0]
        return Tried(kind, "refused", reason)
    except DetoxGuardError as failure:
        return Tried(kind, "not tried", str(failure).split("\n")[0])
    except Exception as failure:
        return Tried(kind, "not tried", f"{type(failure).__name__}: {str(failure).strip().splitlines()[0][:120]}")
    running = backbone.running
    how = _WAYS[running.layout] + ("" if running.takes_embeddings else "; token ids only")
    return Tried(kind, "exact", how, error) if error <= TOLERANCE else Tried(kind, "not tried", "not exact", error)


def table(causal: list[Tried], others: list[Tried]) -> str:
    """Markdown: the exact types by how they are run, then the others, each with its reason."""
    from transformers import __version__

    lines = [f"transformers {__version__}. Largest difference of a probability: at most {TOLERANCE:g}.", ""]
    for title, tried in (("Causal language models", causal), ("Models of images and text, their text alone", others)):
        counts = Counter(one.verdict for one in tried)
        lines += [f"### {title}", "", ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + ".", ""]
        lines += ["| | types |", "|---|---|"]
        groups: dict[tuple[str, str], list[str]] = {}
        for one in tried:
            groups.setdefault((one.verdict, one.how), []).append(f"`{one.kind}`")
        for (verdict, how), kinds in sorted(groups.items(), key=lambda group: (group[0][0], -len(group[1]))):
            lines.append(f"| **{verdict}**: {how.replace('|', '/')} | {' '.join(kinds)} |")
        lines.append("")
    return "\n".join(lines)


def write_into(path: Path, text: str) -> None:
    """Put a table between the marks of a page."""
    before, _, rest = path.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    path.write_text(f"{before}{_BEGIN}\n\n{text}\n{_END}{after}", encoding="utf-8")
