"""A run's teacher: loaded and optionally averaged (`load`), or its cached outputs (`cache`).

The step sees one pure function, or arrays in the batch; it does not know which files they come from.
"""

from kdjax.teacher.load import Teacher, load_teacher

__all__ = ["Teacher", "load_teacher"]
