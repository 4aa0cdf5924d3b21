"""Script: what all of our scripts do with their arguments and their end. Helper of every one of them."""
import os
import sys


def run_script(main):
    """main(arguments) of the script that was started, whose result is the exit code. What is wrong with its
    input is said in one line, with exit code 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError, ImportError) as problem:
        print(f"{os.path.basename(sys.argv[0])}: {problem}", file=sys.stderr)
        sys.exit(2)
