"""Recovery of a condensed model's quality by light training: language modelling, then SFT (CD-MoE, section 4.3).

Needs `trl` and `datasets`: `pip install "cdmoe_plugin[recipes]"`.
"""

from .data import StageData, load_stage_data
from .distillation import Distillation, load_teacher_blocks
from .trainer import CondensedSFTTrainer
from .weights import condensed_parameters, load_condensed_weights

__all__ = [
    "CondensedSFTTrainer",
    "Distillation",
    "StageData",
    "condensed_parameters",
    "load_condensed_weights",
    "load_stage_data",
    "load_teacher_blocks",
]
