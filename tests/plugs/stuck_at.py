"A disturbance: some weights are stuck at zero, as broken cells of a memory are."
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from noisyseg.perturb.disturbance import Law, check_number


@dataclass(frozen=True)
class StuckAt(Law):
    "A share of the weights is zero."
    share_stuck: float = 0.05  # how many of a kernel's weights are stuck, in [0, 1]
    label: ClassVar[str] = 'stuck weights'
    unit: ClassVar[str] = 'share'
    levels: ClassVar[tuple] = (0.01, 0.05, 0.2)
    share: ClassVar[bool] = True

    def __post_init__(self): check_number(self, 'share_stuck', 0)

    def __call__(self, weight: Tensor, z: Tensor) -> Tensor:
        return torch.where(torch.special.ndtr(z) < self.share_stuck, torch.zeros_like(weight), weight)
