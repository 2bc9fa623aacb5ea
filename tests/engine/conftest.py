"""The engine's tests run over every runner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from kits import KITS, kit_of

if TYPE_CHECKING:
    from kits import Kit


@pytest.fixture(params=list(KITS))
def kit(request: Any) -> Kit:
    return kit_of(request.param)
