"""What a file tells of how a model was loaded."""

from __future__ import annotations

from detox_guard import LoadOptions


def test_what_is_told_names_no_secret_and_no_place_of_this_machine() -> None:
    kwargs = {"variant": "fp16", "proxies": {"https": "http://ann:secret@proxy"}}
    options = LoadOptions(
        device_map="auto",
        cache_dir="/home/ann",
        offload_folder="/home/ann/off",
        token="hf_secret",
        local_files_only=True,
        model_kwargs=kwargs,
    )
    assert options.told() == {"device_map": "auto", "model_kwargs": {"variant": "fp16"}}
    assert LoadOptions(model_kwargs={"proxies": {}}).told() == {}
