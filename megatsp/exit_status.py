"""What a process's exit status tells whoever started it."""

FAILURE = 1  # a program's fault, or a machine's
USER_ERROR = 2  # a mistake of the user's: its message is all there is to show
NOT_SAVED = 74  # the last checkpoint could not be written (sysexits.h: EX_IOERR)
REQUEUE = 75  # stopped in good order before the end: start the same command again (sysexits.h: EX_TEMPFAIL)
HANG = 76  # no progress within trainer.hang_timeout_s
HARDWARE = 77  # the same step gave other bits: a machine is suspected
INTERRUPTED = 130  # by Ctrl-C

RETRIED = (FAILURE, HANG)  # what a launcher starts again by itself, beside ranks that were killed
