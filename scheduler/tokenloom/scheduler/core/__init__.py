"""The core: admission, batching, blocks. Everything but `loop` and `__main__` is pure.

Pure means: no clock, socket, thread or global random number. Time comes in as
an argument, so a simulation can drive thousands of seeded runs.
"""
