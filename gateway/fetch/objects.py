"""An object of an S3 or Google store -> its bytes.

By obstore, bindings to Rust's object_store: one package for both stores, nothing beneath it, and asynchronous to the
bottom. It is an extra, being as large as the gateway itself. Endpoint and credentials are the operator's: obstore
reads them from the environment (AWS_*, GOOGLE_*). A client chooses no more than the key in a bucket that is listed.
The endpoint is trusted: obstore goes where it redirects to.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

from gateway.fetch.location import StoredObject
from gateway.fetch.taken import Taken
from gateway.problems import Failure

if TYPE_CHECKING:
    from obstore.store import GCSStore, S3Store

_METADATA = "169.254.169.254"
"""Where credentials are looked for last: in the cloud that this runs in."""
logger = logging.getLogger("gateway.fetch")


async def get(location: StoredObject, taken: Taken) -> bytes:
    """Fetch into `taken`. The caller limits the time.

    Raises:
        Failure: fetch_refused, fetch_store_failed, fetch_too_large, fetch_not_installed or overloaded.
    """
    try:
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
    except ModuleNotFoundError as error:
        raise Failure("fetch_not_installed", f"{location.scheme}:// needs the package obstore") from error
    try:
        found = await _store(location.scheme, location.bucket).get_async(location.key)
        taken.require(found.meta["size"])
        async for chunk in found.stream(min_chunk_size=2**16):
            taken.write(memoryview(chunk))
    except FileNotFoundError as error:
        raise Failure("fetch_refused", f"{location.origin} has no such object") from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        why = "this service may not read it, or there is no such object"
        raise Failure("fetch_store_failed", f"{location.origin}: {why}") from error
    except (BaseError, OSError) as error:
        # Its message names the endpoint and more: for the log alone.
        logger.warning("object store", extra={"fields": {"bucket": location.origin, "error": str(error)[:500]}})
        why = "no credentials for it" if _METADATA in str(error) else "it cannot be reached, or failed"
        raise Failure("fetch_store_failed", f"{location.origin}: {why}") from error
    return taken.all()


@functools.cache
def _store(scheme: str, bucket: str) -> S3Store | GCSStore:
    """The client of one bucket, kept for its connections and its credentials; only listed buckets come here."""
    from obstore.store import GCSStore, S3Store

    # Time and retries belong to the request that waits.
    return (S3Store if scheme == "s3" else GCSStore)(bucket, retry_config={"max_retries": 0})
