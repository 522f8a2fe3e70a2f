"""The library's ops: one file each, in four sections.

Public function; why-not reasons per backend; schema, fake and implementation; autograd Function.
"""

from fastattn.ops import dropout_factor as dropout_factor  # arguments.py runs it by its name
