"""Settings of the data page: each field is a flag of `openqwen inspect`."""

from pathlib import Path

from pydantic import Field

from openqwen.http.settings import HttpConfig


class InspectConfig(HttpConfig):
    """The defaults are safe: loopback only, and a limit on everything."""

    port: int = Field(8100, ge=0, le=65535, description="port to listen on; 0: any free port")
    longest: int = Field(
        64 << 20, gt=0, description="longest line that is read as a record, in bytes"
    )
    query_seconds: float = Field(10.0, gt=0, description="time limit of one search")
    cache: Path | None = Field(
        None, description="folder for indices; default: openqwen/inspect in the user's cache"
    )
