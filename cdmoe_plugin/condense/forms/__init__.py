"""The forms that a decoder layer may take, one file each."""

from __future__ import annotations

from .condense import Condense
from .form import Form, Replacing
from .prune_experts import PruneExperts
from .trim_block import TrimBlock
from .trim_layer import TrimLayer

FORMS: dict[str, Form] = {form.name: form for form in (Condense(), PruneExperts(), TrimLayer(), TrimBlock())}

__all__ = ["FORMS", "Form", "Replacing"]
