"""What can be said about how a model is loaded. Knows names, bounds and which loads are alike; loads nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, field_validator

from detox_guard._strict import StrictModel
from detox_guard.errors import InvalidParamsError

__all__ = ["CACHE_OPTIONS", "DTYPES", "KV_TYPES", "OF_LLAMACPP", "QUANTIZATIONS", "DtypeName", "LoadOptions"]

DtypeName = Literal["auto", "float32", "bfloat16", "float16", "float64"]
DTYPES = get_args(DtypeName)
QUANTIZATIONS = ("int4", "int8", "fp8", "nf4", "bnb-int8")
"""Short names: the weights of the linear layers are rounded. `quantization.as_config` says what each stands for, but
for int4, which is `four_bit.round_to_grid`."""
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""Number types of llama.cpp's K/V cache."""
_KV_NUMBERS = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 20: "iq4_nl", 30: "bf16"}
OF_LLAMACPP = (
    "n_ctx", "n_gpu_layers", "n_threads", "n_batch", "type_k", "type_v", "flash_attn", "use_mmap", "use_mlock",
    "main_gpu", "tensor_split",
)  # fmt: skip
CACHE_OPTIONS = ("type_k", "type_v", "flash_attn")
"""Of those, what changes what a model says."""
_TORCH = (
    "device", "dtype", "device_map", "max_memory", "offload_folder", "quantization_config", "attn_implementation",
    "trust_remote_code", "model_kwargs",
)  # fmt: skip
"""Fields that one engine has and the other has not."""
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
_OURS = {
    "use_safetensors": "pickled weights are never read",
    "weights_only": "pickled weights are never read",
    "output_loading_info": "it is asked for already, to refuse files that lack weights",
    "state_dict": "pass the loaded model itself",
    "config": "it is read from the model's files; its fields may be given one by one",
    "load_in_8bit": 'quantization_config="bnb-int8" says it',
    "load_in_4bit": 'quantization_config="nf4" says it',
}
"""Keywords of `from_pretrained` that are not passed on, and why."""
_OF_THE_HUB = ("subfolder", "force_download", "proxies", "code_revision")
"""What configs and tokenizers take too, out of `model_kwargs`."""


