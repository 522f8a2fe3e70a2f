"""The ops in plain PyTorch: the ``pytorch`` backend, and composites that autograd can see through.

``*_forward`` and ``*_backward`` run inside the ops, out of autograd's sight, and work in place
where they can. ``*_composite`` computes the same function (with the same dropout decisions) from
differentiable operations, for ``torch.func``, forward-mode AD and second derivatives.
"""
