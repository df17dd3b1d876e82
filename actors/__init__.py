"""Thin Ray shells around `raymoe` and `placement`: they observe and execute, and decide nothing."""
