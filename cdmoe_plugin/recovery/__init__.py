"""Recovers a condensed model's quality by light training: language modelling, then fine-tuning (CD-MoE, section 4.3).

Needs `trl` and `datasets`: `pip install "cdmoe_plugin[recipes]"`.
"""

from .data import StageData, check_tokenizer, load_stage_data
from .distillation import Distillation, DistillationForm, check_distillation, load_teacher_blocks
from .output import Progress, claim_output_dir, condense_once, find_progress
from .stages import StageSummary, finish, open_stage_model, run_stage
from .trainer import CondensedSFTTrainer
from .weights import condensed_parameters, load_condensed_weights

__all__ = [
    "CondensedSFTTrainer",
    "Distillation",
    "DistillationForm",
    "Progress",
    "StageData",
    "StageSummary",
    "check_distillation",
    "check_tokenizer",
    "claim_output_dir",
    "condense_once",
    "condensed_parameters",
    "find_progress",
    "finish",
    "load_condensed_weights",
    "load_stage_data",
    "load_teacher_blocks",
    "open_stage_model",
    "run_stage",
]
