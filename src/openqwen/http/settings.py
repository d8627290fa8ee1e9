"""Settings that all servers share."""

from pydantic import Field

from openqwen.support.settings import Settings


class ListenConfig(Settings):
    """Where a server listens, and its limits. The defaults are safe: loopback only."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free port")
    max_body: int = Field(16 << 20, gt=0, description="largest request, in bytes")
    idle: float = Field(
        20.0, gt=0, description="seconds that a client may take to send its request"
    )
    drain: float = Field(30.0, ge=0, description="seconds that running answers get after SIGTERM")
    user: str | None = Field(None, description="unprivileged user to become when started as root")


class HttpConfig(ListenConfig):
    """The settings of a server whose clients show an API key."""

    host: str = Field(
        "127.0.0.1",
        description="address to listen on; beyond loopback, clients need an API key",
    )
    api_key: list[str] = Field(
        [],
        description="API keys that clients may use; more may be given in OPENQWEN_API_KEY, "
        "separated by commas",
    )
