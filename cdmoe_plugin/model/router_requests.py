"""The router loss of models without a router, for callers that ask for it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.utils import ModelOutput


def answer_router_requests(model: PreTrainedModel) -> Any:
    """Make a model without routers return a router loss of 0, where it is asked for router logits.

    Trainers of sparse models, such as TRL's with a `router_aux_loss_coef`, add `outputs.aux_loss` to the loss.

    Returns:
        The hook, which can be removed.
    """
    return model.register_forward_hook(_no_loss, with_kwargs=True)


def _no_loss(_model: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
    # `modeling_cdmoe` has set the argument to False, where it was asked for.
    asked = kwargs.get("output_router_logits") is False
    if asked and isinstance(output, ModelOutput) and getattr(output, "aux_loss", 0) is None:
        first = next(iter(output.values()))  # the loss or the logits
        output["aux_loss"] = first.new_zeros(())
