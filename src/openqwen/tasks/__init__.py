"""What can be asked and graded: tasks as data, and graders that judge batches of answers."""

from openqwen.tasks.answers import GradedAnswer, answer_tasks
from openqwen.tasks.cache import GradeCache
from openqwen.tasks.files import read_tasks, write_tasks
from openqwen.tasks.graders import GRADERS, grade
from openqwen.tasks.models import ConversationScorer, GraderModel
from openqwen.tasks.readers import READERS, read_problems
from openqwen.tasks.task import Grade, Task

__all__ = [
    "GRADERS",
    "READERS",
    "ConversationScorer",
    "Grade",
    "GradeCache",
    "GradedAnswer",
    "GraderModel",
    "Task",
    "answer_tasks",
    "grade",
    "read_problems",
    "read_tasks",
    "write_tasks",
]
