"""RefCOCOg grounding: longer expressions. `python -m evals.refcocog --help`.

Splits val, test; the val of the hub's set holds more objects than the usual one. Metrics are named as RefCOCO's, as in
the reference.
"""

import sys
from functools import partial

from evals import refcoco
from evals.harness.columns import Hub

NAME = "refcocog"
HUB = Hub("lmms-lab/RefCOCOg", None, "val")
main = partial(refcoco.main, name=NAME, hub=HUB)

if __name__ == "__main__":
    sys.exit(main())
