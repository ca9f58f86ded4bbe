"""What lies beside this package under the same name: `flash_attn.cute` of flash-attn-4, an editable install's library.

Such a folder has no `__init__.py` of its own (a portion, as PEP 420 calls it). A `flash_attn` that is a package of its
own, such as Dao's in another site-packages folder, stays out: two implementations would mix unseen.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Iterable
from pathlib import Path


def with_portions(package: str, own: Iterable[str]) -> list[str]:
    """A package's own folders, then its portions on `sys.path`, in order."""
    folders = list(own)
    for entry in sys.path:
        finder = pkgutil.get_importer(entry or ".")
        spec = finder.find_spec(package) if finder is not None else None
        if spec is not None and spec.loader is None:
            folders += [path for path in spec.submodule_search_locations or () if path not in folders]
    return folders


FOLDERS = with_portions("flash_attn", [str(Path(__file__).parent)])
