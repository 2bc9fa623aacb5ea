"""The runner over llama.cpp. Needs the extra `llamacpp`."""
