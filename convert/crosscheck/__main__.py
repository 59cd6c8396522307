import sys

from convert.crosscheck.command import main

sys.exit(main())
