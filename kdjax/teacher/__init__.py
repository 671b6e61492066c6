"""The teacher of a run: read and perhaps averaged (`load`), or its answers kept from before (`targets`).

The step sees one pure function, or arrays in the batch; it does not know which files they came from.
"""

from kdjax.teacher.load import Teacher, load_teacher

__all__ = ["Teacher", "load_teacher"]
