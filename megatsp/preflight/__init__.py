"""Preflight: which of a job's nodes are as they should be, before its first step.

First a roll call without torch, which 1,024 tasks answer within a minute; then measurements with it.
"""
