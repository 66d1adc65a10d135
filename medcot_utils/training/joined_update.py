"""Update all LoRA matrices at once: bitsandbytes launches a kernel for each matrix and waits for the GPU after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW8bit

_BLOCK = 256  # values that share a scale
_HELD = ("state1", "state2", "absmax1", "absmax2")


class JoinedAdamW8bit(AdamW8bit):
    """Take the same steps as bitsandbytes' AdamW8bit, to the last bit, with one update for all matrices of a group.

    Blocks of 256 values share a scale. A matrix whose size is a multiple of 256 has the same blocks alone and joined. The state
    keeps its form, so either optimizer can resume from a checkpoint of the other."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that have a gradient. Return the loss that `closure` returns, or None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for number, group in enumerate(self.param_groups):
            joined: dict[tuple[int, torch.device], list[torch.Tensor]] = {}
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, number, place)
                state = self.state[parameter]
                if state["state1"].dtype == torch.uint8 and parameter.numel() % _BLOCK == 0:
                    joined.setdefault((state["step"], parameter.device), []).append(parameter)
                else:
                    self.update_step(group, parameter, number, place)
            for (step, _), parameters in joined.items():
                self._update(parameters, step + 1, self.get_config(number, 0, group))
        return loss

    def _update(self, parameters: list[torch.Tensor], step: int, config: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        held = {name: [state[name] for state in states] for name in _HELD}
        held["values"] = [parameter.data for parameter in parameters]
        whole = {name: torch.cat([part.flatten() for part in parts]) for name, parts in held.items()}
        functional.optimizer_update_8bit_blockwise(
            self.optimizer_name,
            torch.cat([parameter.grad.flatten() for parameter in parameters]),
            whole["values"],
            whole["state1"],
            whole["state2"],
            *config["betas"],
            0.0,  # the third beta and alpha belong to another optimizer
            0.0,
            config["eps"],
            step,
            config["lr"],
            states[0]["qmap1"],
            states[0]["qmap2"],
            whole["absmax1"],
            whole["absmax2"],
            config["weight_decay"],
        )
        for name, parts in held.items():
            sizes = [part.numel() for part in parts]
            torch._foreach_copy_(parts, [new.view_as(old) for new, old in zip(whole[name].split(sizes), parts, strict=True)])
        for state in states:
            state["step"] = step
