"""Inputs that nobody means: bad calls, damaged files, kills and full disks."""
