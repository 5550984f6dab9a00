"""Keeps copies of a model in other processes equal to the one in training, by sending the selected weights only.

A `Publisher` reads a selection after each optimizer step and sends a message; a `Receiver` writes it into its copy of the
base model. A transport carries the messages: `InProcess`, `Folder` or `Distributed`. docs/sync.md specifies the bytes.
`VLLM` hands the same weights to vLLM.
"""

from unmask.sync.distributed import Distributed as Distributed
from unmask.sync.folder import Folder as Folder
from unmask.sync.patches import PatchArguments as PatchArguments
from unmask.sync.patches import to_vllm_patches as to_vllm_patches
from unmask.sync.publisher import Part as Part
from unmask.sync.publisher import Publisher as Publisher
from unmask.sync.publisher import Sent as Sent
from unmask.sync.receiver import Receiver as Receiver
from unmask.sync.targets import Shard as Shard
from unmask.sync.transport import InProcess as InProcess
from unmask.sync.vllm import VLLM as VLLM
