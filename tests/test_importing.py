"""Laws of what a command imports: less than transformers would at once, and everything when it is asked for."""

import json
import subprocess
import sys

from transformers.utils import import_utils

from headlapse.engine.runtime.importing import import_less

SPARED = ["scipy.optimize"]
if hasattr(import_utils, "is_torch_distributed_available"):  # older ones import torch.distributed whatever is said
    SPARED += ["torch._dynamo.convert_frame", "torch.distributed.tensor"]

PROCESS = f"""
import json, sys
from headlapse.engine.runtime.importing import import_less
import_less()
import_less()
finders = [type(finder).__name__ for finder in sys.meta_path]
import headlapse.engine.capture.run, headlapse.engine.replay.run, headlapse.engine.checkpoints.model
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM
spared = [name for name in {SPARED} if name in sys.modules]
import torch
from scipy.optimize import linear_sum_assignment
compiled = torch.compile(lambda x: x.relu() + 1, backend="eager")(torch.tensor([-1.0, 2.0])).tolist()
print(json.dumps({{
    "finders": finders.count("_LessImports"),
    "imported": spared,
    "compiled": compiled,
    "compiler": torch._dynamo.__name__ + "." + torch._dynamo.OptimizedModule.__name__,
    "unknown": hasattr(torch._dynamo, "no_such_name"),
    "distributed": torch.distributed.is_available(),
}}))
"""


def test_a_command_is_spared_the_compiler_and_what_spreads_models_until_something_asks_for_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "finders": 1,
        "imported": [],
        "compiled": [1.0, 3.0],
        "compiler": "torch._dynamo.OptimizedModule",
        "unknown": False,
        "distributed": True,
    }


def test_a_process_that_has_imported_transformers_is_left_as_it_is() -> None:
    assert "transformers" in sys.modules
    before = list(sys.meta_path)
    import_less()
    assert sys.meta_path == before
