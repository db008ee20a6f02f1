"""`python -m cdmoe_plugin.integrations.lm_eval_cli`: lm-eval's command line with `cdmoe` among its models.

It is for Python installations that process no .pth file: packages in a `PYTHONPATH` (`pip install --target`), a bare
checkout, or with `CDMOE_NO_LM_EVAL_HOOK` set. Arguments are those of `lm_eval`.
"""

from __future__ import annotations

import lm_eval.models  # noqa: F401  (lm-eval's own models must be in its registry first)
from lm_eval.__main__ import cli_evaluate

from cdmoe_plugin_lm_eval import register


def main() -> None:
    """Runs `lm_eval` with `--model cdmoe` among its models."""
    register()
    cli_evaluate()


if __name__ == "__main__":
    main()
