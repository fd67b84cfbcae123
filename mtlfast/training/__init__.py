"""What a training loop needs beside losses and gradients: which tasks a batch holds, and optimizer groups by task."""

from mtlfast.training._parameter_groups import parameter_groups
from mtlfast.training._task_sampler import TaskSampler

__all__ = ["TaskSampler", "parameter_groups"]
