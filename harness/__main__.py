"""`python -m harness`."""

import signal
import sys

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # until the commands take over, a moment later
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        from harness.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    main()
