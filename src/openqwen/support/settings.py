"""What every typed configuration shares."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A configuration object: each field has its meaning and default, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")
