"""How a model is loaded, as fields. Knows the names of `detox_guard.LoadOptions`; what they mean is the core's."""

from __future__ import annotations

from typing import Any

from detox_guard import LoadOptions, field_of
from pydantic import Field, SecretStr, field_validator

from langchain_detox_guard._settings import Settings

WHICH = ("model", "detoxifier")


class LoadFields(Settings):
    """The fields of `detox_guard.LoadOptions`, with its meanings and bounds. A `token` is a secret: what is serialized
    asks for HF_TOKEN again."""

    device: str | None = field_of(LoadOptions, "device")
    dtype: str | None = field_of(LoadOptions, "dtype")
    device_map: str | int | dict[str, Any] | None = field_of(LoadOptions, "device_map")
    max_memory: dict[str | int, str | int] | None = field_of(LoadOptions, "max_memory")
    offload_folder: str | None = field_of(LoadOptions, "offload_folder")
    quantization_config: str | dict[str, Any] | None = field_of(LoadOptions, "quantization_config")
    """A name, or a quantization config of transformers, which is kept as a mapping."""
    attn_implementation: str | None = field_of(LoadOptions, "attn_implementation")
    revision: str | None = field_of(LoadOptions, "revision")
    gguf_file: str | None = field_of(LoadOptions, "gguf_file")
    trust_remote_code: bool = field_of(LoadOptions, "trust_remote_code")
    token: SecretStr | None = Field(default=None, repr=False)
    cache_dir: str | None = field_of(LoadOptions, "cache_dir")
    local_files_only: bool = field_of(LoadOptions, "local_files_only")
    model_kwargs: dict[str, Any] | None = field_of(LoadOptions, "model_kwargs")
    engine: str | None = field_of(LoadOptions, "engine", default=None)
    n_ctx: int | None = field_of(LoadOptions, "n_ctx")
    n_gpu_layers: int | None = field_of(LoadOptions, "n_gpu_layers")
    n_threads: int | None = field_of(LoadOptions, "n_threads")
    n_batch: int | None = field_of(LoadOptions, "n_batch")
    type_k: str | int | None = field_of(LoadOptions, "type_k")
    type_v: str | int | None = field_of(LoadOptions, "type_v")
    flash_attn: bool | None = field_of(LoadOptions, "flash_attn")
    use_mmap: bool | None = field_of(LoadOptions, "use_mmap")
    use_mlock: bool | None = field_of(LoadOptions, "use_mlock")
    main_gpu: int | None = field_of(LoadOptions, "main_gpu")
    tensor_split: list[float] | None = field_of(LoadOptions, "tensor_split")

    @field_validator("quantization_config", mode="before")
    @classmethod
    def _as_mapping(cls, value: Any) -> Any:
        if not (hasattr(value, "quant_method") and hasattr(value, "to_dict")):
            return value
        return {name: getattr(part, "value", part) for name, part in value.to_dict().items()}  # no enums, so JSON

    @property
    def lc_secrets(self) -> dict[str, str]:
        return {"token": "HF_TOKEN"}

    def _loading(self) -> dict[str, Any]:
        """What was set, as `LoadOptions` takes it. Raises `InvalidParamsError`."""
        fields = LoadFields.model_fields
        given = {name: getattr(self, name) for name in fields if getattr(self, name) != fields[name].default}
        if self.token is not None:
            given["token"] = self.token.get_secret_value()
        LoadOptions(**given)
        return given


LOADING = (*WHICH, *(name for name in LoadFields.model_fields if name not in Settings.model_fields))
"""Fields that say which model is meant."""
