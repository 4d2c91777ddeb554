"""Before the first step: what the launch and the script ask for becomes an accelerator and prepared objects.

In: the environment of `accelerate launch`, the constructor's arguments, what the factories return.
Out: checked and prepared objects, or an error that names the remedy; and the report that the log starts with.
"""
