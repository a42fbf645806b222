"""Fixtures of tests of pages that outlive the process."""

from kept_prefixes import memory, stored  # noqa: F401
