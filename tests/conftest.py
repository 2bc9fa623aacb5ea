"""The shared fixtures."""

from fixtures import *  # noqa: F403
