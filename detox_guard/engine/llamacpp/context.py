"""A model and its contexts in llama.cpp, with every argument checked. Knows sequences; knows no prompts, no views.

A wrong question to llama.cpp may end the process. So nothing goes to it that was not checked here.

A sequence is a stream of its own (`kv_unified` is off): what it gives does not depend on others then. Those of a pass
must be the first ones, without a gap, or the pass falls into several. What a sequence holds can be taken out as bytes,
and put into a sequence of any context of the same model and number types.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from detox_guard.errors import BackboneError, StepError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from detox_guard.models.gguf import GgufModel

__all__ = ["Context", "LoadedModel", "State"]

_SWA_ONLY = 1
"""A flag of llama.cpp: of two caches (one for layers with a window), the second alone."""
_HEAD = 8
"""Bytes that a sequence begins with when it is written: llama.cpp's mark, and which one it was."""
_PAD = 256
"""llama.cpp pads the slots of a sequence to a multiple of it."""


class LoadedModel:
    """The weights of a GGUF file. Raises `BackboneError`."""

    def __init__(self, gguf: GgufModel) -> None:
        import llama_cpp

        log = logging.getLogger("llama-cpp-python")
        if log.level == logging.NOTSET:
            log.setLevel(logging.ERROR)  # else it prints pages; who set a level has it
        self.lib: Any = llama_cpp
        self.facts = gguf.facts
        how = gguf.how
        self.lib.llama_backend_init()
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = how.get("n_gpu_layers", -1)
        if "use_mmap" in how or "use_mlock" in how:
            parts = ["MMAP"] * how.get("use_mmap", True) + ["MLOCK"] * how.get("use_mlock", False)
            params.load_mode = getattr(self.lib, f"LLAMA_LOAD_MODE_{'_'.join(parts) or 'NONE'}")
        if "main_gpu" in how:
            params.main_gpu = how["main_gpu"]
        if "tensor_split" in how:
            most = int(self.lib.llama_max_devices())
            if len(how["tensor_split"]) > most:
                raise BackboneError(f"tensor_split: {len(how['tensor_split'])} shares for at most {most} devices")
            self._split = (ctypes.c_float * most)(*how["tensor_split"])  # kept: only its address goes along
            params.tensor_split = self._split
        self.on_gpu = bool(self.lib.llama_supports_gpu_offload()) and params.n_gpu_layers != 0
        self._threads = how.get("n_threads") or torch.get_num_threads()
        self._types = [self._type(how.get(name)) for name in ("type_k", "type_v")]
        self._flash = how.get("flash_attn")
        self.handle: Any = self.lib.llama_model_load_from_file(str(gguf.path).encode(), params)
        if not self.handle:
            raise BackboneError(f"{gguf.path}: llama.cpp cannot load it", hint="Is there memory for it?")
        if self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.handle)) != self.facts.vocab_size:
            raise BackboneError(f"{gguf.path}: the file changed since it was tried")

    def _type(self, name: str | None) -> int | None:
        return None if name is None else int(getattr(self.lib, f"GGML_TYPE_{name.upper()}"))

    def context(self, sequences: int, slots: int, batch: int) -> Context:
        """`batch`: the most tokens of a pass. Logits may be asked of one a sequence."""
        params = self.lib.llama_context_default_params()
        params.n_seq_max = sequences
        params.n_ctx = sequences * -(-slots // _PAD) * _PAD
        params.n_batch = params.n_ubatch = batch
        params.n_outputs_max = sequences
        params.n_outputs_max_per_seq = 1
        params.n_threads = params.n_threads_batch = self._threads
        params.kv_unified = False
        params.swa_full = True
        params.no_perf = True
        if self._types[0] is not None:
            params.type_k = self._types[0]
        if self._types[1] is not None:
            params.type_v = self._types[1]
        if self._flash is not None:
            params.flash_attn_type = int(self._flash)
        handle = self.lib.llama_init_from_model(self.handle, params)
        if not handle:
            raise StepError(f"llama.cpp made no context of {sequences} times {slots} slots: is there memory for it?")
        return Context(self, handle, sequences, slots, batch)

    def close(self) -> None:
        if self.handle:
            self.lib.llama_model_free(self.handle)
            self.handle = None


@dataclass(frozen=True, eq=False)
class State:
    """What a sequence held: its keys and values as llama.cpp writes them, a part for each of its caches."""

    slots: int
    head: bytes
    """What it begins with: llama.cpp's mark, and the sequence it was."""
    parts: tuple[memoryview, ...]


class Context:
    """Sequences `0 … sequences - 1`, each of up to `slots` slots; `lengths` says how many of them it has."""

    def __init__(self, model: LoadedModel, handle: Any, sequences: int, slots: int, batch: int) -> None:
        self._model, self._lib, self._handle = model, model.lib, handle
        self._memory = self._lib.llama_get_memory(handle)
        self.sequences, self.slots = int(self._lib.llama_n_seq_max(handle)), int(self._lib.llama_n_ctx_seq(handle))
        self.lengths = [0] * sequences
        self._most = batch
        self._vocab, self._width = model.facts.vocab_size, model.facts.hidden_size
        self._tokens = self._lib.llama_batch_init(batch, 0, 1)
        self._embedded: Any = None
        if self.sequences != sequences or self.slots < slots or int(self._lib.llama_n_batch(handle)) < batch:
            raise StepError(
                f"llama.cpp gives {self.sequences} sequences of {self.slots} slots, not {sequences}, {slots}"
            )

    # -- passes

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feed `tokens[i]` to sequence i; logits `[len(tokens), vocab]` float32, the caller's own."""
        for sequence, token in enumerate(tokens):
            self._check(sequence, 1)
            self._put(self._tokens, sequence, sequence, self.lengths[sequence], True)
            self._tokens.token[sequence] = self._token(token)
        self._decode(self._tokens, len(tokens))
        for sequence in range(len(tokens)):
            self.lengths[sequence] += 1
        return self._logits(len(tokens))

    def read(self, ids: Sequence[int]) -> Tensor:
        """Feed ids to sequence 0; the last one's logits `[vocab]`."""
        self._check(0, len(ids))
        for at, token in enumerate(ids):
            self._put(self._tokens, at, 0, self.lengths[0] + at, at == len(ids) - 1)
            self._tokens.token[at] = self._token(token)
        self._decode(self._tokens, len(ids))
        self.lengths[0] += len(ids)
        return self._logits(1)[0]

    def read_embeddings(self, embeddings: Tensor) -> Tensor:
        """`read` for virtual tokens `[n, width]`, as llama.cpp takes them."""
        count, width = embeddings.shape
        self._check(0, count)
        if width != self._width:
            raise StepError(f"embeddings of width {width} for a model of width {self._width}")
        if self._embedded is None:
            self._embedded = self._lib.llama_batch_init(self._most, self._width, 1)
        for at in range(count):
            self._put(self._embedded, at, 0, self.lengths[0] + at, at == count - 1)
        rows = embeddings.detach().to("cpu", torch.float32).contiguous()
        ctypes.memmove(self._embedded.embd, rows.data_ptr(), rows.numel() * 4)
        self._decode(self._embedded, count)
        self.lengths[0] += count
        return self._logits(1)[0]

    # -- what sequences hold

    def cut(self, sequence: int, length: int) -> None:
        """Drop all but the first `length` slots."""
        if not 0 <= sequence < self.sequences or not 0 <= length <= self.lengths[sequence]:
            raise StepError(f"sequence {sequence} cut to {length} slots")
        if length < self.lengths[sequence]:
            if not self._lib.llama_memory_seq_rm(self._memory, sequence, length or -1, -1):
                raise StepError(f"llama.cpp did not cut sequence {sequence} to {length} slots")
            self.lengths[sequence] = length

    def take(self, sequence: int) -> State:
        """A copy of what a sequence holds; at least one slot."""
        if not 0 <= sequence < self.sequences or not self.lengths[sequence]:
            raise StepError(f"nothing to take of sequence {sequence}")
        size = int(self._lib.llama_state_seq_get_size(self._handle, sequence))
        second = int(self._lib.llama_state_seq_get_size_ext(self._handle, sequence, _SWA_ONLY))
        buffer = bytearray(size)
        raw = (ctypes.c_uint8 * len(buffer)).from_buffer(buffer)
        if self._lib.llama_state_seq_get_data(self._handle, raw, len(buffer), sequence) != len(buffer):
            raise StepError(f"llama.cpp gave not all of sequence {sequence}")
        head, body = bytes(buffer[:_HEAD]), memoryview(buffer)[_HEAD:]
        middle = size - second
        parts = [body[:middle], body[middle:]] if middle else [body]
        return State(self.lengths[sequence], head, tuple(self._bare(part, sequence) for part in parts))

    def put(self, sequence: int, state: State) -> None:
        """Let a sequence hold what was taken, and nothing else."""
        if not 0 <= sequence < self.sequences or not 0 < state.slots <= self.slots:
            raise StepError(f"{state.slots} slots put into sequence {sequence} of {self.slots}")
        self.cut(sequence, 0)
        count, tail = struct.pack("<I", self.sequences), bytes(4 * (self.sequences - 1))
        data = b"".join([state.head, *(piece for part in state.parts for piece in (count, part, tail))])
        raw = ctypes.cast(ctypes.c_char_p(data), ctypes.POINTER(ctypes.c_uint8))
        if self._lib.llama_state_seq_set_data(self._handle, raw, len(data), sequence) != len(data):
            raise StepError(f"llama.cpp took not all of {state.slots} slots into sequence {sequence}")
        if self._lib.llama_memory_seq_pos_max(self._memory, sequence) != state.slots - 1:
            raise StepError(f"sequence {sequence} does not hold what was put into it")
        self.lengths[sequence] = state.slots

    def close(self) -> None:
        if self._handle:
            self._lib.llama_batch_free(self._tokens)
            if self._embedded is not None:
                self._lib.llama_batch_free(self._embedded)
            self._lib.llama_free(self._handle)
            self._handle = None

    # -- the seam itself

    def _bare(self, part: memoryview, sequence: int) -> memoryview:
        """A part without what tells of the other sequences, so that a context of more or fewer takes it: a count of
        streams, and for each of them its cells; the others have none."""
        before, after = 4 * (1 + sequence), 4 * (self.sequences - 1 - sequence)
        head = struct.pack("<I", self.sequences) + bytes(4 * sequence)
        end = len(part) - after
        if end <= before or part[:before] != head or any(part[end:]):
            raise StepError("llama.cpp writes sequences in a form that is not known here")
        return part[before:end]

    def _check(self, sequence: int, added: int) -> None:
        if not 0 <= sequence < self.sequences or not 0 < added <= self._most:
            raise StepError(f"{added} tokens for sequence {sequence}")
        if self.lengths[sequence] + added > self.slots:
            raise StepError(f"sequence {sequence} has no room: {self.slots} slots")

    def _token(self, token: int) -> int:
        if not 0 <= token < self._vocab:
            raise StepError(f"token {token} of {self._vocab}")
        return token

    def _put(self, batch: Any, at: int, sequence: int, position: int, output: bool) -> None:
        batch.pos[at] = position
        batch.n_seq_id[at] = 1
        batch.seq_id[at][0] = sequence
        batch.logits[at] = output

    def _decode(self, batch: Any, count: int) -> None:
        if self._handle is None:
            raise StepError("the context is closed")
        batch.n_tokens = count
        failed = self._lib.llama_decode(self._handle, batch)
        if failed:
            raise StepError(f"llama.cpp failed to decode {count} tokens (status {failed})")

    def _logits(self, count: int) -> Tensor:
        """Of the last pass, copied: the next one overwrites them. One row is asked for by its place from the end."""
        out = torch.empty(count, self._vocab)
        for row in range(count):
            found = self._lib.llama_get_logits_ith(self._handle, row if count > 1 else -1)
            if not found:
                raise StepError("llama.cpp gave no logits")
            ctypes.memmove(out[row].data_ptr(), found, 4 * self._vocab)
        return out
