"""Settings of a training run."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ctsma.models import WIDTHS


class Settings(BaseModel):
    """What all arms of a run share; design choices where the published study is silent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: Literal["compact", "paper"] = "compact"
    widths: tuple[int, int, int] = WIDTHS
    epochs: int = Field(24, ge=1)
    batch_size: int = Field(32, ge=2)
    patches_per_knee: int = Field(8, ge=1)  # that stay together in a batch
    learning_rate: float = Field(6e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    validation_share: float = Field(0.15, gt=0, lt=0.5)  # of the training fold's subjects
    augment: bool = True  # flips for every network, CT physics for every CT network
    device: str = "cpu"
    precision: str = Field("auto", pattern="^(auto|float32|bfloat16)$")
    protocol_sha256: str = ""
