"""The entry point of `python -m harness`."""

import os
import signal

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # until harness.cli installs its own handlers
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        from harness.cli import main
    except KeyboardInterrupt:
        os._exit(130)  # Python would end by SIGINT where code in a string was interrupted
    main()
