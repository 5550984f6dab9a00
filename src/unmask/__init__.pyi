"""The public names for type checkers; ``__init__.py`` says where each is imported from when it is first used."""

from unmask import analysis as analysis
from unmask import integrations as integrations
from unmask import methods as methods
from unmask import peft as peft
from unmask import quantised as quantised
from unmask import sync as sync
from unmask.delta.combine import combine as combine
from unmask.delta.delta import SparseDelta as SparseDelta
from unmask.delta.ladder import Ladder as Ladder
from unmask.delta.sparse import SparseTensor as SparseTensor
from unmask.delta.swap import swap as swap
from unmask.errors import ConfigError as ConfigError
from unmask.errors import DataError as DataError
from unmask.errors import DeltaError as DeltaError
from unmask.errors import MethodError as MethodError
from unmask.errors import MissingExtraError as MissingExtraError
from unmask.errors import NonFiniteGradientError as NonFiniteGradientError
from unmask.errors import ProcessesDifferError as ProcessesDifferError
from unmask.errors import ScheduleNotRunError as ScheduleNotRunError
from unmask.errors import SelectionError as SelectionError
from unmask.errors import SyncError as SyncError
from unmask.errors import SyncTimeoutError as SyncTimeoutError
from unmask.errors import UnmaskError as UnmaskError
from unmask.errors import UnmaskWarning as UnmaskWarning
from unmask.errors import WriteError as WriteError
from unmask.methods.budget import Budget as Budget
from unmask.methods.heuristics import Heuristic as Heuristic
from unmask.methods.heuristics import heuristic as heuristic
from unmask.methods.heuristics import heuristic_names as heuristic_names
from unmask.methods.heuristics import register_heuristic as register_heuristic
from unmask.methods.method import Method as Method
from unmask.methods.presets import *
from unmask.methods.schedules import SCHEDULES as SCHEDULES
from unmask.methods.schedules import Schedule as Schedule
from unmask.methods.scopes import Scope as Scope
from unmask.selection.clipping import clip_grad_norm_ as clip_grad_norm_
from unmask.selection.optim import SelectiveAdamW as SelectiveAdamW
from unmask.selection.select import select as select
from unmask.selection.selection import Selection as Selection

__version__: str
