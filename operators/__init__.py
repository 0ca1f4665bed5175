"""Measurement physics for torch: linear operators that are batched, checked, exactly adjoint and differentiable to any order.

Importing this package loads nothing; take what you need from `operators.ct`, `operators.geometry`, `operators.linear` and so on.
"""
