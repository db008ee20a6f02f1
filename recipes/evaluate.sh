#!/usr/bin/env bash
# Evaluate a model on the tasks of the CD-MoE paper, zero-shot.
#
#   recipes/evaluate.sh qwen-cd9
#   recipes/evaluate.sh Qwen/Qwen1.5-MoE-A2.7B,plan=qwen-cd9,num_layers=6 --output_path results
#
# The first argument is what follows `pretrained=` in lm-eval's --model_args; all others go to lm_eval as they are.
# The tasks' data sets are downloaded from the Hugging Face hub. In several processes:
#
#   LM_EVAL="accelerate launch -m lm_eval" recipes/evaluate.sh qwen-cd9
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
    echo "usage: $0 MODEL[,name=value...] [lm_eval arguments]" >&2
    exit 2
fi
model=$1
shift

tasks=arc_challenge,boolq,hellaswag,openbookqa,piqa,winogrande,rte,mmlu
read -ra lm_eval <<< "${LM_EVAL:-lm_eval}"
exec "${lm_eval[@]}" --model cdmoe --model_args "pretrained=$model" \
    --tasks "$tasks" --num_fewshot 0 --batch_size auto "$@"