class LoadOptions(StrictModel):
    """How a model is loaded: every keyword of `load_backbone`, `DetoxiGen.from_pretrained` and `DetoxiGen.shared`.

    Settings of what loads a model and does more with it inherit these. `torch_dtype` is another name for `dtype`. A
    field may also stand in `model_kwargs`, as people write it for other libraries. Raises `InvalidParamsError`.
    """

    model_config = ConfigDict(protected_namespaces=())

    device: Any = None
    """cpu, cuda, cuda:N, mps or xpu; else the best there is."""
    dtype: Any = None
    """Number type of the weights; "auto" is the one they were saved in. Else what the device does best."""
    device_map: Any = None
    """Where each part goes: "auto" over devices, then memory, then disk; or a JSON object of modules and devices."""
    max_memory: dict[int | str, int | str] | None = None
    """Most memory a device, for device_map: {"0": "20GiB", "cpu": "60GiB"}."""
    offload_folder: str | None = None
    """Folder for weights that device_map puts on disk."""
    quantization_config: Any = None
    """int4 (in bfloat16 on a CPU), int8, fp8 (torchao), nf4, bnb-int8 (bitsandbytes), or a quantization config of
    transformers, also as JSON."""
    attn_implementation: Literal["eager", "sdpa"] | None = None
    """eager or sdpa: those that take the engine's masks."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    gguf_file: str | None = None
    """Name of a GGUF file inside the folder or hub repository."""
    trust_remote_code: bool = False
    """Run code of the model's repository."""
    token: str | bool | None = Field(default=None, repr=False)
    """Token of the hub, for gated and private models; else the one that `hf auth login` or HF_TOKEN set."""
    cache_dir: str | None = None
    """Folder of downloaded models; else the hub's own cache."""
    local_files_only: bool = False
    """Use downloaded files only."""
    model_kwargs: dict[str, Any] | None = None
    """Other keywords of transformers' from_pretrained, as a JSON object."""
    engine: Literal["torch", "llamacpp"] = "torch"
    """What decodes: torch, or llama.cpp, which takes GGUF files."""
    n_ctx: Annotated[int, Field(ge=0, le=2**24)] | None = None
    """llamacpp: positions that a row may have; else (or 0) as many as the model was trained for."""
    n_gpu_layers: Annotated[int, Field(ge=-1, le=2**16)] | None = None
    """llamacpp: layers that go on the GPU; else (or -1) all, where llama.cpp was built for one."""
    n_threads: Annotated[int, Field(ge=1, le=512)] | None = None
    """llamacpp: threads; else one for each core."""
    n_batch: Annotated[int, Field(ge=32, le=2**16)] | None = None
    """llamacpp: prompt tokens computed at once; else 64 on a CPU and 512 on a GPU."""
    type_k: Any = None
    """llamacpp: number type of the cached keys: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl; else f16."""
    type_v: Any = None
    """llamacpp: number type of the cached values; else f16."""
    flash_attn: bool | None = None
    """llamacpp: flash attention; else where llama.cpp thinks it faster."""
    use_mmap: bool | None = None
    """llamacpp: map the file into memory (as it does) or read it."""
    use_mlock: bool | None = None
    """llamacpp: keep the weights in memory."""
    main_gpu: Annotated[int, Field(ge=0, le=64)] | None = None
    """llamacpp: the GPU for what is not split over several."""
    tensor_split: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """llamacpp: share of the weights for each GPU."""

    def __init__(self, **data: Any) -> None:
        if isinstance(more := data.get("model_kwargs"), Mapping):
            more = dict(more)
            for name in [*LoadOptions.model_fields, "torch_dtype"]:
                if name in more and name != "model_kwargs":
                    _only_one(f"model_kwargs.{name}", more[name], data, name)
                    data[name] = more.pop(name)
            data["model_kwargs"] = more or None
        if (dtype := data.pop("torch_dtype", None)) is not None:
            _only_one("torch_dtype", dtype, data, "dtype")
            data["dtype"] = dtype
        super().__init__(**data)
        for name in self.model_kwargs or ():
            if name in _OURS:
                raise InvalidParamsError(f"model_kwargs.{name}", data["model_kwargs"][name], _OURS[name])
        if self.device is not None and self.device_map is not None:
            raise InvalidParamsError(
                "device", str(self.device), "not together with device_map, which places every part"
            )
        for name in _TORCH if self.engine == "llamacpp" else OF_LLAMACPP:
            if getattr(self, name) not in (None, False):
                other = "torch" if self.engine == "llamacpp" else "llamacpp"
                raise InvalidParamsError(name, getattr(self, name), f'only with engine="{other}"')
        for name in ("max_memory", "offload_folder"):
            if data.get(name) is not None and not self.spreads:
                raise InvalidParamsError(name, data[name], 'only with a device_map, such as "auto"')

    @field_validator("offload_folder", "cache_dir", mode="before")
    @classmethod
    def _path(cls, value: object) -> object:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("max_memory", mode="before")
    @classmethod
    def _devices_by_number(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        return {int(key) if isinstance(key, str) and key.isdecimal() else key: most for key, most in value.items()}

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in DTYPES:
            raise ValueError(f"one of {', '.join(DTYPES)}")
        return value

    @field_validator("type_k", "type_v")
    @classmethod
    def _known_kv_type(cls, value: Any) -> Any:
        """A name; the number that llama-cpp-python has for it is taken too."""
        name = _KV_NUMBERS.get(value) if isinstance(value, int) and not isinstance(value, bool) else value
        name = name.lower() if isinstance(name, str) else name
        if value is not None and name not in KV_TYPES:
            raise ValueError(f"one of {', '.join(KV_TYPES)}")
        return name

    @field_validator("tensor_split", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("device_map")
    @classmethod
    def _known_map(cls, value: Any) -> Any:
        if value is None or isinstance(value, str | int) or type(value).__name__ == "device":
            return value
        if isinstance(value, Mapping) and value and all(isinstance(name, str) for name in value):
            return dict(value)
        raise ValueError(f"{', '.join(_SPREADS)}, a device, or a mapping of module names to devices")

    @field_validator("quantization_config")
    @classmethod
    def _known_quantization(cls, value: Any) -> Any:
        if value is None or value in QUANTIZATIONS or isinstance(value, Mapping) or hasattr(value, "quant_method"):
            return value
        raise ValueError(
            f"{', '.join(QUANTIZATIONS)}, or a quantization config of transformers, an object or a mapping"
        )

    @property
    def spreads(self) -> bool:
        """Whether the model may lie on several devices, or partly on disk."""
        if isinstance(self.device_map, Mapping):
            return set(self.device_map) != {""} or self.device_map[""] == "disk"
        return isinstance(self.device_map, str) and self.device_map in _SPREADS

    @property
    def one_device(self) -> Any:
        """The device asked for, as `pick_device` takes it; also where `device_map` names a single one."""
        if self.device_map is None or self.spreads:
            return self.device
        one = self.device_map[""] if isinstance(self.device_map, Mapping) else self.device_map
        return f"cuda:{one}" if isinstance(one, int) else one

    @property
    def hub(self) -> dict[str, Any]:
        """What is passed on wherever a file is looked for by name."""
        named = {"token": self.token, "cache_dir": self.cache_dir, "local_files_only": self.local_files_only or None}
        more = {name: (self.model_kwargs or {}).get(name) for name in _OF_THE_HUB}
        return {name: value for name, value in {**named, **more}.items() if value is not None}

    @property
    def weights(self) -> dict[str, Any]:
        """What only the reading of weights takes; device, dtype and quantization are the loader's to say."""
        named = {
            "max_memory": self.max_memory,
            "offload_folder": self.offload_folder,
            "attn_implementation": self.attn_implementation,
        }
        more = {name: value for name, value in (self.model_kwargs or {}).items() if name not in _OF_THE_HUB}
        return {**more, **{name: value for name, value in named.items() if value is not None}}

    @property
    def llamacpp(self) -> dict[str, Any]:
        """What only llama.cpp takes, as far as it was said."""
        return {name: value for name in OF_LLAMACPP if (value := getattr(self, name)) is not None}

    @property
    def loading(self) -> dict[str, Any]:
        """What was said of these fields, as `load_backbone` takes it; without what a class that inherits them adds."""
        return {name: getattr(self, name) for name in LoadOptions.model_fields if name in self.model_fields_set}

    def told(self) -> dict[str, Any]:
        """`loading` as JSON, for a file that others may read. Without the token, without what only says where things
        are on this machine, and without what says nothing. Raises as `key`."""
        said = {name: json.loads(_as_json(name, value)) for name, value in self.loading.items() if name not in _OWN}
        if isinstance(more := said.get("model_kwargs"), dict):
            said["model_kwargs"] = {name: value for name, value in more.items() if name != "proxies"} or None
        return {name: value for name, value in said.items() if value is not None and value is not False}

    def key(self) -> str:
        """Equal for options that load the same, device and dtype aside. Raises `InvalidParamsError` for objects that
        cannot be told apart by what they hold."""
        left_out = {"device", "dtype"} if self.spreads else {"device", "dtype", "device_map"}
        told = {name: getattr(self, name) for name in LoadOptions.model_fields if name not in left_out}
        for name in ("offload_folder", "cache_dir"):
            told[name] = None if told[name] is None else os.path.realpath(os.path.expanduser(told[name]))
        for name, value in told.items():
            _as_json(name, value)
        return json.dumps(told, default=_told, sort_keys=True)


_OWN = frozenset({"token", "cache_dir", "offload_folder", "max_memory", "local_files_only"})
"""Of one machine, or secret."""


def _as_json(name: str, value: object) -> str:
    try:
        return json.dumps(value, default=_told)
    except (TypeError, ValueError):
        raise InvalidParamsError(
            name, value, "plain values, to be shared or written down", hint="use from_pretrained"
        ) from None


def _only_one(field: str, value: object, data: Mapping[str, Any], name: str) -> None:
    if data.get(name) not in (None, False):
        raise InvalidParamsError(field, value, f"{name} is given too")


def _told(value: Any) -> Any:
    """A device, a dtype or a quantization config, as JSON."""
    if hasattr(value, "quant_method") and hasattr(value, "to_dict"):
        return {type(value).__name__: value.to_dict()}
    if type(value).__module__.partition(".")[0] == "torch" and type(value).__name__ in ("device", "dtype"):
        return str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(type(value).__name__)
