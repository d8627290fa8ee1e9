"""Data made without people and without another model: checkable tasks, rejection sampling,
repurposing.
"""

from openqwen.instruct.synthesize.demonstrations import InstructConfig, build_demonstrations
from openqwen.instruct.synthesize.preferences import PreferConfig, build_preferences
from openqwen.instruct.synthesize.pretraining_tasks import task_documents
from openqwen.instruct.synthesize.tasks import KINDS, Task, generate_tasks, split_of

__all__ = [
    "KINDS",
    "InstructConfig",
    "PreferConfig",
    "Task",
    "build_demonstrations",
    "build_preferences",
    "generate_tasks",
    "split_of",
    "task_documents",
]
