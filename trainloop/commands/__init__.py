"""The commands of the command line, one module each.

In: the command's arguments. Out: text for people, or JSON for programs, and an exit code.
"""
