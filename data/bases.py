"""A base model's configuration, read without its weights: can it be trained and scored here?"""

from __future__ import annotations

from typing import Any

SCALED_LOGITS = (  # as configurations name it
    *("logits_scaling", "logit_scale", "final_logit_softcapping", "logits_soft_cap", "lm_head_multiplier"),
)


def base_problem(name: str, shape: Any, max_length: int) -> str:
    """Why a base model cannot serve; "" if it can.

    Scores are made of the output layer's own logits, and rows attend to all that stands before.

    Args:
        shape: its configuration, as transformers loads it; a model of several parts has its text's inside.
        max_length: tokens of the longest row.
    """
    text = shape.get_text_config()
    scaled = [name for name in SCALED_LOGITS if getattr(text, name, None) not in (None, 1)]
    if scaled:
        found = f"{name} scales or caps its logits ({scaled[0]} {getattr(text, scaled[0])})"
        return f"{found}, which neither the shared trainer nor the evaluation does"
    window = getattr(text, "sliding_window", None)
    if window and getattr(text, "use_sliding_window", True) and window < max_length:
        return f"{name} attends to {window} tokens alone (sliding_window), fewer than max_length {max_length}"
    return ""
