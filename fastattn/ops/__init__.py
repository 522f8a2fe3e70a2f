"""The library's ops: one file each, in four sections.

Public function; why-not reasons per backend; schema, fake and implementation; autograd Function.
"""
