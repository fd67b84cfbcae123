"""What else multi-task training needs: a sampler of the tasks in a batch, and optimizer groups for each task."""

from mtlfast.training._parameter_groups import parameter_groups
from mtlfast.training._task_sampler import TaskSampler

__all__ = ["TaskSampler", "parameter_groups"]
