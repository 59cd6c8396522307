"""RefCOCO+ grounding: expressions without words for places. `python -m evals.refcocoplus --help`.

Splits val, testA, testB. Metrics are named as RefCOCO's, as in the reference.
"""

import sys
from functools import partial

from evals import refcoco
from evals.harness.columns import Hub

NAME = "refcocoplus"
HUB = Hub("lmms-lab/RefCOCOplus", None, "val")
main = partial(refcoco.main, name=NAME, hub=HUB)

if __name__ == "__main__":
    sys.exit(main())
