# The server by itself, on a CPU: docker build -t detox-guard . && docker compose up
# For a GPU, begin with an image that has CUDA, and leave the first `pip install` out.
FROM python:3.12-slim
RUN useradd --create-home guard
WORKDIR /app
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE ./
COPY detox_guard detox_guard
RUN pip install --no-cache-dir '.[server]'
USER guard
EXPOSE 8000
HEALTHCHECK CMD python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"
# Without keys it refuses to listen on an address that others reach.
CMD ["detox-guard", "serve", "--host", "0.0.0.0", "--port", "8000", "--api-keys", "/run/secrets/keys"]
