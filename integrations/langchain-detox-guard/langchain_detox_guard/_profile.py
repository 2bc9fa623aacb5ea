"""What a chat model can do, as LangChain's tools ask it. Knows a model; loads it only for its window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_detox_guard.chat import ChatDetoxiGen

_WINDOW = "max_input_tokens"


class Profile(dict[str, Any]):
    """A `ModelProfile` whose `max_input_tokens`, the context window, is found out when it is first asked for.

    That loads the model, which raises as its first call would. Without a known window the key is missing.
    """

    def __init__(self, model: ChatDetoxiGen) -> None:
        super().__init__(
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            image_outputs=False,
            audio_outputs=False,
            video_outputs=False,
            reasoning_output=False,
            tool_calling=True,
            tool_choice=True,
            structured_output=False,  # native and beside tools, to agents: with this model a schema is one more tool
            max_output_tokens=model.max_tokens,
        )
        self._model: ChatDetoxiGen | None = model

    def __missing__(self, key: str) -> Any:
        if key == _WINDOW and self._model is not None:
            window = self._model._detoxigen().context_window
            self._model = None
            if window is not None:
                self[_WINDOW] = window
                return window
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (key == _WINDOW and self.get(_WINDOW) is not None)
