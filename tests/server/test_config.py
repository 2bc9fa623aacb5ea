"""Configuration files, keys, and models that are exchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from detox_guard import (
    DataError,
    DecodingParams,
    DetoxifierNotFoundError,
    GuardPolicy,
    InvalidParamsError,
    ScorerError,
)
from detox_guard.server import ModelConfig, ServerConfig, ServerFile, create_app, load_model, params_of
from detox_guard.server.keys import Keys, new_key
from detox_guard.server.models import Models
from detox_guard.testing import ScriptedDetoxiGen

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TOML = """
[server]
port = 9000
api_keys = "${KEYS:-keys.txt}"
cors_origins = ["https://a.example.org"]

[server.guard]
threshold = 0.3
ladder = [4, { alpha = 8.0 }]

[models.small]
detoxifier = []

[models."org/big"]
model = "${BIG}"
loading = { device = "cpu" }
params = { alpha = 2, stop = ["\\n"] }
engine = { max_rows = 8 }
"""
YAML = """
server: {guard: false}
models:
  one: {model: "${BIG}"}
"""


def test_a_toml_file_is_read_with_its_variables(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(TOML)
    file = ServerFile.read(path, {"BIG": "/models/big"})
    assert (file.server.port, file.server.api_keys, file.server.cors_origins) == (
        9000, "keys.txt", ("https://a.example.org",)
    )  # fmt: skip
    assert file.server.guard is not None
    assert [rung.alpha for rung in file.server.guard.ladder] == [4, 8]
    assert list(file.models) == ["small", "org/big"]
    assert file.models["small"].detoxifier == ()
    big = file.models["org/big"]
    assert (big.model, big.loading, big.engine.max_rows) == ("/models/big", {"device": "cpu"}, 8)
    assert big.params is not None
    assert (big.params.alpha, big.params.stop) == (2, ("\n",))


def test_a_yaml_file_is_read_and_false_is_no_guard(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(YAML)
    file = ServerFile.read(path, {"BIG": "x"})
    assert file.server.guard is None
    assert file.models["one"].model == "x"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[server", DataError),
        ("[server]\ncolour = 1", InvalidParamsError),
        ("[server]\nport = 99999", InvalidParamsError),
        ("[server.guard]\nthreshold = 2.0", InvalidParamsError),
        ('[models.a]\nmodel = "${NOT_SET}"', InvalidParamsError),
        ("[models]", InvalidParamsError),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, kind: type[Exception]) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    with pytest.raises(kind):
        ServerFile.read(path, {})


def test_keys_are_held_as_hashes_and_found(tmp_path: Path) -> None:
    key, line = new_key("ann")
    path = tmp_path / "keys.txt"
    path.write_text(f"# ours\n\n{line}\n")
    assert key not in path.read_text()
    keys = Keys.read(path, {"DETOX_GUARD_API_KEYS": "a-key-of-twenty-chars, another-key-of-twenty-chars"})
    assert len(keys) == 3
    assert [keys.holder(one) for one in (key, "another-key-of-twenty-chars", "", key + "x")] == [
        "ann",
        "env2",
        None,
        None,
    ]


def test_bad_keys_are_refused_untold(tmp_path: Path) -> None:
    with pytest.raises(InvalidParamsError) as short:
        Keys.read(None, {"DETOX_GUARD_API_KEYS": "hunter2"})
    assert "hunter2" not in str(short.value)
    path = tmp_path / "keys.txt"
    path.write_text("dg-plain-key-in-the-file")
    with pytest.raises(DataError, match="line 1") as plain:
        Keys.read(path, {})
    assert "plain-key" not in str(plain.value)
    with pytest.raises(DataError):
        Keys.read(tmp_path / "none.txt", {})
    with pytest.raises(InvalidParamsError):
        new_key("a b")


def test_an_address_that_others_reach_needs_keys_also_when_it_is_read_again() -> None:
    far = ServerConfig(host="0.0.0.0", guard=None)
    with pytest.raises(InvalidParamsError, match="no API keys"):
        create_app(ScriptedDetoxiGen(), far)
    state = create_app(ScriptedDetoxiGen(), ServerConfig(guard=None)).state.detox_guard
    with pytest.raises(InvalidParamsError, match="no API keys"):
        state.configure(far)
    assert state.config.host == "127.0.0.1"
    state.configure(far, Keys({new_key("ann")[1].split(":")[1]: "ann"}))
    assert not state.loose


def test_a_model_that_was_taken_out_is_closed_once_nobody_uses_it() -> None:
    old, kept, new = ScriptedDetoxiGen(), ScriptedDetoxiGen(), ScriptedDetoxiGen()
    models = Models({"a": old, "b": kept}, own=True)
    served = models.find("a")
    with models.use(served):
        models.replace({"a": new, "b": kept})
        assert models.find(None).model is new
        assert not old.closed
        assert models.retiring
    assert not models.retiring
    assert (old.closed, kept.closed, new.closed) == (True, False, False)
    assert models.ready


class Silent:
    name = "silent"

    def score(self, texts: Sequence[str]) -> list[float]:
        return []


def test_a_model_is_served_only_with_its_detoxifier_and_with_a_scorer_that_scores(
    tiny_folder: Path, detoxifier_folder: Path, tmp_path: Path
) -> None:
    one = ModelConfig(model=str(tiny_folder), detoxifier=str(detoxifier_folder), loading={"device": "cpu"})
    with load_model(one, GuardPolicy()) as model:
        assert len(model.detoxifier_ids) == 1
        assert model.params.alpha > 0
        assert model.stats().submitted == 1
    plain = one.replace(detoxifier=())
    with load_model(plain) as model:
        assert (model.detoxifier_ids, model.params.alpha) == ((), 0.0)
    assert params_of(plain.replace(params=DecodingParams(alpha=1.0))).alpha == 1.0
    with pytest.raises(DetoxifierNotFoundError):
        load_model(one.replace(detoxifier=str(tmp_path / "none")))
    with pytest.raises(ScorerError):
        load_model(one, GuardPolicy(scorer=Silent()))
