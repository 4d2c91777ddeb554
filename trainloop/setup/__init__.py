"""Before the first step: turns the requests of the launch and the script into an accelerator and prepared objects.

In: the environment of `accelerate launch`, the constructor's arguments, the return values of the factories.
Out: checked and prepared objects, or an error that names the remedy; and the report at the start of the log.
"""
