"""A server on loopback that stands in for an OpenAI-compatible endpoint."""

import pytest

from favchat_jax import openai_client
from tests.corpus.annotating import KEY
from tests.corpus.chat_server import ChatServer, good


@pytest.fixture
def start(monkeypatch):
    """Starts servers and points the environment at the last one."""
    servers = []

    def begin(answer=good) -> ChatServer:
        servers.append(ChatServer(answer))
        for name, value in {"BASE_URL": servers[-1].url, "API_KEY": KEY, "MODEL": "some-model"}.items():
            monkeypatch.setenv(f"OPENAI_{name}", value)
        return servers[-1]

    monkeypatch.setattr(openai_client, "FIRST_PAUSE", 0.01)
    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()
