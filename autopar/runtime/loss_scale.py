"""float16: the scale that a step's backward runs with, and the agreement of all ranks on whether it overflowed.

Small float16 gradients vanish unless the loss is multiplied by a large factor first (Micikevicius et al. 2018, Mixed
Precision Training, section 3.2), which `torch.amp.GradScaler` does in front of `backward()`. Here a call of the model
has run its backward by then. So the call scales by a factor of its own, which follows the scaler's, and takes it out
of the float32 gradients again; what `backward()` brings is multiplied in as ever.

A scaler looks for infinities on its own process. An overflow anywhere in the world therefore reaches every rank as NaN
in all gradients, and all ranks skip the step alike: under any plan, and with torch's scaler unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FIRST_SCALE = 2.0**16  # as torch.amp.GradScaler's
_LARGEST_FLOAT16_SCALE = 2.0**15


class LossScale:
    """`value`: what the next backward is scaled with, a float32 scalar on the device.

    loss_dtype: of the captured loss, whose gradient the scale is.
    """

    def __init__(self, loss_dtype: torch.dtype, device: torch.device) -> None:
        most = _LARGEST_FLOAT16_SCALE if loss_dtype == torch.float16 else float("inf")
        self._most = torch.tensor(most, device=device)
        self.value = torch.tensor(FIRST_SCALE, device=device).clamp(max=self._most)

    @torch.no_grad()
    def unscale(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Divide by the scale, in place; 1.0 where some element of this rank is not finite, else 0.0."""
        total = torch.zeros((), device=self.value.device)
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for gradient in gradients.values():
            groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
        for (device, _), group in groups.items():
            found = torch.zeros((), device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(group, found, self.value.reciprocal().to(device))
            total += found.to(total.device)
        return total

    def after(self, factor: Tensor, found: Tensor) -> Tensor:
        """What to multiply this step's gradients by; `factor`: what the loss was multiplied with.

        found: above 0 where any rank has overflowed. The next scale is the factor, if that can be a scaler's; after an
        overflow half of the smaller, which is what a scaler will do.
        """
        wanted = torch.where(factor > 1, factor.to(self.value.dtype), self.value)
        halved = torch.minimum(wanted, self.value) / 2
        self.value = torch.where(found > 0, halved, wanted).clamp(max=self._most)
        return torch.where(found > 0, torch.full_like(factor, float("nan")), factor)
